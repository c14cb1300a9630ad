"""What the engine does with a row, on a real engine with the tiny model."""

import asyncio
import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cai_ray.algo.scores import choice_distribution
from cai_ray.config import LabelConfig, ReviseConfig, Source
from cai_ray.constitution import load_constitution
from cai_ray.errors import DataError
from cai_ray.generation.engine import Engine
from cai_ray.models import tiny_model
from cai_ray.models.tokenization import Tokenizer
from cai_ray.records import Row
from cai_ray.serving import local_engine
from cai_ray.sources import read_comparisons
from cai_ray.stages.label import LabelPair
from cai_ray.stages.revise import ReviseRow
from cai_ray.templates import CHOICES, SCORES, feedback_prompt, score_prompt, score_prompt_messages

PAIRS = 50


@pytest.fixture(scope="module")
def engine() -> Engine:
    return local_engine(tiny_model())


@pytest.fixture(scope="module")
def pairs() -> list[Row]:
    rows, *_ = read_comparisons(Source(path="starter:helpful_comparisons", limit=PAIRS))
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
    engine: Engine, pairs: list[Row], forward: tuple[Tokenizer, Any]
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


def transformers_scores(forward: tuple[Tokenizer, Any], ids: list[int]) -> list[float]:
    """log P(1) to log P(10) from the whole probability of each number's tokens: `1` gives up what `10` has."""
    tokenizer, model = forward
    numbers = [tokenizer.hf(text, add_special_tokens=False).input_ids for text in SCORES]
    assert numbers[9][: len(numbers[0])] == numbers[0]
    probs = []
    for number in numbers:
        with torch.inference_mode():
            logits = model(torch.tensor([ids + number])).logits[0, len(ids) - 1 : -1].double()
        picked = torch.log_softmax(logits, -1).gather(-1, torch.tensor(number)[:, None])
        probs.append(float(picked.sum().exp()))
    probs[0] -= probs[9]
    return [math.log(p) for p in probs]


def test_scores_equal_an_independent_forward_pass(
    engine: Engine, pairs: list[Row], forward: tuple[Tokenizer, Any]
) -> None:
    constitution, choices = load_constitution("default"), [engine.tokenizer.text(text) for text in SCORES]
    program = LabelPair(LabelConfig(format="score"), constitution, seed=3)
    questions = {p.id: p.preference_question for p in constitution.principles}
    for row in pairs[:5]:
        (vote,) = asyncio.run(program({**row, "flags": []}, engine))["votes"]
        for side in ("a", "b"):
            asked = (row["messages"], questions[vote["principle_id"]], row[f"response_{side}"])
            ids = forward[0].hf.apply_chat_template(
                score_prompt_messages(*asked), continue_final_message=True, return_dict=True
            )["input_ids"]
            plain = forward[0].hf(score_prompt(*asked), add_special_tokens=False).input_ids
            for prompt in (plain, ids):
                expected, found = transformers_scores(forward, prompt), engine.choice_logprobs(prompt, choices)
                # Relative to ` 2`, because the space that all share joins the prompt; ` 10` is far below the others.
                assert [x - found[1] for x in found] == pytest.approx([x - expected[1] for x in expected], abs=1e-4)
                assert choice_distribution(found) == pytest.approx(choice_distribution(expected), abs=1e-4)
            mean = sum(p * n for n, p in enumerate(choice_distribution(expected), 1))  # the model's format is chat
            assert vote[f"score_{side}"] == pytest.approx(2 * (mean - 1) / 9 - 1, abs=1e-4)


def test_both_orders_are_averaged(engine: Engine, pairs: list[Row]) -> None:
    program = LabelPair(LabelConfig(swap=True, principles_per_pair=2), load_constitution("default"), seed=3)
    done = asyncio.run(program({**pairs[0], "flags": []}, engine))
    assert [v["swapped"] for v in done["votes"]] == [False, True, False, True]
    assert done["label_prob"] == pytest.approx(sum(v["prob"] for v in done["votes"]) / 4)
    turned = {**pairs[0], "response_a": pairs[0]["response_b"], "response_b": pairs[0]["response_a"], "flags": []}
    again = asyncio.run(program(turned, engine))
    assert again["label_prob"] == pytest.approx(1 - done["label_prob"], abs=1e-5)


def test_a_rationale_always_ends_in_a_scored_verdict(engine: Engine, pairs: list[Row]) -> None:
    config = LabelConfig(format="cot", clamp=(0.4, 0.6), max_rationale_tokens=6)
    done = asyncio.run(LabelPair(config, load_constitution("default"), 0)({**pairs[0], "flags": []}, engine))
    (vote,) = done["votes"]
    assert vote["rationale"]
    assert 0 < vote["prob"] < 1
    assert done["label_prob"] == min(max(vote["prob"], 0.4), 0.6)


def test_an_over_long_prompt_is_a_bad_row(engine: Engine, pairs: list[Row]) -> None:
    program = LabelPair(LabelConfig(max_prompt_tokens=16), load_constitution("default"), 0)
    with pytest.raises(DataError, match="more than 16"):
        asyncio.run(program({**pairs[0], "flags": []}, engine))


def test_revision_rounds_depend_on_the_row_alone(engine: Engine, pairs: list[Row]) -> None:
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
