"""Stage 7: PPO against its rewards, with a KL penalty to the SL model (Bai et al. 2022, section 4.1)."""

from pathlib import Path

import pyarrow as pa

from cai_ray.artifacts import Manifest, StageDir
from cai_ray.config import FEEDBACK, PPOConfig, SftConfig
from cai_ray.errors import DataError
from cai_ray.models.tokenization import Tokenizer
from cai_ray.rl.loop import run_ppo
from cai_ray.rl.setup import Judge, Setup
from cai_ray.stages.shared import StageInputs, iter_rows, read_rows
from cai_ray.training.sft import examples


def ppo(config: PPOConfig, inputs: StageInputs, out: StageDir) -> Manifest:
    """Trains the policy on the training prompts of both kinds and publishes it.

    Raises:
        DataError: there is no training prompt.
        StageFailed: a worker did not answer in time, or weights did not arrive; the last checkpoint is kept.
    """
    prompts = read_rows(inputs.rows[0], config.share, split="train")
    if not prompts:
        raise DataError("ppo: no training prompt", "give `prompts` a source with rows, or widen ppo.share")
    engines = inputs.setup.engines(config.max_tokens, config.engines, lora_rank=config.adapter_rank, updated=True)
    scoring: dict[str, Path | Judge] = {name: setup.model for name, setup in inputs.models.items()}
    if judge := inputs.models.get(FEEDBACK):
        assert inputs.constitution is not None
        scoring[FEEDBACK] = Judge(judge.model, judge.format, inputs.constitution)
    setup = Setup(
        config=config,
        policy=inputs.setup.model,
        rewards=tuple(scoring.get(name, name) for name in config.reward),  # else a function
        heldout_reward=inputs.models[config.heldout_reward].model if config.heldout_reward else None,
        format=inputs.setup.format,
        device=inputs.device,
        seed=out.seed,
        cluster=inputs.cluster,
        engine_dtype=inputs.setup.dtype,
    )
    sl_rows, counts = None, {"prompts": len(prompts)}
    if config.ptx_coef:
        tokenizer = Tokenizer.load(setup.policy, setup.format)
        sl_rows, counts["sl_rows_unusable"] = to_learn(inputs.rows[1], config, tokenizer)
    if setup.colocated:
        inputs.setup.pool.release()  # its engines have GPUs of their own, which are about to be shared
    held = read_rows(inputs.rows[0], split="test") if config.evaluate_every else ()
    how = (inputs.settings.progress, sl_rows, inputs.settings.max_bad_fraction, held)
    metrics, workers = run_ppo(setup, prompts, engines, out, *how)
    return out.commit(inputs.key, {**counts, **metrics}, workers=workers)


def to_learn(folder: Path, config: PPOConfig, tokenizer: Tokenizer) -> tuple[pa.Table, int]:
    """`revise`'s training rows, all rounds, as SL learns them by default, cut to PPO's lengths.

    Columns: id, prompt_ids, response_ids. Also how many rows cannot be learned, which `sft` has in its quarantine.

    Raises:
        DataError: there is none.
    """
    sft, rows, unusable = SftConfig(max_tokens=config.max_tokens), [], 0
    for row in iter_rows(folder, split="train"):
        try:
            made = examples(row, tokenizer, sft)
        except DataError:
            made, unusable = [], unusable + 1
        for example in made:
            first = int(example.loss_mask_T.argmax())  # the answer is the end of the row
            prompt, response = example.ids_T[:first], example.ids_T[first:]
            rows.append({"id": example.id, "prompt_ids": prompt, "response_ids": response})
    if not rows:
        raise DataError("ppo.ptx_coef has no training row of `revise` to mix in", "set it to 0, or give more prompts")
    return pa.Table.from_pylist(rows), unusable
