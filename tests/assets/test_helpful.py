"""The starter helpful prompts keep their schema, size and variety."""

import itertools
import json
import re
from pathlib import Path

import pytest

import cai_ray

FILE = Path(cai_ray.__file__).parent / "assets" / "helpful.jsonl"


def trigrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def overlap(a: set, b: set) -> float:
    """Share of the smaller set that the other holds too."""
    return len(a & b) / min(len(a), len(b))


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


def test_overlap_by_hand():
    a, b = trigrams("How do I boil an egg?"), trigrams("how do I boil rice")  # 4 and 3 trigrams, 2 shared
    assert overlap(a, b) == pytest.approx(2 / 3)


def test_file_is_under_one_megabyte():
    assert FILE.stat().st_size < 1_000_000


def test_counts(rows):
    categories = [row["category"] for row in rows]
    assert len(rows) >= 168
    assert len(set(categories)) >= 12
    assert min(map(categories.count, set(categories))) >= 5  # no category is there for show
    assert categories.count("sensitive_sounding") >= 5
    assert sum(len(row["messages"]) > 1 for row in rows) >= 20


def test_schema(rows):
    for row in rows:
        assert list(row) == ["messages", "response", "category"]
        assert re.fullmatch("[a-z_]+", row["category"])
        for message in row["messages"]:
            assert list(message) == ["role", "content"]


def test_turns_alternate_and_end_with_the_user(rows):
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert len(roles) % 2 == 1
        assert roles == [("user", "assistant")[i % 2] for i in range(len(roles))]


def test_texts_are_whole_and_hold_no_turn_marker(rows):
    for row in rows:
        for text in [row["response"], *(message["content"] for message in row["messages"])]:
            assert text
            assert text == text.strip()
            assert not re.search(r"(?:^|\n)(?:Human|Assistant):|<\|", text)
            assert text.count("```") % 2 == 0


def test_responses_are_concise(rows):
    for row in rows:
        assert 20 <= len(row["response"].split()) <= 80, row["messages"][-1]["content"]


def test_no_duplicates(rows):
    prompts = [tuple(message["content"].casefold() for message in row["messages"]) for row in rows]
    assert len(set(prompts)) == len(rows)
    assert len({row["response"] for row in rows}) == len(rows)


def test_prompts_are_varied(rows):
    prompts = [" ".join(message["content"] for message in row["messages"]) for row in rows]
    grams = [trigrams(prompt) for prompt in prompts]
    assert all(grams)
    for (i, a), (j, b) in itertools.combinations(enumerate(grams), 2):
        assert overlap(a, b) <= 0.5, f"too alike: {prompts[i]!r} and {prompts[j]!r}"
