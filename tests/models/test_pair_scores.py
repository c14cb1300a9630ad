"""A pair in one row: the scores and gradients of two rows, in every family that shares the prompt, and in those that do
not."""

from itertools import accumulate
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from cai_ray.models.documents import pair_scores, shares_prompt
from cai_ray.training.preference import PairScores
from tests.reference import values_of

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
WINDOW = {"sliding_window": 4}  # shorter than the sequences
SHARING: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in ("gemma", "gpt_neox", "llama", "phi", "qwen2", "qwen3")},
    **{family: (family, {"sliding_window": None}) for family in ("mistral", "phi3")},
    **{f"{family}-window": (family, WINDOW) for family in ("mistral", "phi3", "gemma2")},
    "gemma3-window": ("gemma3_text", WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
    "qwen2-window": ("qwen2", WINDOW | {"use_sliding_window": True, "max_window_layers": 1}),
}
PARTS = ((9, 4, 7), (3, 8, 1), (0, 2, 5))  # prompt, first answer, second answer


def make(name: str) -> Any:
    family, fields = SHARING.get(name, (name, {}))
    heads = {"num_key_value_heads": 2} if family == "phi3" else {}
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **{**SMALL, **heads, **fields})
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    torch.nn.init.normal_(model.score.weight)
    return model


def batch() -> torch.Tensor:
    return torch.randint(1, 97, (1, sum(map(sum, PARTS))), generator=torch.Generator().manual_seed(1))


def apart(model: Any, ids_1T: torch.Tensor) -> torch.Tensor:
    """scores_N2 of each sequence by itself."""
    pieces, scores = ids_1T[0].split([n for parts in PARTS for n in parts]), []
    for prompt, *answers in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        for sequence in (torch.cat((prompt, answer)) for answer in answers):
            scores.append(values_of(model, sequence.tolist())[-1])
    return torch.stack(scores).view(-1, 2)


def gradients(model: Any, scores_N2: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.nn.functional.logsigmoid(scores_N2[:, 0] - scores_N2[:, 1]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", SHARING)
def test_a_shared_prompt_changes_neither_scores_nor_gradients(family: str) -> None:
    model, ids = make(family), batch()
    assert shares_prompt(model)
    expected, found = apart(model, ids), torch.stack(pair_scores(model, ids, PARTS), dim=1)
    assert expected.std() > 0.1  # else the comparison would prove nothing
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    wanted, got = gradients(model, expected), gradients(model, found)
    assert wanted.keys() == got.keys()
    for name, gradient in wanted.items():
        scale = 1 + float(gradient.abs().max())
        torch.testing.assert_close(got[name] / scale, gradient / scale, atol=1e-5, rtol=0)


def test_recomputed_activations_give_the_same_gradients() -> None:
    model, ids = make("llama").train(), batch()
    wanted = gradients(model, torch.stack(pair_scores(model, ids, PARTS), dim=1))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = gradients(model, torch.stack(pair_scores(model, ids, PARTS), dim=1))
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", SHARING)
def test_no_answer_sees_the_other_or_another_pair(family: str) -> None:
    model, ids = make(family), batch()
    before = torch.stack(pair_scores(model, ids, PARTS), dim=1)
    starts = list(accumulate(n for parts in PARTS for n in parts))
    for pair in range(3):
        for answer in (0, 1):
            first = starts[3 * pair + answer]
            other = ids.clone()
            other[0, first : first + PARTS[pair][1 + answer]] = 55
            moved = torch.stack(pair_scores(model, other, PARTS), dim=1) != before
            assert moved.nonzero().tolist() == [[pair, answer]]


@torch.no_grad()
def test_a_score_without_an_answer_tells_nothing_of_the_other() -> None:
    """The preference model that sees prompts only: both scores are one number, its accuracy is 1/2."""
    ids = batch()[:, :27]
    ids[:, [7, 8, 16, 17, 25, 26]] = 5  # EOS alone, twice for each of three prompts
    first, second = pair_scores(make("llama"), ids, [(7, 1, 1)] * 3)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_window_matters_here() -> None:
    model, ids = make("mistral-window"), batch()
    with_window = apart(model, ids)
    model.config.sliding_window = None
    for layer in model.model.layers:
        layer.self_attn.config.sliding_window = None
    assert not torch.allclose(apart(model, ids), with_window, atol=1e-2)


@torch.no_grad()
def test_other_models_read_two_sequences() -> None:
    model, ids = make("gpt2"), batch()
    assert not shares_prompt(model)
    expected, found = apart(model, ids), torch.stack(PairScores(model)(ids, PARTS), dim=1)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
