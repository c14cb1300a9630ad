"""Stage 6: a preference model on AI-harmless and human-helpful comparisons (Bai et al. 2022, section 4.1)."""

import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from cai_ray.artifacts import Manifest, StageDir, StageKey
from cai_ray.config import Cluster, PreferenceModelConfig
from cai_ray.errors import DataError, StageFailed
from cai_ray.records import LABELED_PAIR, Row, to_table
from cai_ray.sources import read_comparisons
from cai_ray.stages.asking import Show
from cai_ray.training.launch import run_training


@dataclass(frozen=True)
class PreferenceModelInputs:
    """What the stage reads besides its configuration."""

    key: StageKey
    labels: Path | None  # rows of `label`, when the configuration names them
    model: Path
    format: str
    max_bad_fraction: float
    cluster: Cluster
    device: str
    progress: Show


def preference_model(config: PreferenceModelConfig, inputs: PreferenceModelInputs, out: StageDir) -> Manifest:
    """Trains the preference model on every source of comparisons and publishes it with its reward mean and std.

    Raises:
        DataError: a source cannot be read or holds nothing.
        StageFailed: too many rows are bad, or training stopped; its last checkpoint is kept.
    """
    folders = [inputs.labels] if inputs.labels else []
    bad: list[Row] = []
    counts: dict[str, int] = {}
    for number, source in enumerate(s for s in config.data if s.path != "label"):
        rows, unusable = read_comparisons(source)
        if len(unusable) > inputs.max_bad_fraction * (len(rows) + len(unusable)):
            raise StageFailed(
                f"preference_model: {len(unusable)} of {len(rows) + len(unusable)} rows of {source.path} are bad, the "
                f"limit is {inputs.max_bad_fraction:.1%}; the first: {unusable[0]['id']}: {unusable[0]['reason']}",
                "mend them or raise run.max_bad_fraction",
            )
        if not rows:
            raise DataError(f"preference_model: {source.path} holds no comparison", "expected chosen and rejected")
        folder = out.data / f"human-{number}"  # kept: what was trained on is part of the stage's record
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(to_table(rows, LABELED_PAIR), folder / "part-00000.parquet")
        folders.append(folder)
        bad += unusable
        counts[f"rows/{source.path}"] = len(rows)
    out.quarantine_path.write_text("".join(json.dumps(b) + "\n" for b in bad), "utf-8")
    with inputs.progress() as show, out.phase("train"):
        metrics = run_training(
            "preference_model",
            config,
            folders,
            out,
            inputs.cluster,
            inputs.device,
            model=inputs.model,
            format=inputs.format,
            max_bad_fraction=inputs.max_bad_fraction,
            on_progress=show,
        )
    return out.commit(inputs.key, {**counts, "quarantined": len(bad), **metrics})
