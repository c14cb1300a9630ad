"""Log-probs, rewards, advantages and losses of policy-gradient training.

Shapes: B sequences, R response tokens, V vocabulary, H hidden, N tokens. Masks are bool over response tokens. Log-probs
and KL are in nats. `total` is the count of True over all ranks and micro-batches of an optimizer step (None: this
batch's own): losses and stats are partial sums over it, so that adding the parts gives the step's value.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cai_ray.algo.kl import kl_estimate
from cai_ray.algo.masking import partial_mean, zero_masked
from cai_ray.errors import CaiError

Stats = dict[str, Tensor]


def logprobs_from_logits(logits_BRV: Tensor, labels_BR: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs [B, R] of the labels under softmax(logits / temperature), in float32: the plain reference."""
    logprobs_BRV = torch.log_softmax(logits_BRV.float() / temperature, dim=-1)
    return logprobs_BRV.gather(-1, labels_BR.unsqueeze(-1)).squeeze(-1)


def logprobs_from_hidden(
    hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, temperature: float = 1.0, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Log-probs of the labels, and the entropy of softmax(hidden · weightᵀ / temperature), without keeping [N, V].

    The head's product runs in the weight's dtype, as in the model itself; the log-softmax runs in float32. Backward
    computes each chunk again but the last, which is kept. Both results carry gradients to `hidden_NH` and `weight_VH`.

    Args:
        hidden_NH: last hidden states, at the positions that predict the labels.
        weight_VH: the LM head.
        labels_N: token ids in [0, V).
        temperature: what the logits are divided by, as in the sampler.
        chunk: tokens at a time; two float32 buffers of [chunk, V] are the peak, and one waits for the backward pass.

    Returns (logprobs [N], entropy [N]) in float32 nats.
    """
    if temperature <= 0 or chunk < 1 or hidden_NH.shape != (len(labels_N), weight_VH.shape[1]):
        raise CaiError(
            f"got hidden {tuple(hidden_NH.shape)}, weight {tuple(weight_VH.shape)}, labels {tuple(labels_N.shape)}, "
            f"temperature {temperature}, chunk {chunk}",
            "give hidden [N, H], weight [V, H], labels [N], a temperature above 0 and a chunk of at least 1",
        )
    return _HeadLogprobs.apply(hidden_NH, weight_VH, labels_N, temperature, chunk)  # pyright: ignore[reportReturnType]


class _HeadLogprobs(torch.autograd.Function):
    """Chunked linear → log-softmax → (label's log-prob, entropy), with recompute.

    The two [chunk, V] buffers are allocated once: on a CPU fresh pages cost more than the exponentials written to them.
    """

    @staticmethod
    def _chunks(hidden_NH: Tensor, weight_VH: Tensor, temperature: float, parts: list[slice], kept: Tensor | None):
        """Yield (slice, log-probs [n, V], probabilities [n, V]); the next chunk overwrites both.

        `kept`: the first part's log-probs, in a buffer that all parts fit in.
        """
        shape = max((part.stop - part.start for part in parts), default=0), len(weight_VH)
        first = hidden_NH.new_empty(shape, dtype=torch.float32)
        second = torch.empty_like(first) if kept is None else kept
        for part in parts:
            hidden = hidden_NH[part].to(weight_VH.dtype)
            logits, logprobs = first[: len(hidden)], second[: len(hidden)]
            if kept is None:
                if weight_VH.dtype == torch.float32:
                    torch.mm(hidden, weight_VH.T, out=logits)
                else:
                    logits.copy_(hidden @ weight_VH.T)
                torch.log_softmax(logits.div_(temperature), -1, out=logprobs)
            kept = None
            yield part, logprobs, torch.exp(logprobs, out=logits)

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, labels_N, temperature, chunk):
        logprobs_N, entropy_N = (hidden_NH.new_empty(len(hidden_NH), dtype=torch.float32) for _ in range(2))
        n, logprobs = len(hidden_NH), None
        parts = [slice(max(0, end - chunk), end) for end in range(n, 0, -chunk)]  # the last one, which is whole, first
        for part, logprobs, probs in _HeadLogprobs._chunks(hidden_NH, weight_VH, temperature, parts[::-1], None):
            logprobs_N[part] = logprobs.gather(1, labels_N[part, None]).squeeze(1)
            entropy_N[part] = -probs.mul_(logprobs).sum(1)
        ctx.save_for_backward(hidden_NH, weight_VH, labels_N, entropy_N)
        ctx.temperature, ctx.parts, ctx.kept = temperature, parts, logprobs
        ctx.set_materialize_grads(False)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        hidden_NH, weight_VH, labels_N, entropy_N = ctx.saved_tensors
        grad_logprobs_N, grad_entropy_N = grads
        if grad_logprobs_N is None:
            grad_logprobs_N = torch.zeros_like(entropy_N)
        grad_hidden_NH = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        kept, ctx.kept = ctx.kept, None  # overwritten below: a second backward pass computes it too
        for part, logprobs, probs in _HeadLogprobs._chunks(hidden_NH, weight_VH, ctx.temperature, ctx.parts, kept):
            # d logprob / d logits = onehot - p ;  d entropy / d logits = -p (log p + entropy)
            grad_N1 = grad_logprobs_N[part, None]
            if grad_entropy_N is None:
                grad_logits = probs.mul_(-grad_N1)
            else:
                slope_N1 = grad_entropy_N[part, None]
                grad_logits = probs.mul_(logprobs.add_(entropy_N[part, None]).mul_(-slope_N1).sub_(grad_N1))
            grad_logits.scatter_add_(1, labels_N[part, None], grad_N1)
            grad_logits = grad_logits.div_(ctx.temperature).to(weight_VH.dtype)
            if grad_hidden_NH is not None:
                grad_hidden_NH[part] = (grad_logits @ weight_VH).to(hidden_NH.dtype)
            if grad_weight_VH is not None:
                grad_weight_VH += grad_logits.T @ hidden_NH[part].to(weight_VH.dtype)
        return grad_hidden_NH, None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype), None, None, None


def shaped_rewards(
    scores_B: Tensor,
    logprobs_BR: Tensor,
    ref_logprobs_BR: Tensor,
    mask_BR: Tensor,
    kl_coef: float,
    kl: str = "k1",
    score_clip: float | tuple[float, float] | None = None,
    missing_eos_penalty: float = 0.0,
    ended_B: Tensor | None = None,
) -> Tensor:
    """Per-token rewards [B, R]: -kl_coef·KL on every response token, plus the sequence's score on its last one.

    The score first loses `missing_eos_penalty` where the response did not end (`ended_B` False), then is clipped to
    ±`score_clip`, or to the pair (low, high). A row without a response token is an error: its score has no place.
    """
    if missing_eos_penalty and ended_B is None:
        raise CaiError("got a missing-EOS penalty without ended_B", "pass which responses ended, or no penalty")
    if not bool(mask_BR.any(dim=1).all()):
        raise CaiError("a row of the mask has no response token to carry its score", "leave empty responses out")
    scores_B = scores_B.float()
    if ended_B is not None:
        scores_B = torch.where(ended_B, scores_B, scores_B - missing_eos_penalty)
    if score_clip is not None:
        scores_B = scores_B.clamp(*score_clip if isinstance(score_clip, tuple) else (-score_clip, score_clip))
    kl_BR = kl_estimate(zero_masked(logprobs_BR, mask_BR), zero_masked(ref_logprobs_BR, mask_BR), kl)
    last_B = mask_BR.shape[1] - 1 - mask_BR.flip(1).int().argmax(dim=1)
    return (-kl_coef * kl_BR).scatter_add(1, last_B[:, None], scores_B[:, None])


def gae(
    rewards_BR: Tensor, values_BR: Tensor, mask_BR: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438): (advantages, returns), both [B, R].

    The value after the last response token is 0, whatever the critic says there; the state carries across masked gaps.
    Returns are advantages + values, before any whitening.
    """
    rewards_BR, values_BR = zero_masked(rewards_BR, mask_BR), zero_masked(values_BR, mask_BR)
    advantages_BR = torch.zeros_like(rewards_BR)
    next_value_B = advantage_B = rewards_BR.new_zeros(len(rewards_BR))
    for t in reversed(range(rewards_BR.shape[1])):
        mask_B, value_B = mask_BR[:, t], values_BR[:, t]
        delta_B = rewards_BR[:, t] + gamma * next_value_B - value_B
        advantage_B = torch.where(mask_B, delta_B + gamma * gae_lambda * advantage_B, advantage_B)
        next_value_B = torch.where(mask_B, value_B, next_value_B)
        advantages_BR[:, t] = torch.where(mask_B, advantage_B, 0.0)
    return advantages_BR, advantages_BR + values_BR


def group_advantages(scores_B: Tensor, group_size: int, kind: str) -> Tensor:
    """One advantage per response [B] from the scores of its group, `group_size` rows that follow one another.

    "rloo": score minus the mean of the others (Ahmadian et al. 2024, arXiv 2402.14740); "grpo": (score - mean) /
    (unbiased std + 1e-6) (Shao et al. 2024, arXiv 2402.03300).
    """
    if group_size < 2 or len(scores_B) % group_size:
        raise CaiError(
            f"got {len(scores_B)} scores in groups of {group_size}", "a group has at least two responses, and is whole"
        )
    scores = scores_B.float().reshape(-1, group_size)
    centered = scores - scores.mean(dim=1, keepdim=True)
    match kind:
        case "rloo":
            return (centered * (group_size / (group_size - 1))).reshape(-1)
        case "grpo":
            return (centered / (scores.std(dim=1, keepdim=True) + 1e-6)).reshape(-1)
    raise CaiError(f"got the group advantage {kind!r}", "use rloo or grpo")


def policy_loss(
    logprobs_BR: Tensor,
    old_logprobs_BR: Tensor,
    advantages_BR: Tensor,
    mask_BR: Tensor,
    clip_range: float | tuple[float, float],
    dual_clip: float | None = None,
    weights_BR: Tensor | None = None,
    total: Tensor | float | None = None,
) -> tuple[Tensor, Stats]:
    """PPO's clipped loss max(-r·A, -clip(r)·A) over response tokens (Schulman et al. 2017, arXiv 1707.06347).

    Args:
        logprobs_BR: of the policy under training; the only input that receives a gradient.
        old_logprobs_BR: of the policy at the start of the step; log r = logprobs - old, held within ±20.
        advantages_BR: A, whitened over the global batch.
        mask_BR: the response tokens. An all-False mask gives loss 0 with zero gradients.
        clip_range: r is clipped to [1 - c, 1 + c], or with (low, high) to [1 - low, 1 + high].
        dual_clip: c > 1 bounds the loss at -c·A where A < 0 (Ye et al. 2020, arXiv 1912.09729).
        weights_BR: factor of each token's loss, as from `importance_weights`.
        total: see the top of the file.

    Returns the loss and the detached stats loss, approx_kl (k3 of KL(old ‖ new)), clipfrac (tokens whose loss is the
    clipped one).
    """
    if dual_clip is not None and dual_clip <= 1:
        raise CaiError(f"got dual_clip {dual_clip}", "give a number above 1, or none")
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    advantages_BR = zero_masked(advantages_BR.detach(), mask_BR)
    log_ratio_BR = _log_ratio(logprobs_BR, old_logprobs_BR.detach(), mask_BR)
    ratio_BR = log_ratio_BR.exp()
    plain_BR = -ratio_BR * advantages_BR
    clipped_BR = -ratio_BR.clamp(1 - low, 1 + high) * advantages_BR
    loss_BR = torch.maximum(plain_BR, clipped_BR)
    if dual_clip is not None:
        bound_BR = torch.where(advantages_BR < 0, -dual_clip * advantages_BR, math.inf)
        loss_BR = torch.minimum(loss_BR, bound_BR)
    if weights_BR is not None:
        loss_BR = loss_BR * zero_masked(weights_BR.detach(), mask_BR)
    loss = partial_mean(loss_BR, mask_BR, total)
    stats = {
        "loss": loss.detach(),
        "approx_kl": partial_mean(torch.expm1(log_ratio_BR.detach()) - log_ratio_BR.detach(), mask_BR, total),
        "clipfrac": partial_mean(clipped_BR > plain_BR, mask_BR, total),
    }
    return loss, stats


def value_loss(
    values_BR: Tensor,
    old_values_BR: Tensor,
    returns_BR: Tensor,
    mask_BR: Tensor,
    value_clip_range: float | None = None,
    total: Tensor | float | None = None,
) -> tuple[Tensor, Stats]:
    """Half the squared error to the returns; with `value_clip_range` c the larger one of v and v held to old ± c.

    Returns the loss and the detached stats loss and clipfrac (tokens whose loss is the clipped one).
    """
    values_BR, old_values_BR, returns_BR = (
        zero_masked(x, mask_BR) for x in (values_BR, old_values_BR.detach(), returns_BR.detach())
    )
    plain_BR = clipped_BR = (values_BR - returns_BR).square() / 2
    if value_clip_range is not None:
        held_BR = old_values_BR + (values_BR - old_values_BR).clamp(-value_clip_range, value_clip_range)
        clipped_BR = (held_BR - returns_BR).square() / 2
    loss = partial_mean(torch.maximum(plain_BR, clipped_BR), mask_BR, total)
    return loss, {"loss": loss.detach(), "clipfrac": partial_mean(clipped_BR > plain_BR, mask_BR, total)}


def nll_loss(logprobs_BR: Tensor, mask_BR: Tensor, total: Tensor | float | None = None) -> tuple[Tensor, Stats]:
    """Mean negative log-prob of the True tokens (supervised learning), and the detached stat loss."""
    loss = -partial_mean(logprobs_BR, mask_BR, total)
    return loss, {"loss": loss.detach()}


def importance_weights(old_logprobs_BR: Tensor, rollout_logprobs_BR: Tensor, mask_BR: Tensor, cap: float) -> Tensor:
    """min(exp(old - rollout), cap) [B, R]: what the sampler's own numerics are off by; 0 under the mask."""
    if cap <= 0:
        raise CaiError(f"got the cap {cap} for importance weights", "give a number above 0")
    return zero_masked(_log_ratio(old_logprobs_BR, rollout_logprobs_BR, mask_BR).exp().clamp(max=cap), mask_BR)


def _log_ratio(logprobs_BR: Tensor, base_logprobs_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """logprobs - base, 0 under the mask, held within ±20: its exponential stays finite."""
    return (zero_masked(logprobs_BR, mask_BR) - zero_masked(base_logprobs_BR, mask_BR)).clamp(-20, 20)
