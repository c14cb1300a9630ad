"""Means, variances and whitening against TRL, OpenRLHF and verl."""

import math
from types import SimpleNamespace as Peer

import pytest
import torch

from cai_ray.algo.masking import masked_mean, masked_var, masked_whiten
from tests.parity.conftest import agree


def test_means(trl: Peer, openrlhf: Peer, verl: Peer, batch: Peer) -> None:
    x, mask = batch.values, batch.gaps
    for peer in (trl.ppo, openrlhf.utils, verl.functional):
        agree(masked_mean(x, mask), peer.masked_mean(x, mask))
        agree(masked_mean(x, mask, dim=1), peer.masked_mean(x, mask, 1))


@pytest.mark.parametrize("unbiased", [True, False])
def test_variances(trl: Peer, verl: Peer, batch: Peer, unbiased: bool) -> None:
    for peer in (trl.ppo, verl.functional):
        agree(masked_var(batch.values, batch.gaps, unbiased), peer.masked_var(batch.values, batch.gaps, unbiased))


@pytest.mark.parametrize("center", [True, False])
def test_whitening(trl: Peer, verl: Peer, batch: Peer, center: bool) -> None:
    ours = masked_whiten(batch.values, batch.gaps, center)
    for peer in (trl.ppo, verl.functional):
        agree(ours[batch.gaps], peer.masked_whiten(batch.values, batch.gaps, center)[batch.gaps])


def test_difference_trl_and_openrlhf_multiply_by_the_mask_so_that_nan_under_it_spoils_the_mean(
    trl: Peer, openrlhf: Peer, verl: Peer
) -> None:
    x, mask = torch.tensor([1.0, math.nan]), torch.tensor([True, False])
    assert masked_mean(x, mask) == 1
    assert verl.functional.masked_mean(x, mask) == 1
    assert trl.ppo.masked_mean(x, mask).isnan()
    assert openrlhf.utils.masked_mean(x, mask).isnan()


def test_difference_without_a_true_trl_and_openrlhf_give_nan_and_we_give_0(trl: Peer, openrlhf: Peer) -> None:
    x, mask = torch.ones(2), torch.zeros(2, dtype=torch.bool)
    assert masked_mean(x, mask) == 0
    assert trl.ppo.masked_mean(x, mask).isnan()
    assert openrlhf.utils.masked_mean(x, mask).isnan()


def test_difference_one_true_has_no_variance_in_trl_and_verl_and_variance_0_here(trl: Peer, verl: Peer) -> None:
    x, mask = torch.ones(2), torch.tensor([True, False])
    assert masked_var(x, mask) == 0
    assert trl.ppo.masked_var(x, mask).isnan()
    with pytest.raises(ValueError, match="mask is one"):
        verl.functional.masked_var(x, mask)


def test_difference_trl_and_verl_leave_something_under_the_mask_after_whitening(
    trl: Peer, verl: Peer, batch: Peer
) -> None:
    assert (masked_whiten(batch.values, batch.gaps)[~batch.gaps] == 0).all()
    for peer in (trl.ppo, verl.functional):
        assert (peer.masked_whiten(batch.values, batch.gaps)[~batch.gaps] != 0).any()
