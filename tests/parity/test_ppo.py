"""Log-probs, rewards, advantages and losses against TRL, OpenRLHF and verl."""

from collections.abc import Callable
from types import SimpleNamespace as Peer
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cai_ray.algo.masking import masked_whiten
from cai_ray.algo.ppo import (
    gae,
    group_advantages,
    importance_weights,
    logprobs_from_hidden,
    logprobs_from_logits,
    nll_loss,
    policy_loss,
    shaped_rewards,
    value_loss,
)
from tests.parity.conftest import agree

GAMMA, LAMBDA = 0.95, 0.9


def with_gradient(loss: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = loss(x)
    return value.detach(), torch.autograd.grad(value, x)[0]


# ---- log-probs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy(trl: Peer, openrlhf: Peer, verl: Peer, temperature: float) -> None:
    random = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(12, 6, generator=random), torch.randn(33, 6, generator=random)
    labels = torch.randint(33, (3, 4), generator=random)
    logits = (hidden @ weight.T).reshape(3, 4, 33)
    ours = logprobs_from_logits(logits, labels, temperature)
    chunked, entropy = logprobs_from_hidden(hidden, weight, labels.flatten(), temperature, chunk=5)
    agree(chunked, ours.flatten())
    agree(ours, trl.utils.selective_log_softmax(logits / temperature, labels))
    agree(ours, verl.functional.logprobs_from_logits(logits / temperature, labels))
    agree(ours, openrlhf.utils.log_probs_from_logits(logits.clone(), labels, temperature))
    for peer in (trl.utils, verl.functional):
        agree(entropy.reshape(3, 4), peer.entropy_from_logits(logits / temperature))


def test_the_chunked_heads_gradients_are_those_of_trls(trl: Peer) -> None:
    random = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(12, 6, generator=random), torch.randn(33, 6, generator=random)
    labels, a = torch.randint(33, (12,), generator=random), torch.randn(12, generator=random)
    grads = []
    for function in (logprobs_from_hidden, trl.utils._ChunkedLogProbFunction.apply):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, _ = function(h, w, labels, 0.7, 5)
        grads.append(torch.autograd.grad((logprobs * a).sum(), (h, w)))
    agree(*grads)


# ---- rewards --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, (-0.5, 0.4)])
def test_rewards_of_openrlhf(openrlhf: Peer, batch: Peer, clip: tuple[float, float] | None) -> None:
    kl = openrlhf.utils.compute_approx_kl(batch.logprobs, batch.ref)
    theirs = openrlhf.utils.compute_reward(batch.scores, 0.2, kl, batch.mask, clip)
    ours = shaped_rewards(batch.scores, batch.logprobs, batch.ref, batch.mask, 0.2, score_clip=clip)
    agree(ours, theirs * batch.mask)  # OpenRLHF leaves the KL of padding, and masks it in its GAE


def test_rewards_of_verl(verl: Peer, batch: Peer) -> None:
    scores = torch.zeros_like(batch.logprobs)
    scores[torch.arange(5), batch.lengths - 1] = batch.scores  # where its reward manager puts them
    theirs = verl.core.compute_rewards(scores, batch.logprobs, batch.ref, 0.2)
    agree(shaped_rewards(batch.scores, batch.logprobs, batch.ref, batch.mask, 0.2), theirs * batch.mask)


def trl_padding(trl: Peer, batch: Peer) -> dict[str, Any]:
    """TRL's masks of padding, from the position of each response's last token."""
    last = batch.lengths - 1
    names = {"sequence_lengths": last, "responses": batch.mask, "values": batch.values}
    names |= {"logprobs": batch.logprobs, "ref_logprobs": batch.ref}
    block = trl.block(trl.train, "response_idxs = ", "values = torch.masked_fill", **names)
    return {**names, **{n: getattr(block, n) for n in ("padding_mask", "padding_mask_p1", "sequence_lengths_p1")}}


def test_difference_trl_places_the_score_one_past_the_last_token(trl: Peer, batch: Peer) -> None:
    scores, ended = batch.scores.clone(), torch.tensor([True, False, True, True, False])
    args = Peer(kl_estimator="k1", kl_coef=0.2, missing_eos_penalty=1.0)
    trl.block(
        trl.train,
        "if self.args.missing_eos_penalty",
        "scores[~contain_eos_token]",
        self=Peer(args=args),
        scores=scores,
        contain_eos_token=ended,
    )
    names = trl_padding(trl, batch)
    logprobs, ref = (x.masked_fill(~batch.mask, 1.0) for x in (batch.logprobs, batch.ref))
    names |= {"logprobs": logprobs, "ref_logprobs": ref, "scores": scores, "args": args}
    theirs = trl.block(trl.train, "logr = ", "rewards[actual_start", **names).rewards
    ours = shaped_rewards(
        batch.scores, batch.logprobs, batch.ref, batch.mask, 0.2, missing_eos_penalty=1.0, ended_B=ended
    )
    agree(ours.sum(1), theirs.sum(1))  # the same reward, in another place
    agree(ours[0], theirs[0])  # a response that fills the batch has no place beyond
    for row, length in enumerate(batch.lengths.tolist()):
        if length < 8:
            agree(theirs[row, length], scores[row])
            agree(ours[row, length - 1], theirs[row, length - 1] + scores[row])


# ---- advantages -----------------------------------------------------------------------------------------------------


def test_gae_of_verl_with_gaps(verl: Peer, batch: Peer) -> None:
    mask = batch.gaps
    rewards, values = batch.rewards * mask, batch.values * mask
    theirs, returns = verl.core.compute_gae_advantage_return(rewards, values, mask.float(), GAMMA, LAMBDA)
    advantages, ours = gae(batch.rewards, batch.values, mask, GAMMA, LAMBDA)
    agree(ours[mask], returns[mask])
    agree(masked_whiten(advantages, mask)[mask], theirs[mask])


def test_gae_of_openrlhf_and_its_difference_on_gaps(openrlhf: Peer, batch: Peer) -> None:
    def theirs(mask: Tensor) -> Any:
        return openrlhf.Maker.get_advantages_and_returns(None, batch.values, batch.rewards, mask, GAMMA, LAMBDA)

    agree(gae(batch.rewards, batch.values, batch.mask, GAMMA, LAMBDA), theirs(batch.mask))
    # A gap counts as a token with value and reward 0, and discounts what comes after it; here the state is carried.
    whole = gae(batch.rewards, batch.values, batch.gaps, GAMMA, LAMBDA)[0]
    assert (theirs(batch.gaps)[0] - whole)[batch.gaps].abs().max() > 0.01


def trl_gae(trl: Peer, batch: Peer, values: Tensor) -> Peer:
    args = Peer(gamma=GAMMA, lam=LAMBDA)
    names = {**trl_padding(trl, batch), "rewards": batch.rewards * batch.mask, "values": values, "args": args}
    return trl.block(trl.train, "lastgaelam = 0", "advantages = torch.masked_fill", **names)


def test_gae_of_trl_and_its_difference_one_past_the_last_token(trl: Peer, batch: Peer) -> None:
    advantages, returns = gae(batch.rewards, batch.values, batch.mask, GAMMA, LAMBDA)
    block = trl_gae(trl, batch, batch.values * batch.mask)
    agree(returns, block.returns * batch.mask)
    agree(masked_whiten(advantages, batch.mask), block.advantages)
    # TRL keeps the critic's value one past the last token, where it expects the score; it bootstraps the last token.
    block = trl_gae(trl, batch, batch.values * ~trl_padding(trl, batch)["padding_mask_p1"])
    assert (block.returns - returns)[batch.mask].abs().max() > 0.01


def experiences(openrlhf: Peer, batch: Peer, estimator: str, group: int) -> Any:
    """OpenRLHF's own advantages of a batch; with a coefficient of 0 the KL takes no part."""
    part = openrlhf.Experience(
        action_mask=batch.mask,
        values=batch.values,
        rewards=batch.scores,
        kl=torch.zeros_like(batch.values),
        index=list(range(len(batch.scores))),
    )
    advantage = Peer(estimator=estimator, gamma=1.0, lambd=LAMBDA, no_std_norm=False)
    args = Peer(
        rollout=Peer(n_samples_per_prompt=group, max_new_tokens=8),
        algo=Peer(advantage=advantage),
        reward=Peer(clip_range=None, overlong_buffer_len=None, stop_properly_penalty_coef=None),
    )
    maker = object.__new__(openrlhf.Maker)
    maker.strategy, maker.kl_ctl, maker.advantage_estimator = Peer(args=args), Peer(value=0.0), estimator
    return maker.compute_advantages_and_returns([part])[0]


def test_difference_openrlhf_whitens_with_the_biased_variance(openrlhf: Peer, batch: Peer) -> None:
    theirs = experiences(openrlhf, batch, "gae", 1)
    rewards = shaped_rewards(batch.scores, batch.logprobs, batch.logprobs, batch.mask, 0.0)
    advantages, returns = gae(rewards, batch.values, batch.mask, 1.0, LAMBDA)
    agree(returns, theirs.returns)
    n = int(batch.mask.sum())
    agree(masked_whiten(advantages, batch.mask) * (n / (n - 1)) ** 0.5, theirs.advantages * batch.mask)


@pytest.mark.parametrize(("kind", "name"), [("rloo", "rloo"), ("grpo", "group_norm")])
def test_advantages_of_groups(openrlhf: Peer, verl: Peer, batch: Peer, kind: str, name: str) -> None:
    batch = Peer(**{k: v[:4] for k, v in vars(batch).items()})
    ours = group_advantages(batch.scores, 2, kind)[:, None] * batch.mask
    theirs, std = (
        experiences(openrlhf, batch, name, 2).advantages,
        batch.scores.reshape(2, 2).std(1).repeat_interleave(2),
    )
    if kind == "grpo":  # OpenRLHF adds 1e-9 to the standard deviation, verl and we add 1e-6
        theirs = theirs * ((std + 1e-9) / (std + 1e-6))[:, None]
    agree(ours, theirs)
    rewards = torch.zeros_like(batch.rewards)
    rewards[torch.arange(4), batch.lengths - 1] = batch.scores
    function = verl.core.get_adv_estimator_fn(kind)
    agree(ours, function(rewards, batch.mask, np.array([0, 0, 1, 1]))[0])


def test_advantages_of_trls_groups_and_the_difference_of_their_epsilon(trl: Peer, batch: Peer) -> None:
    names = {"rewards": batch.scores[:4], "num_generations": 2, "self": Peer(scale_rewards="group")}
    lines = "grouped_rewards = rewards.view", "advantages = torch.zeros_like"
    agree(group_advantages(batch.scores[:4], 2, "rloo"), trl.block(trl.score["rloo"], *lines, **names).advantages)
    lines = "mean_grouped_rewards = torch.nanmean(rewards.view", "advantages = advantages / (std_rewards"
    theirs = trl.block(trl.score["grpo"], *lines, **names)
    std = theirs.std_rewards  # which has 1e-4 added there, and 1e-6 here
    agree(group_advantages(batch.scores[:4], 2, "grpo"), theirs.advantages * (std + 1e-4) / (std + 1e-6))


# ---- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("clip_range", [0.2, (0.1, 0.3)])
def test_policy_loss(openrlhf: Peer, verl: Peer, batch: Peer, clip_range: Any, dual_clip: float | None) -> None:
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    mask, A = batch.mask, batch.advantages
    ours = with_gradient(lambda x: policy_loss(x, batch.old, A, mask, clip_range, dual_clip)[0], batch.logprobs)
    loss = openrlhf.loss.PolicyLoss(low, high, dual_clip)
    agree(ours, with_gradient(lambda x: loss(x, batch.old, A, mask)[0], batch.logprobs))
    names = {"cliprange_low": low, "cliprange_high": high, "clip_ratio_c": dual_clip or 1e9}
    agree(
        ours, with_gradient(lambda x: verl.core.compute_policy_loss(batch.old, x, A, mask, **names)[0], batch.logprobs)
    )
    clipfrac = policy_loss(batch.logprobs, batch.old, A, mask, clip_range, dual_clip)[1]["clipfrac"]
    assert clipfrac > 0.1
    agree(clipfrac, loss(batch.logprobs, batch.old, A, mask)[1])
    agree(clipfrac, verl.core.compute_policy_loss(batch.old, batch.logprobs, A, mask, **names)[1])


def trl_losses(trl: Peer, batch: Peer, logprobs: Tensor, values: Tensor) -> Peer:
    names = trl_padding(trl, batch)
    names |= {"mb_values": batch.old_values * batch.mask, "mb_return": batch.returns, "mb_logprobs": batch.old}
    names |= {"mb_advantage": batch.advantages, "new_logprobs": logprobs, "vpred": values}
    names |= {"micro_batch_inds": slice(None), "padding_mask_p1": names["padding_mask"]}
    args = Peer(cliprange=0.2, cliprange_value=0.3)
    return trl.block(trl.train, "vpred = torch.masked_fill", "pg_loss = masked_mean", **names, args=args)


def test_losses_of_trl(trl: Peer, batch: Peer) -> None:
    ours = with_gradient(lambda x: policy_loss(x, batch.old, batch.advantages, batch.mask, 0.2)[0], batch.logprobs)
    agree(ours, with_gradient(lambda x: trl_losses(trl, batch, x, batch.values).pg_loss, batch.logprobs))
    # Over the same tokens: TRL's value loss counts the one past the last token too.
    ours = with_gradient(lambda x: value_loss(x, batch.old_values, batch.returns, batch.mask, 0.3)[0], batch.values)
    agree(ours, with_gradient(lambda x: trl_losses(trl, batch, batch.logprobs, x).vf_loss, batch.values))


@pytest.mark.parametrize("clip", [None, 0.3])
def test_value_loss(openrlhf: Peer, verl: Peer, batch: Peer, clip: float | None) -> None:
    old, returns, mask = batch.old_values, batch.returns, batch.mask
    ours = with_gradient(lambda x: value_loss(x, old, returns, mask, clip)[0], batch.values)
    loss = openrlhf.loss.ValueLoss(clip)
    agree(ours, with_gradient(lambda x: loss(x, old, returns, mask), batch.values))
    limit = clip or 1e9  # verl always clips
    agree(ours, with_gradient(lambda x: verl.core.compute_value_loss(x, returns, old, mask, limit)[0], batch.values))
    clipfrac = value_loss(batch.values, old, returns, mask, clip)[1]["clipfrac"]
    agree(clipfrac, verl.core.compute_value_loss(batch.values, returns, old, mask, limit)[1])


def test_parts_of_a_step_add_up_alike(openrlhf: Peer, verl: Peer, batch: Peer) -> None:
    total, rows = int(batch.mask.sum()), slice(1, 3)
    x, mask = batch.logprobs[rows], batch.mask[rows]
    ours = nll_loss(x, mask, total)[0]
    agree(ours, openrlhf.loss.SFTLoss()(x, mask, batch_num_tokens=total))
    agree(ours, verl.core.agg_loss(-x, mask, "token-mean", batch_num_tokens=total))
    agree(nll_loss(x, mask)[0], openrlhf.loss.SFTLoss()(x, mask))


def test_importance_weights(openrlhf: Peer, batch: Peer) -> None:
    mask, A = batch.mask, batch.advantages
    weights = importance_weights(batch.old, batch.rollout, mask, 1.2)
    assert (weights == 1.2).any()
    ours = policy_loss(batch.logprobs, batch.old, A, mask, 0.2, weights_BR=weights)[0]
    corrected = {"is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": (0.0, 1.2)}
    loss = openrlhf.loss.PolicyLoss(**corrected)
    agree(ours, loss(batch.logprobs, batch.old, A, mask, rollout_log_probs=batch.rollout)[0])


def test_difference_verl_always_applies_a_dual_clip_of_3(verl: Peer) -> None:
    logprobs, old, mask = torch.tensor([[2.0]]), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    A = torch.tensor([[-1.0]])
    theirs = verl.core.compute_policy_loss(old, logprobs, A, mask, cliprange=0.2)[0]
    agree(policy_loss(logprobs, old, A, mask, 0.2, dual_clip=3.0)[0], theirs)
    assert theirs == 3
    agree(policy_loss(logprobs, old, A, mask, 0.2)[0], torch.tensor(2.0).exp())


def test_difference_the_kl_statistic_is_k3_here_and_k1_in_openrlhf_and_verl(
    openrlhf: Peer, verl: Peer, batch: Peer
) -> None:
    names = (batch.advantages, batch.mask)
    k1 = (batch.old - batch.logprobs)[batch.mask].mean()
    agree(k1, openrlhf.loss.PolicyLoss()(batch.logprobs, batch.old, *names)[2])
    agree(k1, verl.core.compute_policy_loss(batch.old, batch.logprobs, *names, cliprange=0.2)[2])
    d = (batch.logprobs - batch.old)[batch.mask]
    agree((d.exp() - 1 - d).mean(), policy_loss(batch.logprobs, batch.old, *names, 0.2)[1]["approx_kl"])
    assert ((d.exp() - 1 - d).mean() - k1).abs() > 1e-3


def test_difference_trl_averages_per_micro_batch(trl: Peer, batch: Peer) -> None:
    def part(rows: slice) -> Peer:
        return Peer(**{k: v[rows] for k, v in vars(batch).items()})

    parts = [part(slice(0, 1)), part(slice(1, 5))]
    theirs = sum(trl_losses(trl, p, p.logprobs, p.values).pg_loss for p in parts) / 2
    total = int(batch.mask.sum())
    ours = [policy_loss(p.logprobs, p.old, p.advantages, p.mask, 0.2, total=total)[0] for p in parts]
    agree(sum(ours), policy_loss(batch.logprobs, batch.old, batch.advantages, batch.mask, 0.2)[0])
    assert (sum(ours) - theirs).abs() > 1e-3


def test_difference_trl_does_not_bound_the_log_ratio(trl: Peer, batch: Peer) -> None:
    batch.advantages = -torch.ones_like(batch.old)
    logprobs = batch.old + 100.0
    assert not trl_losses(trl, batch, logprobs, batch.values).pg_loss.isfinite()
    agree(policy_loss(logprobs, batch.old, batch.advantages, batch.mask, 0.2)[0], torch.tensor(20.0).exp())
