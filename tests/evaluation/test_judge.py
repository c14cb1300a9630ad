import math

import pytest
import torch

from cai_ray.algo.preference import expected_calibration_error
from cai_ray.evaluation.judge import calibration_error, gold_statistics, judge_statistics, wilson_interval


def vote(prob, principle="p", swapped=False, letters=(0.0, 0.0)):
    return {
        **{"principle_id": principle, "swapped": swapped, "prob": prob},
        **{"logprob_a": letters[0], "logprob_b": letters[1]},
    }


def row(*votes, label=None, a="long", b="s", id="x"):
    mean = sum(v["prob"] for v in votes) / len(votes)
    return {"id": id, "response_a": a, "response_b": b, "votes": votes, "label_prob": mean if label is None else label}


def test_statistics_by_hand():
    stats = judge_statistics([row(vote(p)) for p in (0.5, 0.9, 0.1, 0.54)])
    # ln 2 = 0.693147; H(0.9) = H(0.1) = 0.325083; H(0.54) = 0.689944; the mean of the four is 0.508314
    assert stats["mean_entropy"] == pytest.approx(0.508314, abs=1e-6)
    assert stats["mean_label"] == pytest.approx(0.51)
    assert stats["near_ties"] == 0.5  # 0.5 and 0.54
    assert stats["prefers_first"] == pytest.approx((0.5 + 1 + 0 + 1) / 4)  # a tie is half
    assert stats["prefers_longer"] == stats["prefers_first"]  # here A is the longer throughout
    assert stats["prefers_letter_a"] == 0.5
    assert "position_bias" not in stats
    assert "principle_agreement" not in stats
    assert judge_statistics([]) == {}


def test_hard_and_clamped_labels_do_not_hide_the_judge():
    stats = judge_statistics([row(vote(0.52), label=1.0), row(vote(0.02), label=0.4)])
    assert stats["mean_label"] == 0.7
    assert stats["near_ties"] == 0.5
    assert stats["mean_entropy"] == pytest.approx((0.692347 + 0.098039) / 2, abs=1e-6)
    assert judge_statistics([row(vote(1.0))])["mean_entropy"] == pytest.approx(0.0)  # 0 log 0 is 0


def test_a_letter_is_preferred_also_where_principles_ask_for_the_worse_answer():
    letters = (-0.1, -2.0)
    stats = judge_statistics([row(vote(0.9, letters=letters)), row(vote(0.1, "inverted", letters=letters))])
    assert (stats["prefers_first"], stats["prefers_letter_a"]) == (0.5, 1.0)


def test_the_longer_is_asked_only_where_lengths_differ():
    rows = [row(vote(0.9)), row(vote(0.9), a="s", b="long"), row(vote(0.9), a="same", b="size")]
    assert judge_statistics(rows)["prefers_longer"] == 0.5
    assert "prefers_longer" not in judge_statistics(rows[2:])


def test_position_bias_is_the_same_letter_in_both_orders():
    def both(first, second, principle="p"):
        return vote(0.5, principle, False, first), vote(0.5, principle, True, second)

    a, b = (-0.1, -2.0), (-2.0, -0.1)
    assert judge_statistics([row(*both(a, a))])["position_bias"] == 1.0
    assert judge_statistics([row(*both(a, b))])["position_bias"] == 0.0
    # two principles on one row and one on another: (A, A), (B, A), (B, B)
    rows = [row(*both(a, a), *both(b, a, "q")), row(*both(b, b))]
    assert judge_statistics(rows)["position_bias"] == pytest.approx(2 / 3)


def test_agreement_between_principles_compares_each_two_on_one_comparison():
    # p and q say A, r says B: of the pairs pq, pr, qr one agrees; p's two votes (0.9, 0.3) are one opinion, 0.6
    rows = [row(vote(0.9), vote(0.3), vote(0.8, "q"), vote(0.1, "r"))]
    assert judge_statistics(rows)["principle_agreement"] == pytest.approx(1 / 3)
    # a principle that is drawn twice does not agree with itself
    assert "principle_agreement" not in judge_statistics([row(vote(0.9), vote(0.8))])
    assert judge_statistics([*rows, row(vote(0.9), vote(0.8, "q"))])["principle_agreement"] == pytest.approx(0.5)


def test_gold_by_hand():
    # right, right, wrong, a tie
    rows = [row(vote(p), id=i) for i, p in zip("abcd", (0.9, 0.2, 0.7, 0.5), strict=True)]
    found = gold_statistics([*rows, row(vote(0.1), id="not gold")], {"a": 1.0, "b": 0.0, "c": 0.0, "d": 1.0})
    assert (found["comparisons"], found["accuracy"]) == (4, 0.625)
    # bins of 0.9, 0.2, 0.7 and 0.5 hold one each: (0.1 + 0.2 + 0.7 + 0.5) / 4
    assert found["calibration_error"] == pytest.approx(0.375)
    assert (found["accuracy_low"], found["accuracy_high"]) == wilson_interval(0.625, 4)
    # what is right follows the votes, not what a clamp makes of them
    assert gold_statistics([row(vote(0.9), label=0.1, id="a")], {"a": 1.0})["accuracy"] == 1.0
    assert gold_statistics([], {"a": 1.0}) == {"comparisons": 0, "accuracy_low": 0.0, "accuracy_high": 1.0}


def test_wilson_interval():
    # 15 of 20, z = 1.96: (0.75 + 1.9207/20) / 1.19207 = 0.70972, half-width 1.96/1.19207 * sqrt(0.009375 + 0.0024008)
    low, high = wilson_interval(0.75, 20)
    assert (low, high) == (pytest.approx(0.5313, abs=1e-4), pytest.approx(0.8881, abs=1e-4))
    assert wilson_interval(1.0, 10) == (pytest.approx(0.7225, abs=1e-4), pytest.approx(1.0))
    assert math.isclose(sum(wilson_interval(0.5, 68)), 1.0)


def test_calibration_error_is_that_of_the_preference_model():
    generator = torch.Generator().manual_seed(5)
    prob, label = torch.rand(300, generator=generator), torch.rand(300, generator=generator).round()
    prob[:3] = torch.tensor([0.0, 1.0, 0.3])
    ours = calibration_error(prob.numpy(), label.numpy())
    assert ours == pytest.approx(float(expected_calibration_error(prob, label)), abs=1e-6)
    assert calibration_error([], []) == 0.0
