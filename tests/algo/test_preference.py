"""Soft labels, the preference loss and calibration, by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_ray.algo.preference import (
    choice_probability,
    clamp_probability,
    expected_calibration_error,
    preference_loss,
    swap_average,
)
from cai_ray.errors import CaiError

INF, NAN = math.inf, math.nan
LN3 = math.log(3)
close = torch.testing.assert_close
quick = settings(max_examples=25, deadline=None)


def test_choice_probability():
    # 0.3 against 0.1: 3/4, whatever else the model might have said
    assert choice_probability(math.log(0.3), math.log(0.1)) == pytest.approx(0.75, abs=1e-12)
    close(
        choice_probability(torch.tensor([0.3, 0.1]).log(), torch.tensor([0.1, 0.3]).log()), torch.tensor([0.75, 0.25])
    )
    assert choice_probability(-INF, -2.0) == 0
    assert choice_probability(-2.0, -INF) == 1
    assert choice_probability(-1e5, -1.0) == 0


@pytest.mark.parametrize("pair", [(-INF, -INF), (NAN, -1.0)])
def test_a_judge_that_cannot_be_read_is_an_error_and_not_a_guess(pair):
    with pytest.raises(CaiError, match="log-prob"):
        choice_probability(*pair)
    with pytest.raises(CaiError, match="log-prob"):
        choice_probability(torch.tensor([-1.0, pair[0]]), torch.tensor([-1.0, pair[1]]))


def test_swap_average():
    assert swap_average(0.9, 0.3) == pytest.approx(0.8)  # (0.9 + 0.7) / 2
    assert swap_average(0.9, 0.9) == pytest.approx(0.5)  # always the first answer: no opinion
    close(swap_average(torch.tensor([0.9]), torch.tensor([0.3])), torch.tensor([0.8]))


def test_clamped_numbers_keep_the_limits_exactly():
    # through float32, 0.6 would come back as 0.6000000238
    assert [clamp_probability(p, 0.4, 0.6) for p in (0.0, 0.5, 1.0)] == [0.4, 0.5, 0.6]
    close(clamp_probability(torch.tensor([0.0, 0.5, 1.0]), 0.4, 0.6), torch.tensor([0.4, 0.5, 0.6]))
    assert clamp_probability(0.3, 0.0, 1.0) == 0.3
    assert clamp_probability(0.3, 0.5, 0.5) == 0.5
    for low, high in ((0.6, 0.4), (-0.1, 0.5), (0.5, 1.1)):
        with pytest.raises(CaiError, match="clamp"):
            clamp_probability(0.5, low, high)


@pytest.mark.parametrize(
    ("target", "options", "wanted"),  # scores ln 3 and 0: σ(a - b) = 3/4
    [
        (1.0, {}, math.log(4 / 3)),
        (0.0, {}, math.log(4)),
        (0.6, {}, 0.6 * math.log(4 / 3) + 0.4 * math.log(4)),
        (1.0, {"margin": LN3}, math.log(2)),  # the lead is just the margin
        (
            0.0,
            {"margin": torch.tensor([LN3])},
            math.log(10),
        ),  # the better answer is behind by ln 3 and has to lead by it
        (1.0, {"center_coef": 0.1}, math.log(4 / 3) + 0.1 * LN3**2),
        (1.0, {"total": 4}, math.log(4 / 3) / 4),
        (1.0, {"weights": torch.tensor([2.0])}, 2 * math.log(4 / 3)),
    ],
)
def test_preference_loss(target, options, wanted):
    loss, stats = preference_loss(torch.tensor([LN3]), torch.tensor([0.0]), torch.tensor([target]), **options)
    close(loss, torch.tensor(wanted))
    close(stats["loss"], loss)


def test_centring_weighs_the_sum_of_the_scores():
    # an even pair with an even label: ln 2 for any scores, and 0.1 · (1 + 1)²
    loss, _ = preference_loss(torch.ones(1), torch.ones(1), torch.tensor([0.5]), center_coef=0.1)
    close(loss, torch.tensor(math.log(2) + 0.4))


def test_preference_gradient_by_hand():
    a, b = torch.tensor([LN3, LN3], requires_grad=True), torch.zeros(2, requires_grad=True)
    preference_loss(a, b, torch.tensor([1.0, 0.6]))[0].backward()
    close(a.grad, torch.tensor([-0.25, 0.15]) / 2)  # (σ(a - b) - p) / n
    close(b.grad, torch.tensor([0.25, -0.15]) / 2)


def test_preference_stats():
    a, b = torch.tensor([3.0, 1.0, 2.0, 5.0]), torch.tensor([1.0, 2.0, 2.0, 1.0])
    _, stats = preference_loss(a.requires_grad_(), b, torch.tensor([0.6, 0.9, 0.9, 0.5]))
    close(stats["accuracy"], torch.tensor((1 + 0 + 0.5 + 0.5) / 4))  # right, wrong, tied scores, undecided label
    close(stats["margin"], torch.tensor((2 - 1 + 0 + 0) / 4))
    assert not any(value.requires_grad for value in stats.values())


@quick
@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 8), st.sampled_from([NAN, INF, 3.0]))
def test_micro_batches_order_and_absent_pairs_change_nothing(seed, n, size, poison):
    generator = torch.Generator().manual_seed(seed)
    a, b, margin = torch.randn(3, n, generator=generator)
    p, weights = torch.rand(2, n, generator=generator) + torch.tensor([[0.0], [0.1]])
    options = {"center_coef": 0.01}

    def run(inputs, groups, total=None):
        """Loss, stats and the gradient of the first scores, added over groups of rows."""
        inputs = [x.clone() for x in inputs]
        inputs[0].requires_grad_()
        loss, stats = torch.zeros(()), {}
        for rows in groups:
            part, part_stats = preference_loss(
                *(x[rows] for x in inputs[:3]), margin=inputs[3][rows], weights=inputs[4][rows], total=total, **options
            )
            loss = loss + part
            stats = {key: stats.get(key, 0) + value for key, value in part_stats.items()}
        return loss, stats, torch.autograd.grad(loss, inputs[0])[0]

    inputs = [a, b, p, margin, weights]
    whole = run(inputs, [torch.arange(n)])
    tolerance = {"atol": 1e-5, "rtol": 1e-5}
    shuffled = torch.randperm(n, generator=generator)
    close(run(inputs, [shuffled]), whole, **tolerance)
    close(run(inputs, shuffled.split(size), total=n), whole, **tolerance)
    padded = [torch.cat([x, torch.tensor([poison] * 3)]) for x in inputs[:4]] + [torch.cat([weights, torch.zeros(3)])]
    loss, stats, grad = run(padded, [torch.arange(n + 3)])
    close((loss, stats, grad[:n]), whole, **tolerance)
    close(grad[n:], torch.zeros(3))


@quick
@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(0, 1), st.floats(0, 2))
def test_the_order_of_a_pair_does_not_matter(a, b, p, margin):
    a, b, p = (torch.tensor([x]) for x in (a, b, p))
    one, other = preference_loss(a, b, p, margin, 0.1), preference_loss(b, a, 1 - p, margin, 0.1)
    close(one, other, atol=1e-5, rtol=1e-5)


def test_large_gaps_stay_finite():
    a = torch.tensor([1e4], requires_grad=True)
    loss, _ = preference_loss(a, -a.detach(), torch.tensor([0.0]))
    loss.backward()
    assert loss == 2e4
    close(a.grad, torch.tensor([1.0]))


def test_expected_calibration_error():
    prob, label = torch.tensor([0.15, 0.15, 0.95, 0.95]), torch.tensor([0, 1, 1, 1])
    # |0.5 - 0.15| · 2/4 + |1 - 0.95| · 2/4
    close(expected_calibration_error(prob, label), torch.tensor(0.2))
    # ten bins unless told: 0.19 and 0.21 are not together, 0.21 and 0.29 are
    close(expected_calibration_error(torch.tensor([0.19, 0.21]), torch.tensor([0.0, 1.0])), torch.tensor(0.49))
    close(expected_calibration_error(torch.tensor([0.21, 0.29]), torch.tensor([0.0, 1.0])), torch.tensor(0.25))
    close(expected_calibration_error(prob, label, bins=1), torch.tensor(0.75 - 0.55))
    close(expected_calibration_error(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])), torch.tensor(0.0))
    assert expected_calibration_error(torch.zeros(0), torch.zeros(0)) == 0


@quick
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12), st.integers(1, 12))
def test_calibration_does_not_depend_on_order_or_repetition(pairs, bins):
    prob, label = torch.tensor(pairs).T
    whole = expected_calibration_error(prob, label, bins)
    close(expected_calibration_error(prob.flip(0), label.flip(0), bins), whole, atol=1e-5, rtol=1e-5)
    close(expected_calibration_error(prob.repeat(3), label.repeat(3), bins), whole, atol=1e-5, rtol=1e-5)
    assert whole <= 1


def test_bins_hold_their_lower_edge():
    # 0.5 opens the upper of two bins: |0.25 - 1| / 2 + |0.5 - 0| / 2; together they would give |0.75 - 1| / 2
    prob, label = torch.tensor([0.5, 0.25]), torch.tensor([0.0, 1.0])
    close(expected_calibration_error(prob, label, bins=2), torch.tensor(0.625))


@quick
@given(st.floats(-30, 0), st.floats(-30, 0), st.floats(-5, 5))
def test_a_choice_and_its_mirror_add_up_to_one(a, b, shift):
    p = choice_probability(a, b)
    assert choice_probability(b, a) == pytest.approx(1 - p, abs=1e-12)
    assert choice_probability(a + shift, b + shift) == pytest.approx(p, abs=1e-9)
    assert swap_average(p, 1 - p) == pytest.approx(p)
    assert 0.4 <= clamp_probability(p, 0.4, 0.6) <= 0.6


@quick
@given(st.lists(st.floats(-20, 0), min_size=2, max_size=6), st.floats(-5, 5))
def test_preference_loss_of_a_level_does_not_change_with_it(scores, level):
    a = torch.tensor(scores)
    b, p = a.flip(0), torch.linspace(0, 1, len(scores))
    close(preference_loss(a + level, b + level, p)[0], preference_loss(a, b, p)[0], atol=1e-4, rtol=1e-4)
