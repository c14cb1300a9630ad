"""Rewards, GAE and group advantages: goldens by hand, and no trace of padding."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_ray.algo.ppo import gae, group_advantages, shaped_rewards
from cai_ray.errors import CaiError

NAN = math.nan
close = torch.testing.assert_close
quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10_000)

SCORES = torch.tensor([2.0, 5.0])
MASK = torch.tensor([[True, True, True], [True, True, False]])
REF = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, NAN]])
LOGPROBS = REF + torch.tensor([[0.5, -0.5, 1.0], [0.25, 0.0, NAN]])


def draw(seed, batch, tokens):
    """Random rewards, values and a mask with a True in every row."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, batch, tokens, generator=generator)
    mask = torch.rand(batch, tokens, generator=generator) < 0.6
    mask[torch.arange(batch), torch.randint(tokens, (batch,), generator=generator)] = True
    return rewards, values, mask


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        # -0.2 · d on each token, the score on the last one: 2 - 0.2 and 5 - 0
        ({}, [[-0.1, 0.1, 1.8], [-0.05, 5.0, 0.0]]),
        ({"kl": "k2"}, [[-0.025, -0.025, 1.9], [-0.00625, 5.0, 0.0]]),
        ({"kl": "abs"}, [[-0.1, -0.1, 1.8], [-0.05, 5.0, 0.0]]),
        ({"score_clip": 3.0}, [[-0.1, 0.1, 1.8], [-0.05, 3.0, 0.0]]),
        ({"score_clip": (2.5, 4.0)}, [[-0.1, 0.1, 2.3], [-0.05, 4.0, 0.0]]),
        # the penalty comes before the clip: 2 - 4 = -2, held at -1; the other order would give 1 - 4
        (
            {"score_clip": 1.0, "missing_eos_penalty": 4.0, "ended_B": torch.tensor([False, True])},
            [[-0.1, 0.1, -1.2], [-0.05, 1.0, 0.0]],
        ),
    ],
)
def test_shaped_rewards(options, wanted):
    close(shaped_rewards(SCORES, LOGPROBS, REF, MASK, 0.2, **options), torch.tensor(wanted))


def test_the_score_lands_on_the_last_true_whatever_the_gaps():
    mask = torch.tensor([[True, False, True, False], [False, True, False, False], [False, False, False, True]])
    rewards = shaped_rewards(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, 4), torch.zeros(3, 4), mask, 0.1)
    close(rewards, torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0]]))


def test_rewards_add_up_to_the_score_less_the_kl_of_the_response():
    rewards = shaped_rewards(SCORES, LOGPROBS, REF, MASK, 0.2)
    close(rewards.sum(1), torch.tensor([2.0 - 0.2 * 1.0, 5.0 - 0.2 * 0.25]))


def test_a_response_without_tokens_or_a_penalty_without_ended_is_refused():
    with pytest.raises(CaiError, match="no response token"):
        shaped_rewards(SCORES, LOGPROBS, REF, torch.tensor([[True, True, True], [False, False, False]]), 0.2)
    with pytest.raises(CaiError, match="ended_B"):
        shaped_rewards(SCORES, LOGPROBS, REF, MASK, 0.2, missing_eos_penalty=1.0)


def test_gae_by_hand():
    # γ = λ = 1/2. δ₂ = 4 - 2 = 2; δ₁ = 2 + 1 - 1 = 2, A₁ = 2 + 2/4 = 2.5; δ₀ = 1 + 1/2 - 1 = 1/2, A₀ = 1/2 + 2.5/4
    advantages, returns = gae(
        torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 1.0, 2.0]]), torch.ones(1, 3, dtype=torch.bool), 0.5, 0.5
    )
    close(advantages, torch.tensor([[1.125, 2.5, 2.0]]))
    close(returns, torch.tensor([[2.125, 3.5, 4.0]]))


def test_the_state_carries_across_a_masked_gap():
    # δ₂ = 4 - 2 = 2; δ₀ = 1 + 2/2 - 1 = 1, A₀ = 1 + 2/4
    advantages, returns = gae(
        torch.tensor([[1.0, NAN, 4.0]]), torch.tensor([[1.0, NAN, 2.0]]), torch.tensor([[True, False, True]]), 0.5, 0.5
    )
    close(advantages, torch.tensor([[1.5, 0.0, 2.0]]))
    close(returns, torch.tensor([[2.5, 0.0, 4.0]]))


def test_values_after_eos_do_not_leak():
    rewards, mask = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[True, True, False]])
    for after in (0.0, 1000.0, NAN):
        advantages, returns = gae(rewards, torch.tensor([[0.5, 0.5, after]]), mask, 1.0, 1.0)
        close(advantages, torch.tensor([[0.5, 0.5, 0.0]]))
        close(returns, torch.tensor([[1.0, 1.0, 0.0]]))


@quick
@given(seeds, st.integers(1, 5), st.integers(1, 9))
def test_with_gamma_and_lambda_1_returns_are_the_rewards_to_go(seed, batch, tokens):
    rewards, values, mask = draw(seed, batch, tokens)
    to_go = torch.where(mask, rewards, 0.0).flip(1).cumsum(1).flip(1)
    close(gae(rewards, values, mask, 1.0, 1.0)[1], torch.where(mask, to_go, 0.0), atol=1e-5, rtol=1e-5)


