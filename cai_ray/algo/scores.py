"""What a judge's log-probabilities say: which choice, which score, and which of two scored answers is better.

Plain numbers, no tensors: engines and drivers use it without torch. K choices; scores are 1 to K, rescaled to [-1, 1]
(Lee et al. 2023, arXiv 2309.00267, where a feedback model's score is the reward itself).
"""

from collections.abc import Sequence

import numpy as np

from cai_ray.errors import DataError


def choice_distribution(logprobs: Sequence[float]) -> list[float]:
    """The softmax over K choices' log-probabilities (nats).

    Raises:
        DataError: none is finite, or one is NaN or +inf: there is no preference to read, and none is guessed.
    """
    x = np.asarray(logprobs, dtype=np.float64)
    if not np.isfinite(x.max()):
        raise DataError(
            f"none of {len(x)} choices has a finite log-probability, so there is no preference to read",
            "check the choices' tokens",
        )
    weights = np.exp(x - x.max())
    return (weights / weights.sum()).tolist()


def expected_score(distribution: Sequence[float]) -> float:
    """The mean of the scores 1 to K under their probabilities [K], rescaled so that 1 becomes -1 and K becomes 1."""
    p = np.asarray(distribution, dtype=np.float64)
    return float(p @ np.linspace(-1, 1, len(p)))


def probability_higher(distribution_a: Sequence[float], distribution_b: Sequence[float]) -> float:
    """P(score of A > score of B) + P(they are equal) / 2, for independent scores with these probabilities, [K] each."""
    a, b = (np.asarray(d, dtype=np.float64) for d in (distribution_a, distribution_b))
    return float(a @ (np.cumsum(b) - b / 2))
