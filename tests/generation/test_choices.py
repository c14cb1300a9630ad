import math

import pytest

from cai_ray.errors import DataError
from cai_ray.generation.engine import ChoiceRequest, plan_choices

PROMPT = [1, 2]


def test_shared_ends_of_two_choices_cost_nothing():
    # " (A)" and " (B)": the bracket joins the prompt, the closing one is not scored
    plan = plan_choices(PROMPT, [[7, 20, 9], [7, 21, 9]])
    assert plan.requests == [ChoiceRequest([1, 2, 7], (20, 21))]
    assert plan.scores([{20: -0.25, 21: -1.5}]) == [-0.25, -1.5]


def test_choices_that_share_a_part_are_scored_up_to_where_they_part():
    plan = plan_choices(PROMPT, [[5, 6, 7], [5, 6, 8], [9, 6, 7]])
    assert [(r.prompt_ids, r.token_ids) for r in plan.requests] == [
        ([1, 2], (5, 9)),
        ([1, 2, 5], (6,)),
        ([1, 2, 5, 6], (7, 8)),
    ]
    # log p(5) + log p(6|5) + log p(7|5,6), and so on; the third needs its first token only
    assert plan.scores([{5: -1.0, 9: -2.0}, {6: -0.5}, {7: -0.25, 8: -3.0}]) == [-1.75, -4.5, -2.0]


def test_one_does_not_absorb_ten():
    # 1, 2 and 10 written as digits: P(1) = 0.5, P(2) = 0.25; after 1 comes 0 with 0.2
    plan = plan_choices(PROMPT, [[11], [12], [11, 10]])
    assert [(r.prompt_ids, r.token_ids) for r in plan.requests] == [([1, 2], (11, 12)), ([1, 2, 11], (10,))]
    scores = plan.scores([{11: math.log(0.5), 12: math.log(0.25)}, {10: math.log(0.2)}])
    assert [math.exp(s) for s in scores] == pytest.approx([0.4, 0.25, 0.1])


def test_one_and_ten_as_tokens_of_their_own_need_one_request():
    plan = plan_choices(PROMPT, [[7, 11], [7, 12], [7, 20]])
    assert plan.requests == [ChoiceRequest([1, 2, 7], (11, 12, 20))]
    assert plan.scores([{11: -0.5, 12: -2.0, 20: -1.5}]) == [-0.5, -2.0, -1.5]


def test_several_choices_may_begin_with_one_and_with_each_other():
    # [5] is the beginning of [5, 6] and [5, 8, 8]; [5, 6] of [5, 6, 7]: the shared 5 joins the prompt
    plan = plan_choices(PROMPT, [[5, 6, 7], [5], [5, 6], [5, 8, 8]])
    assert [(r.prompt_ids, r.token_ids) for r in plan.requests] == [([1, 2, 5], (6, 8)), ([1, 2, 5, 6], (7,))]
    scores = plan.scores([{6: math.log(0.5), 8: math.log(0.2)}, {7: math.log(0.4)}])
    assert [math.exp(s) for s in scores] == pytest.approx([0.5 * 0.4, 0.3, 0.5 * 0.6, 0.2])


def test_nothing_is_left_for_a_choice_when_the_longer_ones_take_all():
    plan = plan_choices(PROMPT, [[5], [5, 6]])
    assert plan.scores([{6: 1e-7}]) == [-math.inf, 1e-7]  # a float32 log-probability may round to above 0


@pytest.mark.parametrize("choices", [[[5]], [[5], [5]], [[5, 6], [7], [5, 6]], [[5, 6], [7], []]])
def test_choices_that_cannot_be_told_apart_are_refused(choices):
    with pytest.raises(DataError, match="cannot be told from the others"):
        plan_choices(PROMPT, choices)
