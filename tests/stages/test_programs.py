"""What the engine does with a row, on a real engine with the tiny model."""

import asyncio
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cai_ray.config import LabelConfig, ReviseConfig, Source
from cai_ray.constitution import load_constitution
from cai_ray.errors import DataError
from cai_ray.models import tiny_model
from cai_ray.models.tokenization import Tokenizer
from cai_ray.records import Row
from cai_ray.serving import LocalEngine
from cai_ray.sources import read_comparisons
from cai_ray.stages.label import LabelPair, label_statistics
from cai_ray.stages.revise import ReviseRow
from cai_ray.templates import CHOICES, feedback_prompt

PAIRS = 50


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    return LocalEngine(tiny_model())


@pytest.fixture(scope="module")
def pairs() -> list[Row]:
    rows, _ = read_comparisons(Source(path="starter:helpful_comparisons", limit=PAIRS))
    return rows


@pytest.fixture(scope="module")
def forward() -> tuple[Tokenizer, Any]:
    return Tokenizer.load(tiny_model()), AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)


def transformers_probability(forward: tuple[Tokenizer, Any], row: Row, question: str) -> float:
    """P(A) by a forward pass of transformers: the shared ` (` joins the prompt, the letter is scored."""
    tokenizer, model = forward
    text = feedback_prompt(row["messages"], question, row["response_a"], row["response_b"])
    ids = tokenizer.hf(text, add_special_tokens=False).input_ids
    a, b = (tokenizer.hf(c, add_special_tokens=False).input_ids for c in CHOICES)
    shared = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    with torch.inference_mode():
        logits = model(torch.tensor([ids + a[:shared]])).logits[0, -1].double()
    pair = torch.log_softmax(logits, -1)[[a[shared], b[shared]]]
    return float(torch.softmax(pair, 0)[0])


def test_soft_labels_equal_an_independent_forward_pass(
    engine: LocalEngine, pairs: list[Row], forward: tuple[Tokenizer, Any]
) -> None:
    constitution = load_constitution("default")
    program = LabelPair(LabelConfig(), constitution, seed=3)
    questions = {p.id: p.preference_question for p in constitution.principles}
    principles = set()
    for row in pairs:
        done = asyncio.run(program({**row, "flags": []}, engine))
        (vote,) = done["votes"]
        principles.add(vote["principle_id"])
        expected = transformers_probability(forward, row, questions[vote["principle_id"]])
        assert done["label_prob"] == pytest.approx(expected, abs=1e-4)
        assert not vote["swapped"]
    assert len(principles) > 5  # drawn, not fixed


def test_both_orders_are_averaged(engine: LocalEngine, pairs: list[Row]) -> None:
    program = LabelPair(LabelConfig(swap=True, principles_per_pair=2), load_constitution("default"), seed=3)
    done = asyncio.run(program({**pairs[0], "flags": []}, engine))
    assert [v["swapped"] for v in done["votes"]] == [False, True, False, True]
    assert done["label_prob"] == pytest.approx(sum(v["prob"] for v in done["votes"]) / 4)
    turned = {**pairs[0], "response_a": pairs[0]["response_b"], "response_b": pairs[0]["response_a"], "flags": []}
    again = asyncio.run(program(turned, engine))
    assert again["label_prob"] == pytest.approx(1 - done["label_prob"], abs=1e-5)


def test_a_rationale_always_ends_in_a_scored_verdict(engine: LocalEngine, pairs: list[Row]) -> None:
    config = LabelConfig(format="cot", clamp=(0.4, 0.6), max_rationale_tokens=6)
    done = asyncio.run(LabelPair(config, load_constitution("default"), 0)({**pairs[0], "flags": []}, engine))
    (vote,) = done["votes"]
    assert vote["rationale"]
    assert 0 < vote["prob"] < 1
    assert done["label_prob"] == min(max(vote["prob"], 0.4), 0.6)


def test_an_over_long_prompt_is_a_bad_row(engine: LocalEngine, pairs: list[Row]) -> None:
    program = LabelPair(LabelConfig(max_prompt_tokens=16), load_constitution("default"), 0)
    with pytest.raises(DataError, match="more than 16"):
        asyncio.run(program({**pairs[0], "flags": []}, engine))


def test_revision_rounds_depend_on_the_row_alone(engine: LocalEngine, pairs: list[Row]) -> None:
    config = ReviseConfig(rounds=2, max_new_tokens=8, max_critique_tokens=8)
    program = ReviseRow(config, load_constitution("default"), seed=5)
    row = {**pairs[0], "kind": "harmful"}
    first, second = (asyncio.run(program(row, engine)) for _ in range(2))
    assert first == second
    assert len(first["rounds"]) == 2
    other = asyncio.run(ReviseRow(config, load_constitution("default"), seed=6)(row, engine))
    assert other["initial_response"] != first["initial_response"]
    helpful = asyncio.run(program({**row, "kind": "helpful"}, engine))
    assert helpful["rounds"] == []


def test_label_statistics_by_hand() -> None:
    rows = [
        {"label_prob": 0.5, "response_a": "long", "response_b": "s"},
        {"label_prob": 0.9, "response_a": "long", "response_b": "s"},
        {"label_prob": 0.1, "response_a": "long", "response_b": "s"},
    ]
    stats = label_statistics(rows)
    assert stats["mean_label"] == pytest.approx(0.5)
    # ln 2 = 0.693147; H(0.9) = H(0.1) = 0.325083; the mean of the three is 0.447771
    assert stats["mean_entropy"] == pytest.approx(0.447771, abs=1e-6)
    assert stats["near_ties"] == pytest.approx(1 / 3)
    assert stats["prefers_longer"] == pytest.approx(1 / 3)
