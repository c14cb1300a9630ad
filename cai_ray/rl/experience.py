"""What the actor and the critic learn from a step's rollouts: from scores and log-probs to advantages, and the loss.

Shapes: B responses, R response tokens of the longest one, N response tokens of a micro-batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from cai_ray.algo.kl import kl_estimate
from cai_ray.algo.masking import masked_mean, masked_var, masked_whiten, partial_mean, zero_masked
from cai_ray.algo.ppo import Stats, gae, group_advantages, importance_weights, policy_loss, shaped_rewards
from cai_ray.config import PPOConfig
from cai_ray.errors import StageFailed
from cai_ray.records import derive_seed
from cai_ray.rl.batches import padded, ragged, row_lengths

# What `actor_loss` reads besides the actor's own forward pass; the last two only with some options.
ACTOR_COLUMNS = ("old_logprobs", "advantages", "ref_logprobs", "rollout_logprobs")
NGRAM = 4  # tokens; a response that says half of its n-grams again is repetitive


def make_experience(config: PPOConfig, kl_coef: float, batch: pa.Table, *parts: pa.Table) -> tuple[pa.Table, dict]:
    """Joins what the workers computed to the rollouts, and adds advantages, and returns where there is a critic.

    Order: scores are normalised already (by the reward worker) → missing-EOS penalty → clip → KL per token → GAE →
    advantages whitened over the whole batch; or, without a critic, → each response's sum compared with its group's.

    Args:
        config: the stage's configuration.
        kl_coef: weight of the per-token KL (k1).
        batch: rollouts.
        parts: tables with `row` and some of `score, score_raw, heldout, old_logprobs, ref_logprobs, values`.

    Returns the batch with those columns, advantages and returns; and the step's metrics and a few samples.
    """
    names = sorted({name for part in parts for name in part.column_names} - {"row"})
    for name in names:
        batch = batch.append_column(name, _joined(parts, name, len(batch)))
    if config.old_logprobs == "rollout":
        batch = batch.append_column("old_logprobs", batch["rollout_logprobs"])
    old_BR, ref_BR, rollout_BR = (padded(batch, name) for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs"))
    lengths = row_lengths(batch, "response_ids")
    mask_BR = torch.arange(old_BR.shape[1]) < torch.tensor(lengths)[:, None]
    scores_B, ended_B = _column(batch, "score"), torch.tensor(batch["ended"].to_pylist())
    clip, penalty = config.score_clip, config.missing_eos_penalty
    coef = kl_coef if config.kl_penalty == "reward" else 0.0
    rewards_BR = shaped_rewards(scores_B, old_BR, ref_BR, mask_BR, coef, "k1", clip, penalty, ended_B)
    estimates, metrics = _estimate(config, batch, rewards_BR, mask_BR)
    for name, x_BR in estimates.items():
        batch = batch.append_column(name, ragged(x_BR[mask_BR], lengths))
    gap_BR = (old_BR - rollout_BR).abs()
    metrics |= {
        "objective/kl": kl_estimate(old_BR, ref_BR, "k1").sum(1).mean(),
        "objective/kl_coef": kl_coef,
        "objective/score": scores_B.mean(),
        "objective/score_std": scores_B.std(correction=0),
        "objective/score_raw": _column(batch, "score_raw").mean(),
        "objective/reward": rewards_BR.sum(1).mean(),
        "rollout/logprob_gap": masked_mean(gap_BR, mask_BR),
        "rollout/logprob_gap_max": gap_BR.max(),
        "rollout/truncated": 1 - ended_B.float().mean(),
        "rollout/length": sum(lengths) / len(lengths),
        "rollout/repetitive": sum(map(repetitive, batch["response_ids"].to_pylist())) / len(lengths),
    }
    if "heldout" in names:
        metrics["objective/heldout_score"] = _column(batch, "heldout").mean()
    return batch, {"metrics": {k: float(v) for k, v in metrics.items()}, "samples": _samples(batch, scores_B)}


def _estimate(
    config: PPOConfig, batch: pa.Table, rewards_BR: Tensor, mask_BR: Tensor
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The columns advantages and returns, and what is said of the critic."""
    if not config.has_critic:
        advantages_B = group_advantages(rewards_BR.sum(1), config.samples_per_prompt, config.advantage)
        return {"advantages": advantages_B[:, None].expand_as(rewards_BR)}, {}
    values_BR = padded(batch, "values")
    advantages_BR, returns_BR = gae(rewards_BR, values_BR, mask_BR, config.gamma, config.gae_lambda)
    unexplained = masked_var(returns_BR - values_BR, mask_BR) / masked_var(returns_BR, mask_BR).clamp(min=1e-8)
    if config.whiten_advantages:
        advantages_BR = masked_whiten(advantages_BR, mask_BR)
    return {"advantages": advantages_BR, "returns": returns_BR}, {"value/explained_variance": 1 - unexplained}


