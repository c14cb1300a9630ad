"""Goldens are worked in the comments; no mean, variance or whitening may depend on what lies under the mask."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_ray.algo.masking import (
    combine_moments,
    masked_mean,
    masked_moments,
    masked_var,
    masked_whiten,
    partial_mean,
    zero_masked,
)
from cai_ray.errors import CaiError

NAN, INF = math.nan, math.inf
close = torch.testing.assert_close
quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10_000)


def draw(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) < 0.6


def test_mean_over_all_and_along_a_dimension():
    x = torch.tensor([[1.0, 2.0, NAN], [4.0, INF, -INF], [NAN, NAN, NAN]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    close(masked_mean(x, mask), torch.tensor(7 / 3))
    close(masked_mean(x, mask, dim=1), torch.tensor([1.5, 4.0, 0.0]))
    close(masked_mean(x, mask, dim=(0, 1)), torch.tensor(7 / 3))


def test_variance():
    x, mask = torch.tensor([1.0, 2.0, 4.0, NAN]), torch.tensor([True, True, True, False])
    # deviations from 7/3: -4/3, -1/3, 5/3; squares sum to 42/9
    close(masked_var(x, mask), torch.tensor(42 / 9 / 2))
    close(masked_var(x, mask, unbiased=False), torch.tensor(42 / 9 / 3))


@pytest.mark.parametrize("trues", [0, 1])
def test_fewer_than_two_trues(trues):
    x = torch.full((4,), NAN)
    x[:trues] = 5.0
    mask = torch.arange(4) < trues
    assert masked_mean(x, mask) == 5.0 * trues
    assert masked_var(x, mask) == 0
    assert masked_var(x, mask, unbiased=False) == 0
    assert masked_moments(x, mask) == (trues, 5.0 * trues, 0)
    close(masked_whiten(x, mask), torch.zeros(4))


def test_bfloat16_is_summed_in_float32():
    x, mask = torch.tensor([256.0, 1.0], dtype=torch.bfloat16), torch.tensor([True, True])
    # bfloat16 would round the mean 128.5 to 128 and the deviations with it: 2 · 127.5² = 32512.5
    assert masked_mean(x, mask) == 128.5
    assert masked_var(x, mask) == 32512.5
    assert masked_moments(x, mask) == (2, 128.5, 32512.5)
    assert masked_whiten(x, mask).dtype == torch.float32


@pytest.mark.parametrize("mask", [torch.ones(2, 3), torch.ones(2, 3).long(), torch.ones(2, 1).bool()])
def test_a_mask_that_is_no_bool_or_broadcasts_is_refused(mask):
    with pytest.raises(CaiError, match="mask"):
        masked_mean(torch.zeros(2, 3), mask)


def test_moments_combine():
    x, mask = torch.tensor([1.0, 2.0, NAN, 4.0]), torch.tensor([True, True, False, True])
    parts = [masked_moments(x[:3], mask[:3]), masked_moments(x[3:], mask[3:])]
    # (2, 1.5, 0.5) and (1, 4, 0): m2 = 0.5 + 2·(5/6)² + (5/3)² = 14/3
    assert parts[0] == (2, 1.5, 0.5)
    assert parts[1] == (1, 4, 0)
    for whole in (combine_moments(parts), combine_moments([(2, 1.5, 0.5), (1, 4.0, 0.0), (0, 0.0, 0.0)])):
        assert [float(value) for value in whole] == pytest.approx([3, 7 / 3, 14 / 3])
    assert combine_moments([]) == (0, 0, 0)


def test_whiten():
    x, mask = torch.tensor([1.0, 3.0, NAN]), torch.tensor([True, True, False])
    # mean 2, unbiased variance 2
    close(masked_whiten(x, mask), torch.tensor([-1 / math.sqrt(2), 1 / math.sqrt(2), 0]))
    close(masked_whiten(x, mask, center=False), torch.tensor([2 - 1 / math.sqrt(2), 2 + 1 / math.sqrt(2), 0]))


def test_whitening_before_ranks_are_combined_is_another_result():
    ranks, mask = [torch.tensor([1.0, 3.0]), torch.tensor([5.0, 7.0])], torch.tensor([True, True])
    moments = combine_moments([masked_moments(x, mask) for x in ranks])
    # together: mean 4, squares 9 + 1 + 1 + 9, unbiased variance 20/3
    together = torch.cat([masked_whiten(x, mask, moments=moments) for x in ranks])
    close(together, torch.tensor([-3.0, -1.0, 1.0, 3.0]) / math.sqrt(20 / 3))
    alone = torch.cat([masked_whiten(x, mask) for x in ranks])
    close(alone, torch.tensor([-1.0, 1.0, -1.0, 1.0]) / math.sqrt(2))


@quick
@given(seeds, st.integers(1, 7), st.integers(1, 9))
def test_any_split_over_ranks_whitens_as_the_whole(seed, batch, tokens):
    x, mask = draw(seed, batch, tokens)
    cut = seed % (batch + 1)
    moments = combine_moments(masked_moments(x[part], mask[part]) for part in (slice(cut), slice(cut, None)))
    parts = [masked_whiten(x[part], mask[part], moments=moments) for part in (slice(cut), slice(cut, None))]
    close(torch.cat(parts), masked_whiten(x, mask), atol=1e-5, rtol=1e-5)


@quick
@given(seeds, st.integers(1, 5), st.integers(1, 6), st.sampled_from([NAN, INF, -INF, 1e30]))
def test_what_lies_under_the_mask_reaches_no_value_and_no_gradient(seed, batch, tokens, poison):
    clean, mask = draw(seed, batch, tokens)
    dirty = torch.where(mask, clean, poison)
    for function in (masked_mean, masked_var, masked_whiten, zero_masked, lambda x, m: partial_mean(x, m, 7)):
        grads = []
        for x in (clean.clone().requires_grad_(), dirty.clone().requires_grad_()):
            out = function(x, mask)
            out.square().sum().backward()
            grads.append((out, x.grad))
        close(grads[0], grads[1])
        assert (grads[1][1][~mask] == 0).all()
    padded = torch.cat([clean, torch.full((batch, 3), poison)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros(batch, 3, dtype=torch.bool)], dim=1)
    close(masked_mean(padded, padded_mask), masked_mean(clean, mask))
    close(masked_var(padded, padded_mask), masked_var(clean, mask))
    close(masked_whiten(padded, padded_mask)[:, :tokens], masked_whiten(clean, mask))


def test_the_smallest_variance_has_1e_8_added():
    # unbiased variance 2e-8: √(2e-8 + 1e-8) = √3·1e-4
    x, mask = torch.tensor([1e-4, -1e-4]), torch.tensor([True, True])
    close(masked_whiten(x, mask), torch.tensor([1.0, -1.0]) / math.sqrt(3))


def test_one_true_of_many_parts_counts_once():
    # one token of a step of one: the divisor is 1, not 2; without any it is 1 as well
    x = torch.tensor([3.0, NAN])
    close(partial_mean(x, torch.tensor([True, False]), None), torch.tensor(3.0))
    close(partial_mean(x, torch.tensor([True, False]), 1), torch.tensor(3.0))
    close(partial_mean(x, torch.tensor([False, False]), 0), torch.tensor(0.0))
    close(masked_var(torch.tensor([1.0, 3.0]), torch.tensor([True, True])), torch.tensor(2.0))
    close(masked_whiten(torch.tensor([1.0, 3.0]), torch.tensor([True, True])).square().sum(), torch.tensor(1.0))
    assert combine_moments([(1.0, 5.0, 0.0)]) == (1, 5, 0)
    assert combine_moments([(0.0, 0.0, 0.0)]) == (0, 0, 0)


@quick
@given(seeds, st.integers(1, 20))
def test_moments_do_not_depend_on_the_order(seed, n):
    x, mask = draw(seed, n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    close(masked_moments(x[order], mask[order]), masked_moments(x, mask), atol=1e-5, rtol=1e-5)
