"""The preference loss against TRL and OpenRLHF."""

from types import SimpleNamespace as Peer

import pytest
import torch

from cai_ray.algo.preference import preference_loss
from tests.parity.conftest import agree


@pytest.fixture
def pairs() -> Peer:
    a, b, margin = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    return Peer(a=a.requires_grad_(), b=b, margin=margin, one=torch.ones(16))


def of(loss: torch.Tensor, pairs: Peer) -> tuple[torch.Tensor, torch.Tensor]:
    return loss.detach(), torch.autograd.grad(loss, pairs.a)[0]


@pytest.mark.parametrize("with_margin", [False, True])
def test_hard_labels_of_openrlhf(openrlhf: Peer, pairs: Peer, with_margin: bool) -> None:
    margin = pairs.margin if with_margin else None
    ours = preference_loss(pairs.a, pairs.b, pairs.one, margin)[0]
    agree(of(ours, pairs), of(openrlhf.loss.PairWiseLoss()(pairs.a, pairs.b, margin), pairs))
    if margin is None:
        agree(
            of(preference_loss(pairs.a, pairs.b, pairs.one)[0], pairs),
            of(openrlhf.loss.LogExpLoss()(pairs.a, pairs.b), pairs),
        )


@pytest.mark.parametrize("center", [None, 0.05])
@pytest.mark.parametrize("with_margin", [False, True])
def test_trl(trl: Peer, pairs: Peer, with_margin: bool, center: float | None) -> None:
    block = trl.block(
        trl.reward.RewardTrainer.compute_loss,
        'if "margin" in inputs',
        "loss += self.args.center_rewards_coefficient",
        rewards_chosen=pairs.a,
        rewards_rejected=pairs.b,
        inputs={"margin": pairs.margin} if with_margin else {},
        self=Peer(args=Peer(center_rewards_coefficient=center)),
    )
    margin = pairs.margin if with_margin else None
    ours = preference_loss(pairs.a, pairs.b, pairs.one, margin, center or 0.0)[0]
    agree(of(ours, pairs), of(block.loss, pairs))


def test_soft_labels_are_the_label_smoothing_of_conservative_dpo(openrlhf: Peer, pairs: Peer) -> None:
    zero = torch.zeros(16)
    for p in (0.5, 0.6, 0.93, 1.0):
        theirs = openrlhf.loss.DPOLoss(beta=1.0, label_smoothing=1 - p)(pairs.a, pairs.b, zero, zero)[0]
        agree(of(preference_loss(pairs.a, pairs.b, p * pairs.one)[0], pairs), of(theirs, pairs))


def test_difference_a_hard_label_keeps_pulling_where_a_soft_one_is_met(openrlhf: Peer, pairs: Peer) -> None:
    p = torch.sigmoid(pairs.a - pairs.b).detach()
    agree(of(preference_loss(pairs.a, pairs.b, p)[0], pairs)[1], torch.zeros(16))
    assert (of(openrlhf.loss.PairWiseLoss()(pairs.a, pairs.b), pairs)[1] < 0).all()
