"""Rewards whose best policy is known: a table of logits learns from the code that trains a language model.

Experience and losses are the package's own; only sampling and the forward pass are replaced, by a table with a row of
logits for each place of the response (and, for the critic, a value). Advantages are whitened under GAE, as by default;
that scales a step and moves no fixed point. Learning rates fall to 0, so that what is left is the fixed point's own.
Shapes: B responses, R places, V tokens; token 0 ends a response.
"""

from itertools import product

import numpy as np
import pyarrow as pa
import pytest
import torch

from cai_ray.algo.ppo import value_loss
from cai_ray.config import PPOConfig
from cai_ray.rl.batches import flat, ragged
from cai_ray.rl.experience import ACTOR_COLUMNS, actor_loss, make_experience

BATCH, STEPS, GROUP = 256, 300, 4
METHODS = ("gae", "rloo", "grpo")


def settings(method, **changes):
    sizes = {"rollout_batch_size": BATCH, "minibatch_size": BATCH, "steps": STEPS, "critic_init": "policy"}
    group = 1 if method == "gae" else GROUP
    return PPOConfig(**{**sizes, "advantage": method, "samples_per_prompt": group, "kl_coef": 0.0, **changes})


def sample(logits_RV, seed):
    """Responses up to their end, and their tokens' log-probs."""
    draw = torch.Generator().manual_seed(seed)
    logprobs_RV = torch.log_softmax(logits_RV, -1)
    tokens_BR = torch.multinomial(logprobs_RV.exp(), BATCH, replacement=True, generator=draw).T
    ended_BR = (tokens_BR == 0).cumsum(1)
    mask_BR = (ended_BR == 0) | ((ended_BR == 1) & (tokens_BR == 0))
    chosen_BR = logprobs_RV.expand(BATCH, -1, -1).gather(2, tokens_BR[..., None])[..., 0]
    return tokens_BR, mask_BR, chosen_BR


def train(config, reward, ref_RV, lr=0.2, seed=0):
    """The table after `STEPS` steps from the reference: logits_RV."""
    logits_RV = ref_RV.clone().requires_grad_()
    values_R = torch.zeros(len(ref_RV), requires_grad=True)
    optimizers = [torch.optim.Adam([x], lr=lr) for x in (logits_RV, values_R)]
    for step in range(config.steps):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr * (1 - step / config.steps)
        with torch.no_grad():
            tokens_BR, mask_BR, old_BR = sample(logits_RV, seed * 10_000 + step)
        lengths, rows = mask_BR.sum(1).tolist(), pa.array(range(BATCH), pa.int32())
        responses = [row[:n] for row, n in zip(tokens_BR.tolist(), lengths, strict=True)]
        ref_BR = torch.log_softmax(ref_RV, -1).expand(BATCH, -1, -1).gather(2, tokens_BR[..., None])[..., 0]
        scores = pa.array([float(reward(r)) for r in responses], pa.float64())
        batch = pa.table(
            {
                "row": rows,
                "id": [f"{i}" for i in range(BATCH)],
                **{name: [""] * BATCH for name in ("kind", "prompt", "response")},
                "response_ids": pa.array(responses, pa.list_(pa.int32())),
                "rollout_logprobs": ragged(old_BR[mask_BR], lengths),
                "ended": [r[-1] == 0 for r in responses],
            }
        )
        part = {
            "row": rows,
            "score": scores,
            "score_raw": scores,
            "old_logprobs": ragged(old_BR[mask_BR], lengths),
            "ref_logprobs": ragged(ref_BR[mask_BR], lengths),
        }
        if config.has_critic:
            part["values"] = ragged(values_R.detach().expand(BATCH, -1)[mask_BR], lengths)
        experience, _ = make_experience(config, config.kl_coef, batch, pa.table(part))
        logprobs_RV = torch.log_softmax(logits_RV, -1)
        now_BR = logprobs_RV.expand(BATCH, -1, -1).gather(2, tokens_BR[..., None])[..., 0]
        entropy_BR = -(logprobs_RV.exp() * logprobs_RV).sum(-1).expand(BATCH, -1)
        mask_N, total = torch.ones(sum(lengths), dtype=torch.bool), sum(lengths)
        columns = {name: flat(experience, name) for name in ACTOR_COLUMNS}
        loss, _ = actor_loss(config, config.kl_coef, columns, now_BR[mask_BR], entropy_BR[mask_BR], mask_N, total)
        if config.has_critic:
            old_N, returns_N = (flat(experience, name) for name in ("values", "returns"))
            values_N = values_R.expand(BATCH, -1)[mask_BR]
            loss = loss + value_loss(values_N, old_N, returns_N, mask_N, config.value_clip_range, total)[0]
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return logits_RV.detach()


