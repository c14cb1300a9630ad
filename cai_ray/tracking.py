"""Where metrics go besides metrics.jsonl: W&B, one group per run and one W&B run per stage."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from cai_ray.artifacts import StageDir, write_atomic
from cai_ray.config import Config, Tracking
from cai_ray.errors import ConfigError


def wandb_wanted(tracking: Tracking) -> bool:
    """Whether W&B is on: by the configuration, or (auto) because the environment is set up for it."""
    if tracking.wandb == "auto":
        return bool(os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE"))
    return tracking.wandb == "on"


@contextmanager
def tracked(config: Config, out: StageDir, folder: Path) -> Iterator[None]:
    """What a stage notes within the block goes to a W&B run of its own too, where W&B is wanted.

    Its id is kept in the stage's directory: a resumed stage continues its own curve. At the end come the key numbers
    and the samples that are left; without a manifest it counts as failed.

    Args:
        config: of the run.
        out: the stage.
        folder: of W&B's own files.

    Raises:
        ConfigError: W&B is wanted, and there is no key, no network or no such entity.
    """
    if not wandb_wanted(config.tracking):
        yield
        return
    import wandb

    known = out.path / "tracking.json"
    if not known.is_file():
        out.path.mkdir(parents=True, exist_ok=True)
        write_atomic(known, json.dumps({"id": uuid4().hex[:8]}))
    try:
        run = wandb.init(
            project=config.tracking.project,
            entity=config.tracking.entity,
            group=config.run.name,
            name=f"{config.run.name}/{out.name}",
            job_type=out.name,
            id=json.loads(known.read_text("utf-8"))["id"],
            resume="allow",
            dir=str(folder),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True),
        )
    except wandb.Error as e:
        fix = "log in with `wandb login` or WANDB_API_KEY, or set WANDB_MODE=offline or tracking.wandb=off"
        raise ConfigError(f"W&B does not take the run: {e}", fix) from None
    samples: list[Mapping[str, Any]] = []  # since the last line of metrics

    def log(values: Mapping[str, Any]) -> None:
        columns: list[Any] = sorted({k for r in samples for k in r})
        cells: list[Any] = [[_cell(r.get(c)) for c in columns] for r in samples]
        samples.clear()
        run.log({**values, **({"samples": wandb.Table(columns=columns, data=cells)} if cells else {})})

    out.on_metrics = lambda step, values: log({**values, f"{out.name}/step": step})
    out.on_sample = samples.append
    try:
        yield
    finally:
        manifest = out.manifest()
        if manifest:
            run.summary.update({k: v for k, v in manifest.metrics.items() if isinstance(v, int | float)})
        if samples:
            log({})
        run.finish(exit_code=0 if manifest else 1)


def _cell(value: Any) -> Any:
    return value if isinstance(value, str | int | float | None) else json.dumps(value, ensure_ascii=False)
