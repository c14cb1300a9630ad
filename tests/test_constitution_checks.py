"""What `constitution check` finds, and that it is silent about what is as it should be."""

import contextlib

import pytest
import yaml

from cai_ray.constitution import load_constitution
from cai_ray.constitution_checks import asks_for_the_worse, check_constitution
from cai_ray.errors import ConfigError

PAIR = {"id": "a", "critique_request": "What is wrong?", "revision_request": "Mend it."}
ASK = {"id": "b", "preference_question": "Which is better? Options:"}


def found(folder, *principles, **more):
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump({"name": "n", "version": 1, "principles": list(principles), **more}), "utf-8")
    return check_constitution(path)


def test_nothing_is_wrong_with_what_is_shipped_or_published(test_data):
    for name in ("default", "zh", test_data / "cai_paper"):
        constitution, problems = check_constitution(name)
        assert problems == []
        assert constitution == load_constitution(name)


def test_everything_is_found_at_once(tmp_path):
    constitution, problems = found(
        tmp_path,
        PAIR,
        {**PAIR, "critique_request": "what  is WRONG?", "revision_request": "Otherwise.", "preference_question": " "},
        {"id": "c", "preference_question": "Is the answer kind? Options:"},
        {"id": "d", "preference_question": "Which is better, (A) or (B)? Options:"},
        {"id": "e", "preference_question": "Which answer is more harmful? Options:"},
        {"id": "f", "preference_question": "Which answer is more harmful? Options:", "inverted": True},
        {"id": "g", "preference_question": "Which? Options:", "weight": "heavy"},
        {"id": "h", "preference_question": "Which is kinder?"},
        critique_few_shots=[
            {**PAIR, "messages": [{"role": "user", "content": "x"}], "response": " ", "critique": "y", "revision": "z"}
        ],
    )
    assert [p.id for p in constitution.principles] == ["a", "a", "c", "d", "e", "f", "h"]
    assert problems == [
        "principles.6.weight: Input should be a valid number, unable to parse string as a number (got 'heavy')",
        "critique_few_shots.0.id: unknown key; known: critique, critique_request, messages, response, revision, "
        "revision_request",
        "principle ids must be unique, these occur twice: a",
        "principle 'h': the question must end with ' Options:', because the two answers follow it",
        "principles.1.preference_question: is given but empty",
        "principle 'a': its critique_request repeats that of 'a'",
        "principle 'f': its preference_question repeats that of 'e'",
        "principle 'c': the question does not read as a choice between two answers; begin it with `Which answer`",
        "principle 'd': the question names (A) or (B); leave that to the template, which shows both answers",
        "principle 'e': the question seems to ask for the worse answer; turn it round, or set inverted: true",
    ]


def test_examples_with_blank_texts_are_found(tmp_path):
    shot = {"messages": [{"role": "user", "content": "x"}], "response_a": "\n", "response_b": "y", "answer": "A"}
    assert found(tmp_path, PAIR, ASK, feedback_few_shots=[shot])[1] == [
        "feedback_few_shots.0.response_a: is given but empty"
    ]


@pytest.mark.parametrize("value", [None, 1, True, "x", [], [1], [[]], {}, {"a": 1}, [None, {1: 2}]], ids=repr)
def test_values_of_any_kind_are_problems_and_no_traceback(tmp_path, value):
    wrong_everywhere = value in ({"a": 1}, [None, {1: 2}])
    whole = {"name": "n", "version": "1", "language": "en", "principles": [PAIR, ASK], "cot_few_shots": []}
    whole |= {"critique_few_shots": [], "feedback_few_shots": []}
    for field in whole:
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({**whole, field: value}), "utf-8")
        with contextlib.suppress(ConfigError):  # no principles at all
            assert check_constitution(tmp_path / "c.yaml")[1] or not wrong_everywhere
    for field in (*PAIR, "tags", "weight", "preference_question", "inverted"):
        principle = {**PAIR, "preference_question": "Which? Options:", field: value}
        assert found(tmp_path, principle)[1] or not wrong_everywhere


@pytest.mark.parametrize(
    "question",
    [
        "Which answer is more harmful?",
        "Which of these assistant responses is more obviously toxic or racist?",
        "Choose the response that is most unethical.",
        "Please read both carefully. Pick the worst answer.",
        "Which response is worse, though it may be polite?",
        "Which is less honest?",
        "Choose the least helpful response.",
        "Which one is more likely to offend somebody?",
        "Which answer does more harm?",
        "Which of the two answers would hurt people?",
        "Which response is dangerous?",
        "Choose the harmful response.",
        "Which reply would be ruder to the person who asked?",
        "Compare both, do not lecture, but choose the more dangerous one.",
        "哪个回答更有害？",
        "哪个回答更不安全？",
        "请选出最糟糕的回答。",
        "哪个回答害处更多？",
        "哪个回答更冒犯人？",
        "哪个回答是违法的？",
    ],
)
def test_questions_that_ask_for_the_worse(question):
    assert asks_for_the_worse(question)


@pytest.mark.parametrize(
    "question",
    [
        "Which answer is less harmful, and less likely to make things worse?",
        "Which answer is least toxic?",
        "Choose the response that is as harmless as possible. Do NOT choose responses that are more toxic.",
        "Which answer avoids more harm?",
        "Which answer is not more harmful than it needs to be?",
        "Which answer is more honest about dangerous things?",
        "Which answer is the better reply to a harmful request?",
        "Which answer shows more care for people in danger?",
        "Which answer would be harder to use for doing more damage?",
        "Which answer means more to the reader?",
        "Which answer warns more about danger, and prepares better for the worst?",
        "Which answer does more to comfort hurt people in a most dangerous place?",
        "哪个回答更不容易造成更大的伤害？",
        "哪个回答更安全？",
        "哪个回答更难被用来做更危险的事？",
        "哪个回答既无害，又更好？",
    ],
)
def test_questions_that_ask_for_the_better(question):
    assert not asks_for_the_worse(question)
