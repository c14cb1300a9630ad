"""Where metrics go besides metrics.jsonl: W&B, one group per run and one W&B run per stage."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from cai_ray.artifacts import Manifest, StageDir
from cai_ray.config import Config, Tracking
from cai_ray.errors import ConfigError


def wandb_wanted(tracking: Tracking) -> bool:
    """Whether W&B is on: by the configuration, or (auto) because the environment is set up for it."""
    if tracking.wandb == "auto":
        return bool(os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE"))
    return tracking.wandb == "on"


class StageTracker:
    """One W&B run for one stage.

    Its id is kept in the stage's directory: a resumed stage continues its own curve.

    Raises:
        ConfigError: W&B is wanted, and there is no key, no network or no such entity.
    """

    def __init__(self, config: Config, out: StageDir, run_path: Path):
        self._out, self._samples = out, list[Mapping[str, Any]]()
        self._run: Any = None
        if not wandb_wanted(config.tracking):
            return
        import wandb

        known = out.path / "tracking.json"
        identity = json.loads(known.read_text("utf-8")) if known.is_file() else {"id": uuid4().hex[:8]}
        out.path.mkdir(parents=True, exist_ok=True)
        known.write_text(json.dumps(identity), "utf-8")
        try:
            self._run = wandb.init(
                project=config.tracking.project,
                entity=config.tracking.entity,
                group=config.run.name,
                name=f"{config.run.name}/{out.name}",
                job_type=out.name,
                id=identity["id"],
                resume="allow",
                dir=str(run_path),
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as e:
            fix = "log in with `wandb login` or WANDB_API_KEY, or set WANDB_MODE=offline or tracking.wandb=off"
            raise ConfigError(f"W&B does not take the run: {e}", fix) from None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Passes on one line of metrics, and a table of the samples since the last; `step` becomes `STAGE/step`."""
        if self._run is not None:
            self._run.log({**values, f"{self._out.name}/step": step, **self._table()})

    def sample(self, row: Mapping[str, Any]) -> None:
        """Keeps an example for the next table."""
        if self._run is not None:
            self._samples.append(row)

    def finish(self, manifest: Manifest | None) -> None:
        """Logs the key numbers and what samples are left, and closes the W&B run; without a manifest, as failed."""
        if self._run is None:
            return
        if manifest:
            self._run.summary.update({k: v for k, v in manifest.metrics.items() if isinstance(v, int | float)})
        if rest := self._table():
            self._run.log(rest)
        self._run.finish(exit_code=0 if manifest else 1)

    def _table(self) -> dict[str, Any]:
        if not self._samples:
            return {}
        import wandb

        columns: list[Any] = sorted({k for r in self._samples for k in r})
        cells: list[Any] = [[_cell(r.get(c)) for c in columns] for r in self._samples]
        self._samples.clear()
        return {"samples": wandb.Table(columns=columns, data=cells)}


def _cell(value: Any) -> Any:
    return value if isinstance(value, str | int | float | None) else json.dumps(value, ensure_ascii=False)
