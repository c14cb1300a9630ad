"""A pair in one row: the scores and gradients of two rows, in every family that shares the prompt, and in those that do
not."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from cai_ray.models.scalar import pair_scores, scores_at_end, shares_prompt
from cai_ray.training.preference import PairScores

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "head_dim": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,  # large enough for every token to matter to every later one
    "pad_token_id": 0,
    "num_labels": 1,
}
SHARING = ("gemma", "gpt_neox", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3")
PARTS = ((9, 4, 7), (3, 8, 1), (0, 2, 5))  # prompt, first answer, second answer


def make(family: str, **fields: Any) -> Any:
    full = {"sliding_window": None} if family in ("mistral", "phi3") else {}
    one_head_each = {"num_key_value_heads": 2} if family == "phi3" else {}
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **{**SMALL, **full, **one_head_each, **fields})
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    torch.nn.init.normal_(model.score.weight)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 97, (3, max(map(sum, PARTS))), generator=generator)
    for row, parts in zip(ids, PARTS, strict=True):
        row[sum(parts) :] = 0
    return ids, torch.tensor(PARTS)


def apart(model: Any, ids: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """scores_N2 of each sequence by itself, without padding."""
    scores = []
    for row, (p, a, b) in zip(ids, parts.tolist(), strict=True):
        for sequence in (row[: p + a], torch.cat((row[:p], row[p + a : p + a + b]))):
            scores.append(scores_at_end(model, sequence[None], torch.tensor([len(sequence)])))
    return torch.cat(scores).view(-1, 2)


def gradients(model: Any, scores_N2: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.nn.functional.logsigmoid(scores_N2[:, 0] - scores_N2[:, 1]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", SHARING)
def test_a_shared_prompt_changes_neither_scores_nor_gradients(family: str) -> None:
    model, (ids, parts) = make(family), batch()
    assert shares_prompt(model)
    expected, found = apart(model, ids, parts), torch.stack(pair_scores(model, ids, parts), dim=1)
    assert expected.std() > 0.1  # else the comparison would prove nothing
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    wanted, got = gradients(model, expected), gradients(model, found)
    assert wanted.keys() == got.keys()
    for name, gradient in wanted.items():
        scale = 1 + float(gradient.abs().max())
        torch.testing.assert_close(got[name] / scale, gradient / scale, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", SHARING)
def test_no_answer_sees_the_other(family: str) -> None:
    model, (ids, parts) = make(family), batch()
    first, second = pair_scores(model, ids, parts)
    for name, part, kept in (("first", 1, second), ("second", 2, first)):
        other = ids.clone()
        for row, (p, a, b) in zip(other, PARTS, strict=True):
            row[slice(p, p + a) if part == 1 else slice(p + a, p + a + b)] = 55
        scores = pair_scores(model, other, parts)
        assert torch.equal(scores[2 - part], kept), name
        assert not torch.allclose(scores[part - 1], (first, second)[part - 1], atol=1e-2)


@torch.no_grad()
def test_a_score_without_an_answer_tells_nothing_of_the_other() -> None:
    """The preference model that sees prompts only: both scores are one number, its accuracy is 1/2."""
    model, (ids, _) = make("llama"), batch()
    ids[:, 7:9] = 5  # two answers of EOS alone
    first, second = pair_scores(model, ids[:, :9], torch.tensor([[7, 1, 1]] * 3))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "fields"), [("mistral", {"sliding_window": 4}), ("gemma2", {"sliding_window": 4}), ("gpt2", {})]
)
def test_other_models_read_two_sequences(family: str, fields: dict[str, Any]) -> None:
    model, (ids, parts) = make(family, **fields), batch()
    assert not shares_prompt(model)
    expected, found = apart(model, ids, parts), torch.stack(PairScores(model)(ids, parts), dim=1)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    if "sliding_window" in fields:  # what the rule prevents: a mask without the window
        shared = torch.stack(pair_scores(model, ids, parts), dim=1)
        assert not torch.allclose(shared, expected, atol=1e-2)
