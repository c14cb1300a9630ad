"""Forward passes without padding give what each sequence gives alone."""

import pytest
import torch

from cai_ray.algo.ppo import logprobs_from_logits
from cai_ray.models import documents
from cai_ray.models.checkpoints import load_causal_lm, load_scalar_model
from cai_ray.rl.rewards import ScoreForward
from cai_ray.rl.workers import ValueForward
from cai_ray.training.sft import TokenLogprobs
from tests.reference import values_of

PROMPTS, RESPONSES = [[5, 6, 7], [8], [9, 10, 11, 12, 13]], [[1, 2], [3, 4, 11, 20, 21], [30]]
SEQUENCES = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
IDS = torch.tensor([[x for s in SEQUENCES for x in s]])
LENGTHS = [len(s) for s in SEQUENCES]
RESPONSE = torch.tensor(
    [[k for p, r in zip(PROMPTS, RESPONSES, strict=True) for k in [False] * len(p) + [True] * len(r)]]
)


@pytest.fixture(params=["one row", "padded rows"])
def how(request, monkeypatch):
    if request.param == "padded rows":  # as for a family that is not known to keep documents apart
        monkeypatch.setattr(documents, "shares_prompt", lambda model: False)


def test_log_probs_are_those_of_each_sequence_alone(policy, how):
    hf = load_causal_lm(policy, "float32")
    logprobs_N, entropy_N = TokenLogprobs(hf)(IDS, LENGTHS, RESPONSE, 0.7)
    plain = load_causal_lm(policy, "float32")
    expected, entropies = [], []
    for sequence, response in zip(SEQUENCES, RESPONSES, strict=True):
        logits = plain(torch.tensor([sequence])).logits[:, -len(response) - 1 : -1]
        expected += logprobs_from_logits(logits, torch.tensor([response]), 0.7)[0].tolist()
        entropies += torch.distributions.Categorical(logits=logits[0] / 0.7).entropy().tolist()
    assert logprobs_N.tolist() == pytest.approx(expected, abs=2e-5)
    assert entropy_N.tolist() == pytest.approx(entropies, abs=2e-5)


def test_values_and_scores_are_those_of_each_sequence_alone(reward_model, how):
    hf = load_scalar_model(reward_model, "float32")
    values_N, scores_B = ValueForward(hf)(IDS, LENGTHS, RESPONSE), ScoreForward(hf)(IDS, LENGTHS)
    plain, values, scores = load_scalar_model(reward_model, "float32"), [], []
    for sequence, response in zip(SEQUENCES, RESPONSES, strict=True):
        expected = values_of(plain, sequence).tolist()
        values += expected[-len(response) - 1 : -1]
        scores.append(expected[-1])
    assert values_N.tolist() == pytest.approx(values, abs=2e-5)
    assert scores_B.tolist() == pytest.approx(scores, abs=2e-5)


def test_gradients_reach_the_weights_from_response_tokens_only(policy):
    hf = load_causal_lm(policy, "float32")
    TokenLogprobs(hf)(IDS, LENGTHS, RESPONSE, 1.0)[0].sum().backward()
    packed = {name: p.grad.clone() for name, p in hf.named_parameters()}
    hf.zero_grad()
    for sequence, response in zip(SEQUENCES, RESPONSES, strict=True):
        logits = hf(torch.tensor([sequence])).logits[:, -len(response) - 1 : -1]
        logprobs_from_logits(logits, torch.tensor([response])).sum().backward()
    for name, p in hf.named_parameters():
        torch.testing.assert_close(packed[name], p.grad, rtol=1e-4, atol=1e-5)
