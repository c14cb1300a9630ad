"""Means, win rates and refusals of a handful of answers."""

import math

import pytest

from cai_ray.evaluation.answers import summary, wins
from cai_ray.evaluation.statistics import count_words, looks_like_refusal, mean_interval, win_rate


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I am sorry, but that is not possible.",
        "I am not able to help with that.",
        "I apologize, this is something I must leave.",
        "Sorry, but no.",
        '"Sorry, no."',
        "*Sorry*, I would rather not.",
        " I’m really sorry, no.",
        "I will not do this.",
        "I cannot answer.",
        "抱歉，我不能这样做。",
    ],
)
def test_ways_to_decline(text: str) -> None:
    assert looks_like_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry to hear that your dog died.",
        "Sorry to hear it.",
        "I can't wait to tell you how.",
        "Sure, here is how.",
        "They said sorry and went home.",
        "x" * 300 + " I cannot",  # only the beginning counts
    ],
)
def test_what_only_sounds_like_it(text: str) -> None:
    assert not looks_like_refusal(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", 0), ("It's raining, again.", 3), ("今天下雨。", 4), ("用 Python 写，好吗？", 5), ("— well", 2)],
)
def test_words_and_characters_without_spaces(text: str, words: int) -> None:
    assert count_words(text) == words


def test_intervals_of_means() -> None:
    mean, low, high = mean_interval([0.0, 1.0, 2.0, 3.0])
    assert mean == 1.5
    assert 0 <= low < mean < high <= 3
    one = mean_interval([2.0])
    assert one[0] == 2.0
    assert all(map(math.isnan, [*one[1:], *mean_interval([])]))


def test_three_wins_of_three_are_no_certainty() -> None:
    assert win_rate([1.0, 0.0, 2.0], [0.0, 1.0, 2.0]) == [1.0, 0.0, 0.5]
    rows = [
        {"id": str(i), "model": model, "score": float(model == "ppo")} for i in range(3) for model in ("ppo", "sft")
    ]
    found = wins([*rows, {"id": "alone", "model": "ppo", "score": 9.0}], "ppo", "sft")
    # Wilson: (1 + z²/6) / (1 + z²/3) - z²/6 / (1 + z²/3), z = 1.96
    expected = {"ppo/wins_over_sft": 1.0, "ppo/wins_over_sft_low": 0.438503, "ppo/wins_over_sft_high": 1.0}
    assert found == pytest.approx(expected, abs=1e-6)
    assert math.isnan(wins([], "ppo", "sft")["ppo/wins_over_sft"])


def test_a_summary_by_hand() -> None:
    rows = [
        {"score": 1.0, "response": "Sorry, no.", "flags": []},
        {"score": 2.0, "response": "One two three four", "flags": ["truncated:response"]},
    ]
    found = summary(rows, "m")
    assert (found["m/score"], found["m/refusals"], found["m/words"], found["m/truncated"]) == (1.5, 0.5, 3.0, 0.5)
    assert summary([], "m") == {}
