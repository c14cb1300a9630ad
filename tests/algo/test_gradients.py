"""Autograd against finite differences, for every function of `algo` through which a gradient may flow."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cai_ray.algo import kl, masking, ppo, preference

STEP = 2e-3
RANDOM = torch.Generator().manual_seed(0)
X, Y, Z, W = torch.randn(4, 3, 4, generator=RANDOM)
MASK = torch.tensor([[True, True, False, True], [True, False, False, False], [True, True, True, True]])
LABELS = torch.tensor([[1, 0, 2, 4], [3, 3, 1, 0], [4, 2, 2, 1]])
LOGITS, HEAD = torch.randn(3, 4, 5, generator=RANDOM), torch.randn(5, 4, generator=RANDOM)
SCORES = torch.tensor([1.0, -2.0, 0.5, 3.0])
MOMENTS = (8.0, 0.2, 5.0)

# Every function with one argument set free; each has a result of any shape, which is weighed to make a number.
FREE: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "zero_masked": (lambda x: masking.zero_masked(x, MASK), X),
    "partial_mean": (lambda x: masking.partial_mean(x, MASK, 5), X),
    "masked_mean": (lambda x: masking.masked_mean(x, MASK), X),
    "masked_mean of rows": (lambda x: masking.masked_mean(x, MASK, dim=1), X),
    "masked_var": (lambda x: masking.masked_var(x, MASK), X),
    "masked_var, biased": (lambda x: masking.masked_var(x, MASK, unbiased=False), X),
    "masked_whiten": (lambda x: masking.masked_whiten(x, MASK, moments=MOMENTS), X),
    "masked_whiten, not centred": (lambda x: masking.masked_whiten(x, MASK, False, MOMENTS), X),
    **{f"kl {kind}": (lambda x, kind=kind: kl.kl_estimate(x, Y, kind), X) for kind in ("k1", "k2", "k3", "abs")},
    **{f"kl {kind} of ref": (lambda x, kind=kind: kl.kl_estimate(Y, x, kind), X) for kind in ("k1", "k2", "k3")},
    "logprobs_from_logits": (lambda x: ppo.logprobs_from_logits(x, LABELS, 0.7), LOGITS),
    "hidden states": (lambda x: torch.stack(ppo.logprobs_from_hidden(x, HEAD, LABELS[0], 0.7, 3)), Y.repeat(2, 1)[:4]),
    "head": (lambda x: torch.stack(ppo.logprobs_from_hidden(Y, x, LABELS[0, :3], 0.7, 2)), HEAD),
    "scores": (lambda x: ppo.shaped_rewards(x[:3], X, Y, MASK, 0.3, score_clip=(-1.5, 2.5)), SCORES),
    "rewarded log-probs": (lambda x: ppo.shaped_rewards(SCORES[:3], x, Y, MASK, 0.3, "k3"), X),
    "gae of rewards": (lambda x: torch.stack(ppo.gae(x, Y, MASK, 0.9, 0.8)), X),
    "gae of values": (lambda x: torch.stack(ppo.gae(Y, x, MASK, 0.9, 0.8)), X),
    "rloo": (lambda x: ppo.group_advantages(x, 2, "rloo"), SCORES),
    "grpo": (lambda x: ppo.group_advantages(x, 4, "grpo"), SCORES),
    "policy_loss": (lambda x: ppo.policy_loss(x, Y, Z, MASK, (0.1, 0.3), 2.0, W.exp())[0], X),
    "value_loss": (lambda x: ppo.value_loss(x, Y, Z, MASK, 0.2)[0], X),
    "value_loss, not clipped": (lambda x: ppo.value_loss(x, Y, Z, MASK)[0], X),
    "nll_loss": (lambda x: ppo.nll_loss(x, MASK, 9)[0], X),
    "importance_weights": (lambda x: ppo.importance_weights(x, Y, MASK, 1.5), X),
    "choice_probability": (lambda x: preference.choice_probability(x, Y), X),
    "swap_average": (lambda x: preference.swap_average(x.sigmoid(), Y.sigmoid()), X),
    "swap_average, other order": (lambda x: preference.swap_average(Y.sigmoid(), x.sigmoid()), X),
    "clamp_probability": (lambda x: preference.clamp_probability(x.sigmoid(), 0.3, 0.6), X),
    "first scores": (lambda x: preference.preference_loss(x, Y[0], W[0].sigmoid(), 0.3, 0.1, W[1].exp())[0], X[0]),
    "second scores": (lambda x: preference.preference_loss(Y[0], x, W[0].sigmoid(), 0.3, 0.1, W[1].exp())[0], X[0]),
}


@pytest.mark.parametrize("name", FREE)
def test_gradients_are_finite_differences(name: str) -> None:
    function, x = FREE[name]
    weights = torch.randn(function(x).shape, generator=torch.Generator().manual_seed(1))

    def number(x: Tensor) -> Tensor:
        return (function(x) * weights).sum()

    free = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(number(free), free)
    around = torch.eye(x.numel()).reshape(-1, *x.shape) * STEP
    slopes = torch.stack([(number(x + d).double() - number(x - d).double()) / (2 * STEP) for d in around])
    # Float32 rounds a result of order 1 to 1e-7, which the step makes 3e-5; curvature adds less.
    torch.testing.assert_close(gradient, slopes.float().reshape(x.shape), rtol=5e-3, atol=1e-3)
    assert gradient.abs().max() > 0.01


# What is a target, a weight or a baseline carries no gradient, whoever forgets to detach it.
FIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "old log-probs": lambda x: ppo.policy_loss(Y.clone().requires_grad_(), x, Z, MASK, 0.2)[0],
    "advantages": lambda x: ppo.policy_loss(Y.clone().requires_grad_(), Z, x, MASK, 0.2)[0],
    "weights": lambda x: ppo.policy_loss(Y.clone().requires_grad_(), Z, W, MASK, 0.2, weights_BR=x)[0],
    "old values": lambda x: ppo.value_loss(Y.clone().requires_grad_(), x, Z, MASK, 0.2)[0],
    "returns": lambda x: ppo.value_loss(Y.clone().requires_grad_(), Z, x, MASK, 0.2)[0],
    "target": lambda x: preference.preference_loss(Y[0].clone().requires_grad_(), Z[0], x[0])[0],
    "pair weights": lambda x: preference.preference_loss(
        Y[0].clone().requires_grad_(), Z[0], W[0].sigmoid(), weights=x[0]
    )[0],
}


@pytest.mark.parametrize("name", FIXED)
def test_targets_weights_and_baselines_receive_no_gradient(name: str) -> None:
    x = X.clone().requires_grad_()
    FIXED[name](x).backward()
    assert x.grad is None


def test_no_gradient_flows_through_mean_and_variance_of_whitening() -> None:
    x = X.clone().requires_grad_()
    masking.masked_whiten(x, MASK).sum().backward()
    n, _, m2 = masking.masked_moments(X, MASK)
    torch.testing.assert_close(x.grad, torch.where(MASK, (m2 / (n - 1)) ** -0.5, 0.0))
