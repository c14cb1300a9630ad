"""The gold comparisons of the judge gate: schema, balance, and no give-away of the answer by length."""

import itertools
import json
import re
from collections import Counter
from typing import Any

import pytest

from cai_ray.config import Source
from cai_ray.shipped import source_path
from cai_ray.sources import read_comparisons

REFUSAL = re.compile(r"(i'm |i am )?(sorry|afraid|not able|unable)\b|i (can't|cannot|won't|don't)\b", re.IGNORECASE)
REPLIES = ("chosen", "rejected")

Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [json.loads(line) for line in source_path("starter:judge_gold").read_text(encoding="utf-8").splitlines()]


def three_grams(row: Row) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", " ".join(m["content"] for m in row["messages"] if m["role"] == "user").lower())
    return set(zip(words, words[1:], words[2:], strict=False)) or {tuple(words)}


def test_counts(rows: list[Row]) -> None:
    assert len(rows) >= 64
    kinds = Counter(row["category"] for row in rows)
    assert kinds.keys() == {"harmless", "helpful", "honest"}
    assert 0.4 <= kinds["harmless"] / len(rows) <= 0.6
    assert sum(len(row["messages"]) > 1 for row in rows) >= 2


def test_schema(rows: list[Row]) -> None:
    for row in rows:
        assert row.keys() == {"messages", "chosen", "rejected", "category"}
        assert [m["role"] for m in row["messages"]] == [
            ("user", "assistant")[i % 2] for i in range(len(row["messages"]))
        ]
        for text in (*(m["content"] for m in row["messages"]), row["chosen"], row["rejected"]):
            assert text
            assert text == text.strip()
            assert not re.search(r"\[\[\[|\]\]\]|<\||^(Human|Assistant|H|A):", text, re.MULTILINE), text
        for reply in REPLIES:
            assert 8 <= len(row[reply].split()) <= 60, row[reply]
    replies = [row[reply] for row in rows for reply in REPLIES]
    assert len(set(replies)) == len(replies)


def test_all_are_read_as_comparisons(rows: list[Row]) -> None:
    good, bad, *_ = read_comparisons(Source(path="starter:judge_gold"))
    assert (len(good), bad) == (len(rows), [])
    assert {r["label_prob"] for r in good} == {1.0}


@pytest.mark.parametrize("harmless", [True, False])
def test_length_does_not_give_the_answer_away(rows: list[Row], harmless: bool) -> None:
    half = [row for row in rows if (row["category"] == "harmless") == harmless]
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in half) / len(half)
    assert 0.45 <= longer <= 0.55
    total = {reply: sum(len(row[reply]) for row in half) for reply in REPLIES}
    assert total["chosen"] == pytest.approx(total["rejected"], rel=0.15)


def test_declining_is_not_always_right(rows: list[Row]) -> None:
    declined = {reply: sum(bool(REFUSAL.match(row[reply])) for row in rows) for reply in REPLIES}
    assert declined["chosen"] >= 4
    assert declined["rejected"] >= 4


def test_prompts_differ_here_and_from_the_starter_data(rows: list[Row]) -> None:
    grams = [three_grams(row) for row in rows]
    for (i, a), (j, b) in itertools.combinations(enumerate(grams), 2):
        assert len(a & b) <= 0.5 * min(len(a), len(b)), (rows[i]["messages"][-1], rows[j]["messages"][-1])
    starter = source_path("starter:helpful_comparisons").read_text(encoding="utf-8").splitlines()
    for other in map(three_grams, map(json.loads, starter)):
        assert all(len(other & mine) < 0.5 * min(len(other), len(mine)) for mine in grams)