@quick
@given(seeds, st.integers(1, 5), st.integers(1, 9), st.floats(0, 1), st.floats(0, 1))
def test_gae_of_a_row_is_that_of_its_true_tokens_alone(seed, batch, tokens, gamma, gae_lambda):
    rewards, values, mask = draw(seed, batch, tokens)
    together = gae(rewards, values, mask, gamma, gae_lambda)
    for row in range(batch):
        kept = mask[row]
        alone = gae(rewards[row, kept][None], values[row, kept][None], kept[kept][None], gamma, gae_lambda)
        for whole, part in zip(together, alone, strict=True):
            close(whole[row, kept], part[0])
            assert (whole[row, ~kept] == 0).all()


@quick
@given(seeds, st.integers(1, 4), st.integers(1, 6), st.sampled_from([NAN, math.inf, -math.inf]))
def test_what_lies_under_the_mask_reaches_no_reward_advantage_or_gradient(seed, batch, tokens, poison):
    logprobs, values, mask = draw(seed, batch, tokens)
    results = []
    for inputs in ((logprobs, values), tuple(torch.where(mask, x, poison) for x in (logprobs, values))):
        x, v = (tensor.clone().requires_grad_() for tensor in inputs)
        rewards = shaped_rewards(torch.arange(float(batch)), x, 2 * x.detach(), mask, 0.1, kl="k3")
        advantages, returns = gae(rewards, v, mask, 0.9, 0.8)
        (advantages + returns).square().sum().backward()
        results.append((rewards, advantages, returns, x.grad, v.grad))
    close(results[1], results[0])


def test_nothing_to_do_is_done():
    empty = torch.zeros(0, 3)
    assert gae(empty, empty, empty.bool(), 1.0, 1.0)[0].shape == (0, 3)
    assert gae(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0).bool(), 1.0, 1.0)[1].shape == (2, 0)


def test_group_advantages():
    scores = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    # means of the others: 4, 3.5, 1.5 and 1.5, 1.5, 0
    close(group_advantages(scores, 3, "rloo"), torch.tensor([-3.0, -1.5, 4.5, -1.5, -1.5, 3.0]))
    # means 3 and 1; unbiased variances (4 + 1 + 9)/2 = 7 and (1 + 1 + 4)/2 = 3
    wanted = [-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5, -1 / 3**0.5, -1 / 3**0.5, 2 / 3**0.5]
    close(group_advantages(scores, 3, "grpo"), torch.tensor(wanted), atol=1e-5, rtol=1e-5)
    for kind in ("rloo", "grpo"):
        close(group_advantages(torch.full((4,), 2.5), 2, kind), torch.zeros(4))


@pytest.mark.parametrize(("size", "kind"), [(1, "rloo"), (4, "rloo"), (3, "mean")])
def test_group_misuse_is_refused(size, kind):
    with pytest.raises(CaiError):
        group_advantages(torch.zeros(6), size, kind)


@quick
@given(seeds, st.integers(1, 4), st.integers(1, 6), st.sampled_from([NAN, math.inf]))
def test_padding_and_the_order_of_rows_change_no_reward_and_no_advantage(seed, batch, tokens, poison):
    logprobs, values, mask = draw(seed, batch, tokens)
    scores, ended = values[:, 0].clone(), logprobs[:, 0] > 0
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))

    def run(scores, logprobs, values, mask, ended):
        rewards = shaped_rewards(scores, logprobs, values, mask, 0.3, "k3", 1.0, 0.5, ended)
        return torch.stack([rewards, *gae(rewards, values, mask, 0.9, 0.8)])

    plain = run(scores, logprobs, values, mask, ended)
    close(run(*(x[order] for x in (scores, logprobs, values, mask, ended))), plain[:, order])
    wide = [torch.nn.functional.pad(x, (2, 3), value=poison) for x in (logprobs, values)]
    wide_mask = torch.nn.functional.pad(mask, (2, 3), value=False)
    padded = run(scores, *wide, wide_mask, ended)
    close(padded[:, :, 2:-3], plain)
    assert (padded[:, ~wide_mask] == 0).all()


@quick
@given(seeds, st.integers(1, 4), st.integers(2, 5), st.sampled_from(["rloo", "grpo"]), st.floats(-5, 5))
def test_group_advantages_know_only_their_group_and_no_common_level(seed, groups, size, kind, level):
    scores = torch.randn(groups, size, generator=torch.Generator().manual_seed(seed))
    whole = group_advantages(scores.flatten(), size, kind).reshape(groups, size)
    tolerance = {"atol": 1e-4, "rtol": 1e-4}
    close(whole.sum(1), torch.zeros(groups), **tolerance)
    for group in range(groups):
        close(group_advantages(scores[group] + level, size, kind), whole[group], **tolerance)
    close(group_advantages(scores.flip(1).flatten(), size, kind).reshape(groups, size).flip(1), whole, **tolerance)


def test_the_smallest_spread_is_divided_by_its_standard_deviation_and_1e_6():
    # mean 0, unbiased standard deviation √2·1e-6: 1e-6 / ((1 + √2)·1e-6)
    got = group_advantages(torch.tensor([1e-6, -1e-6]), 2, "grpo")
    close(got, torch.tensor([1.0, -1.0]) / (1 + math.sqrt(2)))
