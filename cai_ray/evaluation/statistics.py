"""Statistics of evaluation: means with bootstrap intervals, refusals, win rates. numpy only."""

import re
from collections.abc import Sequence

import numpy as np

# Openings with which assistants decline, in English and Chinese. A measure of style: it does not judge whether
# declining was right.
_REFUSAL = re.compile(
    r"^\W*sorry\b(?! to hear)|\b(?:i(?:'|’)?(?: a)?m (?:really |very |so )?sorry(?! to hear)|i apologi[sz]e\b"
    r"|i (?:can(?:'|’)?t(?! wait)|cannot|can not|won(?:'|’)?t|will not|must decline)"
    r"|i(?:'|’)?(?: a)?m (?:not able|unable|not comfortable|not going)|as an ai\b"
    r"|i (?:do not|don(?:'|’)?t) feel comfortable)"
    r"|抱歉|对不起|我不能|我无法",
    re.IGNORECASE,
)


_WORD = re.compile(r"[\u3400-\u9fff]|[^\s\u3000-\u303f\u3400-\u9fff\uff00-\uffef]+")


def count_words(text: str) -> int:
    """What stands between spaces; of Chinese, which has none, the characters."""
    return len(_WORD.findall(text))


def looks_like_refusal(text: str) -> bool:
    """Whether the first 200 characters hold a phrase with which assistants decline."""
    return bool(_REFUSAL.search(text[:200]))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) with the 95% percentile-bootstrap interval of 1,000 resamples; NaN where there is none."""
    x = np.asarray(values, dtype=np.float64)
    if x.size < 2:  # a single value says nothing of how others scatter
        return float(x.sum() if x.size else "nan"), float("nan"), float("nan")
    picks = np.random.default_rng(0).integers(0, x.size, (1000, x.size))
    low, high = np.percentile(x[picks].mean(1), [2.5, 97.5])
    return float(x.mean()), float(low), float(high)


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Per prompt 1 where ours scores higher, 0 where lower, 0.5 at a tie.

    Raises:
        ValueError: the lengths differ.
    """
    return [1.0 if a > b else 0.0 if a < b else 0.5 for a, b in zip(ours, theirs, strict=True)]
