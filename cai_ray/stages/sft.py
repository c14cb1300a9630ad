"""Stage 3: fine-tunes the pretrained model on revisions and helpful samples (Bai et al. 2022, section 3.2)."""

from cai_ray.artifacts import Manifest, StageDir
from cai_ray.config import SftConfig
from cai_ray.stages.shared import StageInputs, fit


def sft(config: SftConfig, inputs: StageInputs, out: StageDir) -> Manifest:
    """Trains on the chosen revisions of harmful prompts and the samples of helpful ones; publishes the SL model.

    Raises:
        StageFailed: training stopped; its last checkpoint is kept.
    """
    metrics = fit("sft", config, inputs.rows, inputs, out)
    return out.commit(inputs.key, metrics)
