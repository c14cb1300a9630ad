"""Soft labels from a feedback model, and the preference model's loss.

Shapes: N pairs. Probabilities are those of A (the first answer of the row) being the better one.
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cai_ray.algo.masking import partial_mean, zero_masked
from cai_ray.errors import CaiError

# Labels are made row by row from numbers, and in batches from tensors: what goes in comes out. A number stays in double
# precision, because a label clamped to 0.6 has to be 0.6 when it is written.
Number = TypeVar("Number", float, Tensor)


def choice_probability(logprob_a: Number, logprob_b: Number) -> Number:
    """P(A) of the softmax over two choices' log-probs (nats): float32 tensors, or a number from numbers.

    Where neither choice has a probability (both -inf, or NaN) there is no answer, and that is an error, never a guess.
    """
    if isinstance(logprob_a, Tensor) and isinstance(logprob_b, Tensor):
        prob = torch.sigmoid(logprob_a.float() - logprob_b.float())
        if not prob.isnan().any():
            return prob
    else:
        prob = float(torch.sigmoid(torch.tensor(logprob_a - logprob_b, dtype=torch.float64)))
        if prob == prob:
            return prob
    raise CaiError(
        "neither choice has a finite log-prob, so there is no preference to read",
        "check the choices' tokens; quarantine the row",
    )


def swap_average(prob_ab: Number, prob_ba: Number) -> Number:
    """P(A better) from both orders: `prob_ab` = P(A | A shown first), `prob_ba` = P(first | B shown first).

    What a position alone earns cancels: a judge that always prefers the first answer gives 1/2.
    """
    return (prob_ab + (1 - prob_ba)) / 2


def clamp_probability(p: Number, low: float, high: float) -> Number:
    """`p` held within [low, high]; Bai et al. 2022 (arXiv 2212.08073, section 4.1) use [0.4, 0.6] after CoT."""
    if not 0 <= low <= high <= 1:
        raise CaiError(f"got the clamp [{low}, {high}]", "give 0 <= low <= high <= 1")
    return p.float().clamp(low, high) if isinstance(p, Tensor) else min(max(p, low), high)


def preference_loss(
    score_a: Tensor,
    score_b: Tensor,
    target_prob: Tensor,
    margin: Tensor | float | None = None,
    center_coef: float = 0.0,
    weights: Tensor | None = None,
    total: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-[p logσ(a-b) + (1-p) logσ(b-a)] + center_coef·(a+b)², averaged over pairs. All tensors have shape [N].

    Args:
        score_a: scores of the first answers; score_b those of the second.
        target_prob: P(A better), soft or 0/1.
        margin: what the better answer's lead has to exceed; subtracted from a-b and from b-a.
        center_coef: weight of the term that holds the scores around zero.
        weights: factor of each pair's whole loss; a pair of weight 0 is absent, whatever it holds.
        total: pairs (of weight other than 0) over all ranks and micro-batches; None: those given here.

    Returns the loss and the detached stats loss, accuracy (the higher score is on the label's side; a tie is half) and
    margin (score of the label's side minus that of the other). All are partial sums over `total`.
    """
    weights = torch.ones_like(score_a) if weights is None else weights.detach()
    present = weights != 0
    a, b, p = (zero_masked(x, present) for x in (score_a, score_b, target_prob.detach()))
    gap = a - b
    lead = 0.0 if margin is None else zero_masked(torch.as_tensor(margin, device=gap.device).expand_as(gap), present)
    losses = -(p * F.logsigmoid(gap - lead) + (1 - p) * F.logsigmoid(-gap - lead)) + center_coef * (a + b).square()
    loss = partial_mean(zero_masked(weights, present) * losses, present, total)
    side = torch.sign(p - 0.5) * gap.detach()
    stats = {
        "loss": loss.detach(),
        "accuracy": partial_mean((torch.sign(side) + 1) / 2, present, total),
        "margin": partial_mean(side, present, total),
    }
    return loss, stats


def expected_calibration_error(prob: Tensor, label: Tensor, bins: int = 10) -> Tensor:
    """Mean distance between stated and observed probability over `bins` equal bins (Guo et al. 2017, arXiv 1706.04599).

    Args:
        prob: [N] stated P(A better) in [0, 1]; a bin holds its lower edge, the last one also 1.
        label: [N] what was observed, 0/1 or soft.
        bins: number of bins.

    Returns a float32 scalar, 0 for no pairs.
    """
    prob, label = (torch.as_tensor(x, dtype=torch.float32) for x in (prob, label))
    bin_of = (prob * bins).long().clamp(0, bins - 1)
    return torch.zeros(bins, device=prob.device).index_add(0, bin_of, prob - label).abs().sum() / max(len(prob), 1)