def repetitive(ids: Sequence[int]) -> bool:
    """Whether less than half of a response's n-grams of tokens are different ones."""
    grams = list(zip(*(ids[k:] for k in range(NGRAM)), strict=False))
    return 2 * len(set(grams)) < len(grams)


def _samples(batch: pa.Table, scores_B: Tensor) -> list[dict[str, Any]]:
    """The best response, the worst, and one that is drawn by a hash."""
    draws = [derive_seed(0, id, "sample") for id in batch["id"].to_pylist()]
    chosen = {"best": int(scores_B.argmax()), "worst": int(scores_B.argmin()), "random": draws.index(min(draws))}
    shown = batch.select(["id", "kind", "prompt", "response", "score", "ended"])
    return [{"sample": name, **shown.slice(row, 1).to_pylist()[0]} for name, row in chosen.items()]


def _column(batch: pa.Table, name: str) -> Tensor:
    return torch.tensor(batch[name].to_numpy(), dtype=torch.float32)


def _joined(parts: Sequence[pa.Table], name: str, count: int) -> pa.Array:
    table = pa.concat_tables([p.select(["row", name]) for p in parts if name in p.column_names]).sort_by("row")
    if table["row"].to_pylist() != list(range(count)):
        raise StageFailed(f"{name}: the workers answered for {len(table)} of {count} responses", "run it again")
    return table[name]


def actor_loss(
    config: PPOConfig,
    kl_coef: float,
    columns: Mapping[str, Tensor],
    logprobs_N: Tensor,
    entropy_N: Tensor,
    mask_N: Tensor,
    total: Tensor | float,
) -> tuple[Tensor, Stats]:
    """What the actor minimises: the clipped policy loss, minus the entropy bonus, plus the KL where that is a loss.

    Responses of an older policy count by the capped ratio of the policy at the start of the step to that one, in the
    policy loss and in the KL. `total` counts the response tokens of the whole optimizer step, over all ranks and
    micro-batches; loss and stats are partial sums over it. The critic's loss is `algo.ppo.value_loss`.
    """
    old_N, weights_N = columns["old_logprobs"], None
    if config.staleness:
        weights_N = importance_weights(old_N, columns["rollout_logprobs"], mask_N, config.importance_cap)
    loss, stats = policy_loss(
        logprobs_N, old_N, columns["advantages"], mask_N, config.clip_range, config.dual_clip, weights_N, total
    )
    entropy = partial_mean(entropy_N, mask_N, total)
    stats["entropy"] = entropy.detach()
    if config.entropy_coef:
        loss = loss - config.entropy_coef * entropy
    if config.kl_penalty != "reward":
        ref_N = zero_masked(columns["ref_logprobs"], mask_N)
        kl_N = kl_estimate(zero_masked(logprobs_N, mask_N), ref_N, config.kl_penalty.removesuffix("_loss"))
        kl = partial_mean(kl_N if weights_N is None else kl_N * weights_N, mask_N, total)
        stats["kl_loss"] = kl.detach()
        loss = loss + kl_coef * kl
    return loss, stats
