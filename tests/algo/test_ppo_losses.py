"""Policy, value and supervised losses: goldens by hand, partial sums over `total`, and no trace of padding."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_ray.algo.ppo import importance_weights, nll_loss, policy_loss, value_loss
from cai_ray.errors import CaiError

NAN, INF = math.nan, math.inf
close = torch.testing.assert_close
quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10_000)


def row(*values):
    return torch.tensor([values], dtype=torch.float32)


def policy(ratios, advantages, clip_range=0.2, **options):
    """Loss and stats for given probability ratios, all tokens counting."""
    ratios = row(*ratios)
    return policy_loss(ratios.log(), torch.zeros_like(ratios), row(*advantages), ratios > 0, clip_range, **options)


def losses(logprobs, old, targets, weights, mask, total=None):
    """Every loss on the same tensors: (loss, stats) by name."""
    return {
        "policy": policy_loss(logprobs, old, targets, mask, (0.1, 0.3), 2.0, weights, total),
        "value": value_loss(logprobs, old, targets, mask, 0.2, total),
        "value, not clipped": value_loss(logprobs, old, targets, mask, None, total),
        "nll": nll_loss(logprobs, mask, total),
    }


def draw(seed, batch, tokens):
    generator = torch.Generator().manual_seed(seed)
    tensors = torch.randn(4, batch, tokens, generator=generator)
    return [*tensors[:3], tensors[3].exp()], torch.rand(batch, tokens, generator=generator) < 0.6


def test_policy_loss_by_hand():
    # r = 2, A = 1: max(-2, -1.2), clipped.  r = 0.5, A = 1: max(-0.5, -0.8).  r = 1.1, A = -1: 1.1 both
    loss, stats = policy([2.0, 0.5, 1.1], [1.0, 1.0, -1.0])
    close(loss, torch.tensor((-1.2 - 0.5 + 1.1) / 3))
    close(stats["loss"], loss)
    close(stats["clipfrac"], torch.tensor(1 / 3))
    # r - 1 - ln r: 1 - 0.693147, -0.5 + 0.693147, 0.1 - 0.095310
    close(stats["approx_kl"], torch.tensor((0.306853 + 0.193147 + 0.004690) / 3), atol=1e-6, rtol=1e-5)


def test_unequal_clip_range():
    # [0.6, 1.28]. r = 2, A = 1: -1.28.  r = 0.5, A = -1: max(0.5, 0.6).  r = 0.7, A = -1: 0.7 both
    loss, stats = policy([2.0, 0.5, 0.7], [1.0, -1.0, -1.0], clip_range=(0.4, 0.28))
    close(loss, torch.tensor((-1.28 + 0.6 + 0.7) / 3))
    close(stats["clipfrac"], torch.tensor(2 / 3))


def test_dual_clip_bounds_only_negative_advantages():
    # r = 10: A = -1: max(10, 1.2) = 10, at most 3;  A = 1: max(-10, -1.2)
    close(policy([10.0, 10.0], [-1.0, 1.0])[0], torch.tensor((10 - 1.2) / 2))
    close(policy([10.0, 10.0], [-1.0, 1.0], dual_clip=3.0)[0], torch.tensor((3 - 1.2) / 2))
    close(policy([10.0, 10.0], [-0.5, 0.5], dual_clip=3.0)[0], torch.tensor((1.5 - 0.6) / 2))
    with pytest.raises(CaiError, match="dual_clip"):
        policy([1.0], [1.0], dual_clip=1.0)


def test_policy_gradients_by_hand():
    ratios, advantages = row(1.0, 2.0, 2.0, 0.5), row(3.0, 1.0, -1.0, 1.0)
    logprobs, old = ratios.log().requires_grad_(), torch.zeros(1, 4, requires_grad=True)
    weights = row(1.0, 1.0, 0.25, 1.0).requires_grad_()
    loss, _ = policy_loss(logprobs, old, advantages.requires_grad_(), ratios > 0, 0.2, weights_BR=weights)
    loss.backward()
    # -w r A / 4 where the plain loss is the larger one, 0 where it is the clipped one (r = 2, A = 1)
    close(logprobs.grad, row(-3.0, 0.0, 0.25 * 2, -0.5) / 4)
    assert old.grad is None
    assert advantages.grad is None
    assert weights.grad is None


def test_the_gradient_at_the_first_step_does_not_need_detached_old_log_probs():
    logprobs = row(-1.0, -2.0).requires_grad_()
    policy_loss(logprobs, logprobs, row(1.0, -3.0), torch.ones(1, 2, dtype=torch.bool), 0.2)[0].backward()
    close(logprobs.grad, row(-0.5, 1.5))


def test_a_wild_log_ratio_stays_finite():
    loss, stats = policy_loss(row(0.0), row(-500.0), row(-1.0), torch.tensor([[True]]), 0.2)
    close(loss, torch.tensor(math.exp(20)))
    assert stats["approx_kl"].isfinite()
    # the other way e^-20 - 1 + 20
    close(
        policy_loss(row(-500.0), row(0.0), row(-1.0), torch.tensor([[True]]), 0.2)[1]["approx_kl"], torch.tensor(19.0)
    )
    assert importance_weights(row(0.0), row(-500.0), torch.tensor([[True]]), 4.0) == 4.0


def test_value_loss_by_hand():
    values, old, returns = row(3.0, 0.0), row(1.0, 1.0), row(4.0, 4.0)
    mask = torch.ones(1, 2, dtype=torch.bool)
    # v = 3: 1/2, held at 1.5: 6.25/2, clipped.  v = 0: 16/2, held at 0.5: 12.25/2
    loss, stats = value_loss(values, old, returns, mask, 0.5)
    close(loss, torch.tensor((3.125 + 8) / 2))
    close(stats["clipfrac"], torch.tensor(0.5))
    # v = 0: 1/2, held at 1 - 0.5: 2.25/2, clipped
    loss, stats = value_loss(row(0.0), row(1.0), row(-1.0), mask[:, :1], 0.5)
    close(loss, torch.tensor(1.125))
    assert stats["clipfrac"] == 1
    loss, stats = value_loss(values, old, returns, mask)
    close(loss, torch.tensor((0.5 + 8) / 2))
    assert stats["clipfrac"] == 0
    values.requires_grad_()
    value_loss(values, old, returns, mask)[0].backward()
    close(values.grad, row(-0.5, -2.0))  # (v - return) / 2


def test_nll_loss_by_hand():
    loss, stats = nll_loss(row(-1.0, -2.0, NAN), torch.tensor([[True, True, False]]))
    close(loss, torch.tensor(1.5))
    close(stats["loss"], loss)
    close(nll_loss(row(-1.0, -2.0, NAN), torch.tensor([[True, True, False]]), total=6)[0], torch.tensor(0.5))
    logprobs = row(-1.0, -2.0, NAN).requires_grad_()
    nll_loss(logprobs, torch.tensor([[True, True, False]]))[0].backward()
    close(logprobs.grad, row(-0.5, -0.5, 0.0))


def test_importance_weights_by_hand():
    old = row(math.log(2), math.log(10), -math.log(2), NAN)
    weights = importance_weights(old, row(0.0, 0.0, 0.0, 0.0), torch.tensor([[True, True, True, False]]), cap=5.0)
    close(weights, row(2.0, 5.0, 0.5, 0.0))
    mask = torch.tensor([[True, True, True, False]])
    close(importance_weights(old, row(0.0, 0.0, 0.0, 0.0), mask, cap=0.75), row(0.75, 0.75, 0.5, 0.0))
    with pytest.raises(CaiError, match="cap"):
        importance_weights(old, old, torch.ones(1, 4, dtype=torch.bool), 0.0)


@quick
@given(seeds, st.integers(1, 7), st.integers(1, 6), st.integers(1, 7), st.integers(0, 2))
def test_micro_batches_add_up_to_the_step_with_the_last_partial_and_all_masked_ones(seed, batch, tokens, size, idle):
    tensors, mask = draw(seed, batch, tokens)
    mask[0, 0] = True
    tensors = [torch.cat([x, torch.full((idle * size, tokens), NAN)]) for x in tensors]
    mask = torch.cat([mask, torch.zeros(idle * size, tokens, dtype=torch.bool)])
    total = torch.tensor(int(mask.sum()))
    logprobs = tensors[0].clone().requires_grad_()
    whole = losses(logprobs, *tensors[1:], mask)
    parts = [
        losses(*(x[i : i + size] for x in (logprobs, *tensors[1:], mask)), total) for i in range(0, len(mask), size)
    ]
    for name, (loss, stats) in whole.items():
        partial = sum(part[name][0] for part in parts)
        close(partial, loss, atol=1e-5, rtol=1e-5)
        grads = [torch.autograd.grad(x, logprobs, retain_graph=True)[0] for x in (partial, loss)]
        close(*grads, atol=1e-5, rtol=1e-5)
        for key in stats:
            close(sum(part[name][1][key] for part in parts), stats[key], atol=1e-5, rtol=1e-5)


def test_a_mean_of_micro_batch_means_is_another_result():
    logprobs, mask = (
        torch.tensor([[-1.0, -1.0, -1.0], [-4.0, 0.0, 0.0]]),
        torch.tensor([[True] * 3, [True, False, False]]),
    )
    close(nll_loss(logprobs, mask)[0], torch.tensor(7 / 4))  # not (1 + 4) / 2


@quick
@given(seeds, st.integers(1, 5), st.integers(1, 6), st.sampled_from([NAN, INF, -INF]))
def test_padding_order_and_what_lies_under_the_mask_change_nothing(seed, batch, tokens, poison):
    tensors, mask = draw(seed, batch, tokens)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    back = torch.argsort(order)

    def run(change, restore):
        inputs = [change(x, poison) for x in tensors]
        logprobs = inputs[0].clone().requires_grad_()
        results = losses(logprobs, *inputs[1:], change(mask, False))
        return {
            name: (loss, stats, restore(torch.autograd.grad(loss, logprobs, retain_graph=True)[0]))
            for name, (loss, stats) in results.items()
        }

    plain = run(lambda x, fill: x, lambda x: x)
    changes = {
        "poisoned": (lambda x, fill: x if x.dtype == torch.bool else torch.where(mask, x, fill), lambda x: x),
        "padded": (lambda x, fill: torch.nn.functional.pad(x, (2, 1, 0, 3), value=fill), lambda x: x[:batch, 2:-1]),
        "permuted": (lambda x, fill: x[order], lambda x: x[back]),
    }
    for change in changes.values():
        close(run(*change), plain, atol=1e-6, rtol=1e-5)


def test_an_all_masked_micro_batch_gives_zero_loss_and_zero_gradients():
    mask = torch.zeros(2, 3, dtype=torch.bool)
    for total in (None, 12):
        logprobs = torch.full((2, 3), NAN, requires_grad=True)
        for loss, stats in losses(logprobs, *[torch.full((2, 3), NAN)] * 3, mask, total).values():
            loss.backward()
            assert loss == 0
            assert all(value == 0 for value in stats.values())
        close(logprobs.grad, torch.zeros(2, 3))


def test_stats_are_detached_float32_scalars():
    logprobs = row(-1.0, -2.0).double().requires_grad_()
    mask = torch.ones(1, 2, dtype=torch.bool)
    results = losses(logprobs, *[row(0.5, 1.5)] * 3, mask)
    assert set(results["policy"][1]) == {"loss", "approx_kl", "clipfrac"}
    assert set(results["value"][1]) == {"loss", "clipfrac"}
    for loss, stats in results.values():
        assert loss.dtype == torch.float32
        for value in stats.values():
            assert value.shape == ()
            assert value.dtype == torch.float32
            assert not value.requires_grad
