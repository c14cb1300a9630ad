"""KL estimates and the controllers of the KL coefficient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_ray.algo.kl import AdaptiveKL, FixedKL, kl_estimate
from cai_ray.errors import CaiError

LN2 = math.log(2)


@pytest.mark.parametrize(
    ("kind", "twice", "half"),  # the policy gives a token twice, or half, the reference's probability: d = ±ln 2
    [
        ("k1", LN2, -LN2),
        ("k2", LN2**2 / 2, LN2**2 / 2),
        ("k3", 0.5 - 1 + LN2, 2 - 1 - LN2),
        ("abs", LN2, LN2),
    ],
)
def test_estimates(kind, twice, half):
    logprobs, ref_logprobs = torch.tensor([[-1.0, -1.0, -3.0]]), torch.tensor([[-1.0 - LN2, -1.0 + LN2, -3.0]])
    torch.testing.assert_close(kl_estimate(logprobs, ref_logprobs, kind), torch.tensor([[twice, half, 0.0]]))


def test_nothing_is_capped_and_small_values_keep_their_digits():
    zero = torch.zeros(1)
    assert kl_estimate(torch.tensor([15.0]), zero, "k1") == 15
    assert kl_estimate(torch.tensor([15.0]), zero, "k3").item() == pytest.approx(14, abs=1e-5)
    # exp(-d) - 1 + d = d²/2 - …; computed term by term in float32 it would be 0 or 6e-8
    assert kl_estimate(torch.tensor([1e-4]), zero, "k3").item() == pytest.approx(5e-9, rel=1e-2)


def test_bfloat16_log_probs_are_subtracted_in_float32():
    logprobs, ref_logprobs = torch.tensor([[-2.0], [-(2**-8)]], dtype=torch.bfloat16)
    # 511/256 has nine binary digits, one more than bfloat16 holds
    assert kl_estimate(logprobs, ref_logprobs, "k1").item() == -511 / 256


def test_an_unknown_kind_is_refused():
    with pytest.raises(CaiError, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


@pytest.mark.parametrize(("kind", "is_reverse_kl"), [("k2", True), ("k1", False)])
def test_as_a_loss_k2_has_the_gradient_of_the_reverse_kl_and_k1_has_none(kind, is_reverse_kl):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.1], requires_grad=True)
    logprobs, ref_logprobs = torch.log_softmax(logits, 0), torch.log_softmax(torch.tensor([1.0, 0.5, 0.0, -1.0]), 0)
    reverse_kl = (logprobs.exp() * (logprobs - ref_logprobs)).sum()
    (wanted,) = torch.autograd.grad(reverse_kl, logits, retain_graph=True)
    # the expectation over tokens of the policy, taken exactly: probabilities weigh the samples and carry no gradient
    loss = (logprobs.detach().exp() * kl_estimate(logprobs, ref_logprobs, kind)).sum()
    (got,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(got, wanted if is_reverse_kl else torch.zeros(4), atol=1e-6, rtol=1e-5)


def test_adaptive_coefficient():
    kl = AdaptiveKL(init=0.1, target=6, horizon=10_000)
    kl.update(12, 500)  # error 1, clipped to 0.2: 0.1 · (1 + 0.2 · 500/10000)
    assert kl.coef == pytest.approx(0.1 * 1.01)
    kl.update(6.6, 500)  # error 0.1: · (1 + 0.1 · 0.05)
    assert kl.coef == pytest.approx(0.1 * 1.01 * 1.005)
    kl.update(-3.0, 1000)  # error -1.5, clipped to -0.2
    assert kl.coef == pytest.approx(0.1 * 1.01 * 1.005 * 0.98)


def test_an_adaptive_coefficient_goes_on_from_where_it_is_set_and_a_fixed_one_stays():
    kl, fixed = AdaptiveKL(0.1, 6, 1000), FixedKL(0.05)
    kl.coef = 0.2
    kl.update(12, 100)
    fixed.update(12, 100)
    assert (kl.coef, fixed.coef) == (pytest.approx(0.204), 0.05)


@pytest.mark.parametrize(("kl", "n"), [(math.nan, 10), (math.inf, 10), (0.0, 5000)])
def test_an_update_that_would_ruin_the_coefficient_is_refused(kl, n):
    controller = AdaptiveKL(0.1, 6, 1000)
    with pytest.raises(CaiError, match="coefficient"):
        controller.update(kl, n)  # 0 nats over 5 horizons: 1 - 0.2 · 5 = 0
    assert controller.coef == 0.1


@pytest.mark.parametrize("arguments", [(0, 6, 100), (0.1, 0, 100), (0.1, 6, 0)])
def test_adaptive_parameters_are_positive(arguments):
    with pytest.raises(CaiError, match="positive"):
        AdaptiveKL(*arguments)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=8), st.integers(0, 8))
def test_estimates_know_only_their_own_token(pairs, cut):
    logprobs, ref_logprobs = torch.tensor(pairs).T
    for kind in ("k1", "k2", "k3", "abs"):
        whole = kl_estimate(logprobs, ref_logprobs, kind)
        parts = [kl_estimate(logprobs[part], ref_logprobs[part], kind) for part in (slice(cut), slice(cut, None))]
        torch.testing.assert_close(torch.cat(parts), whole)
        torch.testing.assert_close(kl_estimate(logprobs.flip(0), ref_logprobs.flip(0), kind).flip(0), whole)
        assert kind == "k1" or (whole >= -1e-6).all()