def expected(reward, logits_RV):
    tokens_BR, mask_BR, _ = sample(logits_RV, 123)
    return np.mean([reward(row[:n]) for row, n in zip(tokens_BR.tolist(), mask_BR.sum(1).tolist(), strict=True)])


def table(rows, tokens, seed=1):
    return torch.randn(rows, tokens, generator=torch.Generator().manual_seed(seed))


# ---- the best reward ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_token_is_emitted_everywhere(method):
    def reward(response):
        return response.count(3) / 6

    assert expected(reward, train(settings(method), reward, table(6, 8))) >= 0.95


@pytest.mark.parametrize("method", METHODS)
def test_responses_take_the_wanted_length(method):
    def reward(response):
        return 1 - abs(len(response) - 5) / 5

    assert expected(reward, train(settings(method), reward, table(8, 4))) >= 0.95


RETURNS = (-0.5, 0.1, 1.0, 0.6, -0.2, 0.9, 0.3, 0.0)


def bandit(response):
    return RETURNS[response[0]]


@pytest.mark.parametrize("method", METHODS)
def test_the_best_of_eight_answers_is_found(method):
    assert expected(bandit, train(settings(method), bandit, table(1, 8))) >= 0.95


# ---- fixed points under a KL penalty --------------------------------------------------------------------------------
# The bandit has one token per response. With s(a) = r(a) - kl_coef log(π/π_ref)(a), the expected step is 0 where s is
# the same for all answers.


def distance(logits_1V, target_V):
    return 0.5 * float((torch.softmax(logits_1V[0], -1) - torch.as_tensor(target_V)).abs().sum())


def tilted(ref_1V, coef):
    """π ∝ π_ref exp(r / coef): the maximum of E r - coef KL(π ‖ π_ref)."""
    return torch.softmax(torch.log_softmax(ref_1V[0], -1) + torch.tensor(RETURNS) / coef, -1)


@pytest.mark.parametrize(("method", "penalty"), [("gae", "reward"), ("rloo", "reward"), ("rloo", "k2_loss")])
def test_the_kl_penalty_leads_to_the_tilted_reference(method, penalty):
    ref, coef = table(1, 8), 0.4
    config = settings(method, kl_coef=coef, kl_penalty=penalty)
    learned = train(config, bandit, ref, lr=0.1)
    assert distance(ref, tilted(ref, coef)) > 0.3
    assert distance(learned, tilted(ref, coef)) < 0.05


def forward_optimum(ref_V, gain_V, coef):
    """π with gain(a) + coef π_ref(a) / π(a) the same for all a; the sum over a is 1 at one such level."""
    low, high = gain_V.max() + 1e-9, gain_V.max() + coef * len(ref_V) + 1
    for _ in range(200):
        level = (low + high) / 2
        low, high = (level, high) if (coef * ref_V / (level - gain_V)).sum() > 1 else (low, level)
    return coef * ref_V / (level - gain_V)


def test_k3_as_a_loss_leads_elsewhere():
    # k3 = exp(-d) - 1 + d has the slope 1 - π_ref/π in log π: on policy that is the gradient of KL(π_ref ‖ π).
    ref, coef = table(1, 8), 0.4
    ref_V = torch.softmax(ref[0], -1).double().numpy()
    target = forward_optimum(ref_V, np.array(RETURNS), coef)
    assert target.sum() == pytest.approx(1)
    learned = train(settings("rloo", kl_coef=coef, kl_penalty="k3_loss"), bandit, ref, lr=0.1)
    assert distance(learned, target) < 0.05
    assert distance(learned, tilted(ref, coef)) > 0.1


