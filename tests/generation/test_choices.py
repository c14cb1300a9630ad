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


@pytest.mark.parametrize("choices", [[[5]], [[5], [5]], [[5], [5, 6]], [[5, 6], [7], []]])
def test_choices_that_cannot_be_told_apart_are_refused(choices):
    with pytest.raises(DataError, match="cannot be told from the others"):
        plan_choices(PROMPT, choices)
