import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_ray.algo.scores import choice_distribution, expected_score, probability_higher
from cai_ray.errors import DataError


def test_two_choices_are_a_softmax():
    assert choice_distribution([math.log(0.3), math.log(0.1)]) == pytest.approx([0.75, 0.25])
    assert choice_distribution([-1234.5, -1234.5]) == [0.5, 0.5]  # far below what exp can hold
    assert choice_distribution([-math.inf, -2.0]) == [0.0, 1.0]


@pytest.mark.parametrize("logprobs", [[-math.inf, -math.inf], [math.nan, -1.0], [-1.0, math.nan]])
def test_no_preference_is_never_a_guess(logprobs):
    with pytest.raises(DataError, match="no preference to read"):
        choice_distribution(logprobs)


def test_the_ends_of_the_scale_are_minus_one_and_one():
    only = lambda n: [float(k == n) for k in range(1, 11)]  # noqa: E731
    assert [expected_score(only(n)) for n in (1, 10)] == [-1.0, 1.0]
    assert expected_score([0.1] * 10) == pytest.approx(0.0)
    # 7 of 1 to 10 lies at (7 - 1) / 9 of the way: 2 * 6/9 - 1 = 1/3
    assert expected_score(only(7)) == pytest.approx(1 / 3)
    # half 10, half 4: the mean is 7
    assert expected_score([0, 0, 0, 0.5, 0, 0, 0, 0, 0, 0.5]) == pytest.approx(1 / 3)


def test_which_of_two_scores_is_higher():
    # A is 1 or 3, each 0.5; B is 1, 2, 3 with 0.2, 0.5, 0.3.
    # P(A > B) = 0.5 * 0 + 0.5 * (0.2 + 0.5) = 0.35; P(equal) = 0.5 * 0.2 + 0.5 * 0.3 = 0.25
    a, b = [0.5, 0.0, 0.5], [0.2, 0.5, 0.3]
    assert probability_higher(a, b) == pytest.approx(0.475)
    assert probability_higher(b, a) == pytest.approx(0.525)
    assert probability_higher(a, a) == pytest.approx(0.5)
    assert probability_higher([0, 0, 1], [1, 0, 0]) == 1.0


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-30, 0), min_size=2, max_size=8), st.floats(-100, 100))
def test_distributions_add_up_to_one_and_know_no_common_factor(logprobs, shift):
    p = choice_distribution(logprobs)
    assert sum(p) == pytest.approx(1)
    assert choice_distribution([x + shift for x in logprobs]) == pytest.approx(p, abs=1e-9)
    assert choice_distribution(logprobs[::-1]) == pytest.approx(p[::-1])
    assert expected_score(p[::-1]) == pytest.approx(-expected_score(p), abs=1e-12)
    assert probability_higher(p, p[::-1]) + probability_higher(p[::-1], p) == pytest.approx(1)