def group_gain(probs_V, returns_V):
    """E of GRPO's advantage for each answer, over what the other responses of its group are."""
    gain_V = np.zeros(len(probs_V))
    for others in product(range(len(probs_V)), repeat=GROUP - 1):
        weight = np.prod(probs_V[list(others)])
        for answer in range(len(probs_V)):
            group = returns_V[[answer, *others]]
            gain_V[answer] += weight * (group[0] - group.mean()) / (group.std(ddof=1) + 1e-6)
    return gain_V


def test_grpo_with_k3_has_a_fixed_point_of_its_own():
    # Its advantage depends on the group's spread, so the gain of an answer depends on the policy itself: the fixed
    # point is found by repeating the forward optimum for the gains of the policy at hand.
    ref, coef, count = table(1, 4), 0.4, 4
    ref_V, returns_V = torch.softmax(ref[0], -1).double().numpy(), np.array(RETURNS[:count])
    target = ref_V
    for _ in range(300):
        target = 0.8 * target + 0.2 * forward_optimum(ref_V, group_gain(target, returns_V), coef)
    assert np.abs(forward_optimum(ref_V, group_gain(target, returns_V), coef) - target).max() < 1e-6
    learned = train(settings("grpo", kl_coef=coef, kl_penalty="k3_loss"), bandit, ref, lr=0.1)
    assert distance(learned, target) < 0.05
    assert distance(learned, forward_optimum(ref_V, returns_V, coef)) > 0.1  # where RLOO goes


# ---- what the options do --------------------------------------------------------------------------------------------


def test_an_entropy_bonus_alone_leads_to_the_uniform_policy():
    config = settings("rloo", entropy_coef=0.5)
    learned = train(config, lambda response: 0.0, table(1, 8), lr=0.1)
    assert distance(learned, torch.full((8,), 1 / 8)) < 0.02


def test_an_older_policy_s_responses_count_by_the_ratio_up_to_the_cap():
    config = settings("gae", staleness=1, importance_cap=1.5)
    old_N = torch.tensor([-1.0, -1.0, -1.0])
    columns = {
        "old_logprobs": old_N,
        "rollout_logprobs": torch.tensor([-1.0, -1.2, -3.0]),
        "advantages": torch.tensor([1.0, 1.0, 1.0]),
    }
    logprobs_N = old_N.clone().requires_grad_()
    mask_N = torch.ones(3, dtype=torch.bool)
    loss, _ = actor_loss(config, 0.0, columns, logprobs_N, torch.zeros(3), mask_N, 3)
    loss.backward()
    weights = [1.0, float(np.exp(0.2)), 1.5]
    assert (-3 * logprobs_N.grad).tolist() == pytest.approx(weights)
    assert loss.item() == pytest.approx(-sum(weights) / 3)
    # So does the KL as a loss: of k2, the gradient of (log-prob - reference)² / 2.
    columns |= {"ref_logprobs": torch.tensor([-2.0, -3.0, -1.5]), "advantages": torch.zeros(3)}
    config, logprobs_N = config.model_copy(update={"kl_penalty": "k2_loss"}), old_N.clone().requires_grad_()
    actor_loss(config, 0.1, columns, logprobs_N, torch.zeros(3), mask_N, 3)[0].backward()
    expected = [0.1 * w * d / 3 for w, d in zip(weights, [1.0, 2.0, 0.5], strict=True)]
    assert logprobs_N.grad.tolist() == pytest.approx(expected)


def test_a_filler_adds_nothing_whatever_it_holds():
    config = settings("rloo", kl_coef=0.3, kl_penalty="k3_loss", entropy_coef=0.1)
    bad_N = torch.full((2,), float("nan"))
    logprobs_N = bad_N.clone().requires_grad_()
    columns = dict.fromkeys(ACTOR_COLUMNS, bad_N)
    loss, stats = actor_loss(config, 0.3, columns, logprobs_N, bad_N, torch.zeros(2, dtype=torch.bool), 5)
    loss.backward()
    assert float(loss) == 0
    assert logprobs_N.grad.tolist() == [0, 0]
    assert all(float(value) == 0 for value in stats.values())
