"""Estimates of the KL divergence to the reference, and the coefficient that weighs it.

Shapes: B sequences, R response tokens. Units: nats.
"""

import math

import torch
from torch import Tensor

from cai_ray.errors import CaiError


def kl_estimate(logprobs_BR: Tensor, ref_logprobs_BR: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(policy ‖ reference) from tokens of the policy, with d = logprobs - ref_logprobs.

    "k1": d; "k2": d²/2; "k3": exp(-d) - 1 + d; "abs": |d| (Schulman, "Approximating KL Divergence", 2020). Nothing is
    capped. As a loss term on policy, k2 has the gradient of the reverse KL and k1 has none in expectation: k1 belongs
    in the reward. Takes no mask: mask both inputs before, or the result after with `zero_masked`.
    """
    d = logprobs_BR.float() - ref_logprobs_BR.float()
    match kind:
        case "k1":
            return d
        case "k2":
            return d.square() / 2
        case "k3":
            return torch.expm1(-d) + d
        case "abs":
            return d.abs()
    raise CaiError(f"got the KL estimate {kind!r}", "use one of k1, k2, k3, abs")


class FixedKL:
    """A KL coefficient that stays as it was set; the face of `AdaptiveKL`."""

    def __init__(self, coef: float):
        self.coef = float(coef)

    def update(self, kl: float, n: int) -> None:
        """Take note of nothing."""


class AdaptiveKL(FixedKL):
    """A KL coefficient steered towards `target` nats per response (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

    Args:
        init: first coefficient.
        target: wanted KL, nats per response.
        horizon: responses over which a clipped error of 0.2 moves the coefficient by a fifth.
    """

    def __init__(self, init: float, target: float, horizon: float):
        if min(init, target, horizon) <= 0:
            raise CaiError(
                f"got init {init}, target {target}, horizon {horizon} for the adaptive KL coefficient",
                "give three positive numbers",
            )
        super().__init__(init)
        self.target, self.horizon = target, horizon

    def update(self, kl: float, n: int) -> None:
        """Move the coefficient by what `n` responses with a mean KL of `kl` nats per response have shown."""
        factor = 1 + min(max(float(kl) / self.target - 1, -0.2), 0.2) * n / self.horizon
        if not math.isfinite(kl) or factor <= 0:
            raise CaiError(
                f"a KL of {kl} nats over {n} responses would multiply the KL coefficient by {factor}",
                "look for NaN in the log-probs; the horizon must exceed a fifth of the responses in one update",
            )
        self.coef *= factor
