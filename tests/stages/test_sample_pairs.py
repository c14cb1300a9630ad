"""Several answers to a prompt and the pairs that they make."""

import asyncio
from typing import Any

import pytest

from cai_ray.config import SamplePairsConfig
from cai_ray.errors import DataError
from cai_ray.records import RESPONSE_PAIR, Row, row_id, to_table
from cai_ray.stages.sample_pairs import RESPONSES, SampleResponses, pair_indices, pairs_of
from tests.stages.fake_engine import CUT, ScriptedEngine, prompt_row


def sample(script: dict[str, str], row: Row | None = None, **config: Any) -> tuple[Row, ScriptedEngine]:
    row = row or prompt_row("Hi")
    engine = ScriptedEngine(row, 3, script)
    program = SampleResponses(SamplePairsConfig(responses_per_prompt=len(script), **config), 3)
    return asyncio.run(program(row, engine)), engine


def test_pairs_by_hand() -> None:
    assert pair_indices(2, "all") == pair_indices(2, "ring") == [(0, 1)]
    assert pair_indices(4, "all") == [(0, 1), (2, 0), (1, 2), (0, 3), (3, 1), (2, 3)]
    assert pair_indices(4, "ring") == [(0, 1), (1, 2), (2, 3), (3, 0)]


@pytest.mark.parametrize("count", range(2, 27))
def test_every_answer_stands_first_in_half_of_its_pairs(count: int) -> None:
    every, ring = pair_indices(count, "all"), pair_indices(count, "ring")
    assert sorted(tuple(sorted(p)) for p in every) == [(i, j) for i in range(count) for j in range(i + 1, count)]
    assert {tuple(sorted(p)) for p in ring} <= {tuple(sorted(p)) for p in every}
    assert len(ring) == (count if count > 2 else 1)
    for pairs in (every, ring):
        for answer in range(count):
            first, second = (sum(p[place] == answer for p in pairs) for place in (0, 1))
            assert abs(first - second) <= 1
            assert first + second > 0


def test_three_answers_make_three_pairs_and_two_make_the_prompts_own() -> None:
    row, engine = sample({"response_a": "one", "response_b": f"two{CUT}", "response_c": "one"})
    assert len({r.seed for r in engine.asked.values()}) == 3
    assert row["responses"] == [
        {"text": "one", "ended": True},
        {"text": "two", "ended": False},
        {"text": "one", "ended": True},
    ]
    pairs = pairs_of(row, "all")
    assert [(p["response_a"], p["response_b"], p["flags"]) for p in pairs] == [
        ("one", "two", ["truncated:response_b"]),
        ("one", "one", []),  # the third and the first
        ("two", "one", ["truncated:response_a"]),
    ]
    assert [p["id"] for p in pairs] == ["row", row_id(["row", 2, 0]), row_id(["row", 1, 2])]
    assert all(p["messages"] == row["messages"] and p["seed"] == 3 for p in pairs)
    two, _ = sample({"response_a": "one", "response_b": f"two{CUT}"})
    assert pairs_of(two, "all") == pairs_of(two, "ring")
    (only,) = to_table(pairs_of(two, "all"), RESPONSE_PAIR).to_pylist()
    assert only == {k: v for k, v in pairs[0].items() if k != "responses"}  # a third answer changes nothing in it
    assert to_table([row], RESPONSES).to_pylist() == [row]


def test_an_empty_answer_and_a_long_prompt_are_bad_rows() -> None:
    with pytest.raises(DataError, match="response_b came out empty"):
        sample({"response_a": "one", "response_b": ""})
    long = prompt_row("a b c d", "e f g h", "i")
    answers = {"response_a": "one", "response_b": "two"}
    with pytest.raises(DataError, match="the prompt has 13 tokens, more than 8"):  # 9 words and 4 markers
        sample(answers, long, max_prompt_tokens=8)
    done, engine = sample(answers, long, max_prompt_tokens=8, too_long="truncate")
    assert engine.prompt("response_b") == "\n\nHuman: i\n\nAssistant:"
    (pair,) = pairs_of(done, "all")
    assert pair["flags"] == ["shortened:prompt"]
    assert pair["messages"] == long["messages"]
