"""What can be said of a judge: from its labels alone, and against gold comparisons. numpy only, on `LabeledPair` rows.

Sides and probabilities are those of the votes' mean, before `hard` or `clamp`; a tie is half on each side.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from cai_ray.records import Row

NEAR_TIE = 0.05  # distance from 0.5
Z = 1.959964  # two-sided 95% of the normal distribution


def opinion(row: Row) -> float:
    """P(A better) as voted: the mean over the votes."""
    return float(np.mean([v["prob"] for v in row["votes"]]))


def judge_statistics(rows: Sequence[Row]) -> dict[str, float]:
    """Statistics that need no gold; one without a case (such as agreement of a single principle) is left out.

    Returns:
        mean_label: mean of the final labels.
        mean_entropy: of the opinions, nats.
        near_ties: share of opinions within 0.05 of a half.
        prefers_first, prefers_longer: agreement with 'the first is better' and 'the longer is better'.
        prefers_letter_a: share of votes for the response that was shown as (A), whatever the principle asks for.
        position_bias: share of questions, asked in both orders, in which both answers were the same letter.
        principle_agreement: share of pairs of principles on one comparison that take the same side.
    """
    if not rows:
        return {}
    p = np.array([opinion(r) for r in rows])
    sides = np.sign(p - 0.5)
    longer = np.array([np.sign(len(r["response_a"]) - len(r["response_b"])) for r in rows])
    q = np.clip(np.stack([p, 1 - p]), 1e-300, 1)
    found = {
        "mean_label": np.mean([r["label_prob"] for r in rows]),
        "mean_entropy": -(q * np.log(q)).sum(0).mean(),
        "near_ties": np.mean(np.abs(p - 0.5) < NEAR_TIE),
        "prefers_first": _agreement(sides),
        "prefers_letter_a": _agreement([_letter(v) for r in rows for v in r["votes"] if v["logprob_a"] is not None]),
        "prefers_longer": _agreement((sides * longer)[longer != 0]),
        "position_bias": _agreement([s for r in rows for s in _both_orders(r)]),
        "principle_agreement": _agreement([s for r in rows for s in _between_principles(r)]),
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def gold_statistics(rows: Iterable[Row], gold: Mapping[str, float]) -> dict[str, float]:
    """How the judge does on comparisons whose answer is known.

    Args:
        rows: labelled comparisons.
        gold: P(A better) by id.

    Returns:
        comparisons: how many.
        accuracy, accuracy_low, accuracy_high: share on gold's side, with its 95% interval (absent for no comparison).
        calibration_error: of the opinions.
    """
    pairs = np.array([(opinion(r), gold[r["id"]]) for r in rows if r["id"] in gold]).reshape(-1, 2)
    right = _agreement(np.sign(pairs - 0.5).prod(1))
    low, high = wilson_interval(right or 0.0, len(pairs))
    found = {"comparisons": len(pairs), "accuracy_low": low, "accuracy_high": high}
    return found if right is None else {"accuracy": right, **found, "calibration_error": calibration_error(*pairs.T)}


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """The 95% interval of a proportion `share` of `n` cases (Wilson 1927); (0, 1) for none."""
    if n == 0:
        return 0.0, 1.0
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return middle - half, middle + half


def calibration_error(prob: Sequence[float] | np.ndarray, observed: Sequence[float] | np.ndarray) -> float:
    """`algo.preference.expected_calibration_error` over 10 bins, without torch."""
    p, y = np.asarray(prob, dtype=np.float64), np.asarray(observed, dtype=np.float64)
    return float(np.abs(np.bincount(np.clip((p * 10).astype(int), 0, 9), p - y)).sum() / max(1, len(p)))


def _agreement(signs: Sequence[float] | np.ndarray) -> float | None:
    """Mean over 1 (same side), -1 (other side) and 0 (a tie, a half); None for no case."""
    return float((1 + np.mean(signs)) / 2) if len(signs) else None


def _both_orders(row: Row) -> list[float]:
    """For each question asked in both orders 1 where both answers are the same letter, else -1."""
    first, second = ([v for v in row["votes"] if v["swapped"] == swapped] for swapped in (False, True))
    pairs = zip(first, second, strict=True) if second else ()
    return [float(np.prod([_letter(v) for v in pair])) for pair in pairs]


def _letter(vote: Mapping[str, Any]) -> float:
    """1 for the response that was shown as (A), -1 for (B)."""
    return float(np.sign(vote["logprob_a"] - vote["logprob_b"]))


def _between_principles(row: Row) -> list[float]:
    """For each two principles that were asked about the row 1 where they take the same side, else -1."""
    votes: dict[str, list[float]] = {}
    for v in row["votes"]:
        votes.setdefault(v["principle_id"], []).append(v["prob"])
    return [a * b for a, b in combinations((float(np.sign(np.mean(p) - 0.5)) for p in votes.values()), 2)]
