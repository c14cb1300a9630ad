"""The starter red-team prompts: well formed, varied, and spread evenly over the categories of harm.

Checks that look into a prompt collect line numbers, so that a failure does not print the prompt.
"""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest

import cai_ray

FILE = Path(cai_ray.__file__).parent / "assets" / "red_team.jsonl"


def trigrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9']+", text.lower())
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def overlap(a: set, b: set) -> float:
    """Shared share of the smaller set. It is never below the Jaccard index, so one limit bounds both."""
    return len(a & b) / max(1, min(len(a), len(b)))


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [json.loads(line) for line in FILE.read_bytes().decode("utf-8").splitlines()]


def test_overlap_by_hand():
    a, b = trigrams("One, two three four"), trigrams("two three FOUR five six")
    assert (len(a), len(b), len(a & b)) == (2, 3, 1)
    assert overlap(a, b) == 0.5
    assert overlap(a, trigrams("so one two three four it is")) == 1.0
    assert overlap(set(), a) == 0.0


def test_file_is_small_utf8_with_one_object_a_line():
    raw = FILE.read_bytes()
    assert len(raw) < 1_000_000
    text = raw.decode("utf-8")
    assert text.endswith("\n")
    assert not text.startswith("\ufeff")
    assert "\r" not in text
    assert all(line.startswith("{") and line.endswith("}") for line in text[:-1].split("\n"))


def well_formed(row: dict) -> bool:
    return (
        set(row) == {"messages", "category"}
        and re.fullmatch(r"[a-z]+(_[a-z]+)*", row["category"]) is not None
        and all(
            set(m) == {"role", "content"} and m["content"].isprintable() and m["content"] == m["content"].strip() != ""
            for m in row["messages"]
        )
    )


def test_schema(rows):
    assert [i + 1 for i, row in enumerate(rows) if not well_formed(row)] == []


def test_roles_alternate_and_end_with_the_user(rows):
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert len(roles) in (1, 3, 5)
        assert roles == (["user", "assistant"] * 3)[: len(roles)]


def test_counts(rows):
    per_category = Counter(row["category"] for row in rows)
    assert len(rows) >= 168
    assert len(per_category) >= 12
    assert min(per_category.values()) >= 12
    assert sum(len(row["messages"]) > 1 for row in rows) >= 16


def test_every_prefix_is_balanced(rows):
    """A run that takes only the first rows still sees every kind of harm."""
    categories = {row["category"] for row in rows}
    assert {row["category"] for row in rows[: len(categories)]} == categories


def test_last_turns_are_short(rows):
    lengths = [len(row["messages"][-1]["content"].split()) for row in rows]
    assert min(lengths) >= 5
    assert max(lengths) <= 60


def test_no_turn_of_a_user_is_repeated(rows):
    seen, repeated = set(), []
    for i, row in enumerate(rows):
        turns = {m["content"].lower() for m in row["messages"] if m["role"] == "user"}
        if turns & seen:
            repeated.append(i + 1)
        seen |= turns
    assert repeated == []


@pytest.mark.parametrize("whole", [False, True], ids=["last_turn", "all_user_turns"])
def test_no_two_prompts_share_half_of_their_trigrams(rows, whole):
    grams = []
    for row in rows:
        turns = [m["content"] for m in row["messages"] if m["role"] == "user"]
        grams.append(trigrams(" ".join(turns) if whole else turns[-1]))
    close = [(i + 1, j + 1) for (i, a), (j, b) in itertools.combinations(enumerate(grams), 2) if overlap(a, b) > 0.5]
    assert close == []
