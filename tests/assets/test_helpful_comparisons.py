"""The starter helpfulness comparisons: schema, variety, and no give-away of the label by length or opening words."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import cai_ray

PATH = Path(cai_ray.__file__).parent / "assets" / "helpful_comparisons.jsonl"
REFUSAL = re.compile(r"(i'm |i am )?(sorry|afraid|not able|unable)\b|i (can't|cannot|can not|won't)\b", re.IGNORECASE)
REPLIES = ("chosen", "rejected")

Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [json.loads(line) for line in PATH.read_text(encoding="utf-8").splitlines()]


def three_grams(row: Row) -> set[tuple[str, ...]]:
    """Word 3-grams over the user's turns; a shorter prompt is one gram, so it still counts as a duplicate of itself."""
    words = re.findall(r"\w+", " ".join(m["content"] for m in row["messages"] if m["role"] == "user").lower())
    return set(zip(words, words[1:], words[2:], strict=False)) or {tuple(words)}


def test_counts_and_size(rows: list[Row]) -> None:
    assert len(rows) >= 168
    per_category = Counter(row["category"] for row in rows)
    assert len(per_category) >= 12
    assert min(per_category.values()) >= 8
    assert sum(len(row["messages"]) > 1 for row in rows) >= 12
    assert PATH.stat().st_size < 1_000_000


def test_schema_and_reply_lengths(rows: list[Row]) -> None:
    for row in rows:
        assert row.keys() == {"messages", "chosen", "rejected", "category"}
        for text in (row["chosen"], row["rejected"], row["category"], *(m["content"] for m in row["messages"])):
            assert isinstance(text, str)
            assert text
            assert text == text.strip()
            assert not re.search(r"\[\[\[|\]\]\]|<\||^(Human|Assistant|H|A):", text, re.MULTILINE), text
        for reply in REPLIES:
            assert 8 <= len(row[reply].split()) <= 60, row[reply]


def test_turns_alternate_from_user_to_user(rows: list[Row]) -> None:
    for row in rows:
        assert all(message.keys() == {"role", "content"} for message in row["messages"])
        roles = [message["role"] for message in row["messages"]]
        assert len(roles) % 2 == 1
        assert roles == [("user", "assistant")[i % 2] for i in range(len(roles))]


def test_replies_are_distinct(rows: list[Row]) -> None:
    replies = [row[reply] for row in rows for reply in REPLIES]
    assert len(set(replies)) == len(replies)


def test_length_does_not_leak_the_label(rows: list[Row]) -> None:
    lengths = {reply: [len(row[reply]) for row in rows] for reply in REPLIES}
    longer = sum(c > r for c, r in zip(lengths["chosen"], lengths["rejected"], strict=True)) / len(rows)
    assert 0.45 <= longer <= 0.55
    assert sum(lengths["chosen"]) == pytest.approx(sum(lengths["rejected"]), rel=0.1)
    # "Of middling length" must not mean "chosen" either: guess the likelier label in each 20-character bin.
    bins = Counter((reply, n // 20) for reply in REPLIES for n in lengths[reply])
    hits = sum(max(bins[reply, b] for reply in REPLIES) for b in {b for _, b in bins})
    assert hits / (2 * len(rows)) <= 0.62


def test_opening_words_do_not_leak_the_label(rows: list[Row]) -> None:
    refusals = {reply: sum(bool(REFUSAL.match(row[reply])) for row in rows) for reply in REPLIES}
    assert 0 < refusals["rejected"] <= 0.15 * len(rows)
    assert refusals["chosen"] > 0, "an honest 'I can't see live rates' must win somewhere"


def test_prompts_differ(rows: list[Row]) -> None:
    grams = [three_grams(row) for row in rows]
    for (i, a), (j, b) in itertools.combinations(enumerate(grams), 2):
        assert len(a & b) <= 0.5 * min(len(a), len(b)), (rows[i]["messages"][-1], rows[j]["messages"][-1])
