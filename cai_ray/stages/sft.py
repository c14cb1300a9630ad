"""Stage 3: fine-tunes the pretrained model on revisions and helpful samples (Bai et al. 2022, section 3.2)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_ray.artifacts import Manifest, StageDir, StageKey
from cai_ray.config import Cluster, SftConfig
from cai_ray.training.launch import run_training


@dataclass(frozen=True)
class SftInputs:
    """What the stage reads besides its configuration."""

    key: StageKey
    revisions: Path
    model: Path
    format: str
    cluster: Cluster
    device: str
    progress: Any = None


def sft(config: SftConfig, inputs: SftInputs, out: StageDir) -> Manifest:
    """Trains on the chosen revisions of harmful prompts and the samples of helpful ones; publishes the SL model.

    Raises:
        StageFailed: training stopped; its last checkpoint is kept.
    """
    metrics, workers = run_training(
        "sft",
        config,
        model=inputs.model,
        format=inputs.format,
        rows=[inputs.revisions],
        out=out,
        cluster=inputs.cluster,
        device=inputs.device,
        progress=inputs.progress,
    )
    return out.commit(inputs.key, metrics, workers=workers)
