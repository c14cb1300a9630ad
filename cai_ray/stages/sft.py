"""Stage 3: fine-tunes the pretrained model on revisions and helpful samples (Bai et al. 2022, section 3.2)."""

from dataclasses import dataclass
from pathlib import Path

from cai_ray.artifacts import Manifest, StageDir, StageKey
from cai_ray.config import Cluster, SftConfig
from cai_ray.stages.asking import Show
from cai_ray.training.launch import run_training


@dataclass(frozen=True)
class SftInputs:
    """What the stage reads besides its configuration."""

    key: StageKey
    revisions: Path
    model: Path
    format: str
    max_bad_fraction: float
    cluster: Cluster
    device: str
    progress: Show


def sft(config: SftConfig, inputs: SftInputs, out: StageDir) -> Manifest:
    """Trains on the chosen revisions of harmful prompts and the samples of helpful ones; publishes the SL model.

    Raises:
        StageFailed: training stopped; its last checkpoint is kept.
    """
    with inputs.progress() as show, out.phase("train"):
        metrics = run_training(
            "sft",
            config,
            [inputs.revisions],
            out,
            inputs.cluster,
            inputs.device,
            model=inputs.model,
            format=inputs.format,
            max_bad_fraction=inputs.max_bad_fraction,
            on_progress=show,
        )
    return out.commit(inputs.key, metrics)
