"""KL estimates and the adaptive coefficient against TRL, OpenRLHF and verl."""

from types import SimpleNamespace as Peer

import pytest
import torch

from cai_ray.algo.kl import AdaptiveKL, kl_estimate
from tests.parity.conftest import agree


def of(estimate: torch.Tensor, logprobs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An estimate and the gradient of its sum."""
    return estimate.detach(), torch.autograd.grad(estimate.sum(), logprobs)[0]


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs"])
def test_estimates_and_their_gradients(openrlhf: Peer, verl: Peer, batch: Peer, kind: str) -> None:
    x = batch.logprobs.requires_grad_()
    ours = of(kl_estimate(x, batch.ref, kind), x)
    agree(ours, of(verl.core.kl_penalty_forward(x, batch.ref, kind), x))
    if kind != "abs":  # which OpenRLHF has not
        agree(ours, of(openrlhf.utils.compute_approx_kl(x, batch.ref, kl_estimator=kind), x))


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_trl_has_k1_and_k3(trl: Peer, batch: Peer, kind: str) -> None:
    args = Peer(kl_estimator=kind)
    block = trl.block(trl.train, "logr = ", "kl = -logr", logprobs=batch.logprobs, ref_logprobs=batch.ref, args=args)
    agree(kl_estimate(batch.logprobs, batch.ref, kind), block.kl)


def test_difference_openrlhf_holds_every_estimate_within_10_and_verl_k3(openrlhf: Peer, verl: Peer) -> None:
    x, zero = torch.tensor([15.0]), torch.zeros(1)
    assert kl_estimate(x, zero, "k1") == verl.core.kl_penalty_forward(x, zero, "k1") == 15
    assert openrlhf.utils.compute_approx_kl(x, zero, kl_estimator="k1") == 10
    assert kl_estimate(x, zero, "k3") > 13.9
    assert openrlhf.utils.compute_approx_kl(x, zero, kl_estimator="k3") == 10
    assert verl.core.kl_penalty_forward(x, zero, "k3") == 10


def test_the_adaptive_coefficient(openrlhf: Peer, verl: Peer) -> None:
    ours, others = (
        AdaptiveKL(0.1, 6.0, 1000),
        [
            openrlhf.kl.AdaptiveKLController(0.1, 6.0, 1000),
            verl.core.AdaptiveKLController(0.1, 6.0, 1000),
        ],
    )
    for kl, n in ((12.0, 100), (6.5, 64), (0.5, 256), (-1.0, 10)):
        for controller in (ours, *others):
            controller.update(kl, n)
        for other in others:
            assert ours.coef == pytest.approx(other.value, rel=1e-12)
