"""Stage 7: PPO against the preference model, with a KL penalty to the SL model (Bai et al. 2022, section 4.1)."""

from dataclasses import dataclass
from pathlib import Path

from cai_ray.artifacts import Manifest, StageDir, StageKey
from cai_ray.config import Cluster, PPOConfig
from cai_ray.errors import DataError
from cai_ray.rl.loop import run_ppo
from cai_ray.rl.workers import Setup
from cai_ray.stages.shared import EngineSetup, Show, read_rows


@dataclass(frozen=True)
class PPOInputs:
    """What the stage reads besides its configuration."""

    key: StageKey
    prompts: Path
    setup: EngineSetup  # the policy's start, on the rollout engines
    reward: Path
    cluster: Cluster
    device: str
    progress: Show


def ppo(config: PPOConfig, inputs: PPOInputs, out: StageDir) -> Manifest:
    """Trains the policy on the training prompts of both kinds and publishes it.

    Raises:
        DataError: there is no training prompt.
        StageFailed: a worker did not answer in time, or weights did not arrive; the last checkpoint is kept.
    """
    prompts = read_rows(inputs.prompts, config.share, split="train")
    if not prompts:
        raise DataError("ppo: no training prompt", "give `prompts` a source with rows, or widen ppo.share")
    engines = inputs.setup.engines(config.max_prompt_tokens + config.max_new_tokens, config.engines)
    setup = Setup(
        config=config,
        policy=inputs.setup.model,
        reward_model=inputs.reward,
        format=inputs.setup.format,
        device=inputs.device,
        seed=out.seed,
        cluster=inputs.cluster,
        engine_dtype=inputs.setup.dtype,
    )
    metrics, workers = run_ppo(setup, prompts, engines, out, inputs.progress)
    return out.commit(inputs.key, {"prompts": len(prompts), **metrics}, workers=workers)
