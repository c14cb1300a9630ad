"""What the actor minimises: pure functions of a micro-batch's columns. The critic's is `algo.ppo.value_loss`.

Shapes: N response tokens of a micro-batch. `total` counts the response tokens of the whole optimizer step, over all
ranks and micro-batches; loss and stats are partial sums over it.
"""

from collections.abc import Mapping

from torch import Tensor

from cai_ray.algo.kl import kl_estimate
from cai_ray.algo.masking import partial_mean, zero_masked
from cai_ray.algo.ppo import Stats, importance_weights, policy_loss
from cai_ray.config import PPOConfig

# What `actor_loss` reads besides the actor's own forward pass; the last two only with some options.
ACTOR_COLUMNS = ("old_logprobs", "advantages", "ref_logprobs", "rollout_logprobs")


def actor_loss(
    config: PPOConfig,
    kl_coef: float,
    columns: Mapping[str, Tensor],
    logprobs_N: Tensor,
    entropy_N: Tensor,
    mask_N: Tensor,
    total: Tensor | float,
) -> tuple[Tensor, Stats]:
    """The clipped policy loss, minus the entropy bonus, plus the KL to the reference where that is a loss.

    Responses of an older policy count by the capped ratio of the policy at the start of the step to that one, in the
    policy loss and in the KL.
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
