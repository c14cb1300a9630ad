"""Stage 7: PPO against its rewards, with a KL penalty to the SL model (Bai et al. 2022, section 4.1)."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from cai_ray.artifacts import Manifest, Show, StageDir, StageKey
from cai_ray.config import Cluster, PPOConfig, SftConfig
from cai_ray.errors import DataError
from cai_ray.models.tokenization import Tokenizer
from cai_ray.rl.loop import run_ppo
from cai_ray.rl.setup import Judge, Setup
from cai_ray.stages.shared import EngineSetup, iter_rows, read_rows
from cai_ray.training.sft import examples


@dataclass(frozen=True)
class PPOInputs:
    """What the stage reads besides its configuration."""

    key: StageKey
    prompts: Path
    setup: EngineSetup  # the policy's start, on the rollout engines
    rewards: tuple[Path | Judge | str, ...]  # folders of preference models, feedback models, names of functions
    heldout_reward: Path | None
    cluster: Cluster
    device: str
    progress: Show
    max_bad_fraction: float
    revisions: Path | None = None  # rows of `revise`, where ptx_coef mixes them in


def ppo(config: PPOConfig, inputs: PPOInputs, out: StageDir) -> Manifest:
    """Trains the policy on the training prompts of both kinds and publishes it.

    Raises:
        DataError: there is no training prompt.
        StageFailed: a worker did not answer in time, or weights did not arrive; the last checkpoint is kept.
    """
    prompts = read_rows(inputs.prompts, config.share, split="train")
    if not prompts:
        raise DataError("ppo: no training prompt", "give `prompts` a source with rows, or widen ppo.share")
    options = {"lora_rank": config.adapter_rank, "updated": True}
    engines = inputs.setup.engines(config.max_tokens, config.engines, **options)
    setup = Setup(
        config=config,
        policy=inputs.setup.model,
        rewards=inputs.rewards,
        heldout_reward=inputs.heldout_reward,
        format=inputs.setup.format,
        device=inputs.device,
        seed=out.seed,
        cluster=inputs.cluster,
        engine_dtype=inputs.setup.dtype,
    )
    sl_rows = None
    if inputs.revisions is not None:
        sl_rows = to_learn(inputs.revisions, config, Tokenizer.load(setup.policy, setup.format))
    if setup.colocated:
        inputs.setup.pool.release()  # its engines have GPUs of their own, which are about to be shared
    metrics, workers = run_ppo(setup, prompts, engines, out, inputs.progress, sl_rows, inputs.max_bad_fraction)
    return out.commit(inputs.key, {"prompts": len(prompts), **metrics}, workers=workers)


def to_learn(folder: Path, config: PPOConfig, tokenizer: Tokenizer) -> pa.Table:
    """`revise`'s training rows, all rounds, as SL learns them by default, cut to PPO's lengths.

    Columns: id, prompt_ids, response_ids.

    Raises:
        DataError: there is none.
    """
    sft, rows = SftConfig(max_tokens=config.max_tokens), []
    for row in iter_rows(folder, split="train"):
        for example in examples(row, tokenizer, sft):
            first = int(example.loss_mask_T.argmax())  # the answer is the end of the row
            prompt, response = example.ids_T[:first], example.ids_T[first:]
            rows.append({"id": example.id, "prompt_ids": prompt, "response_ids": response})
    if not rows:
        raise DataError("ppo.ptx_coef has no training row of `revise` to mix in", "set it to 0, or give more prompts")
    return pa.Table.from_pylist(rows)
