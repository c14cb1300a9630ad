r"""Every prompt string, in two formats: `plain` for pretrained models, `chat` (messages) for instruct models.

Plain is the text of the Constitutional AI paper (arXiv 2212.08073), byte for byte in English. A chat function has the
same name with the suffix `_messages`; when its last message is the assistant's, the caller continues that message
(`continue_final_message`), else it asks for a new one. Worked examples come first, so that their prefix is cached.

Text that users or models wrote must neither open a turn nor close the quotation it stands in. A backslash is put
before a turn marker at a line's start (`\Human:`) and before the third bracket of a run (`[[\[`, `]]\]`); nothing else
changes, blank lines stay, and escaping twice is escaping once. Generated text is passed in stripped.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cai_ray.constitution import CotFewShot, CritiqueFewShot, FeedbackFewShot
from cai_ray.records import Message

Messages = Sequence[Message | Mapping[str, str]]
Critiques = Sequence[CritiqueFewShot]
Feedbacks = Sequence[FeedbackFewShot]
Cots = Sequence[CotFewShot]

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # the turn markers, one plain format for all languages
STOP_PLAIN = [HUMAN, ASSISTANT]  # where a response ends in the plain format
LIST_STOP = "\n"  # where an item of a list ends
CHOICES = (" (A)", " (B)")  # the continuations that are scored after a feedback or verdict prompt

_LONG = {"system": "System", "user": "Human", "assistant": "Assistant"}
_SHORT = {"system": "System", "user": "H", "assistant": "A"}  # in chain-of-thought prompts

_BREAKS = r"\r\v\f\x85\u2028\u2029"  # line breaks that `^` does not know


@dataclass(frozen=True)
class Frame:
    """The sentences around principles and answers in one language; `en` is the published text."""

    critique_request: str
    critique: str
    revision_request: str
    revision: str
    consider: str
    answer: str
    consider_cot: str
    think: str
    verdict: str

    @property
    def labels(self) -> tuple[str, str, str, str]:
        """The four labels of a plain critique prompt; they end with a colon."""
        return (self.critique_request, self.critique, self.revision_request, self.revision)

    @property
    def label_names(self) -> list[str]:
        """The labels without their colon: with one, they open a part of the prompt as a turn marker does."""
        return [label.removesuffix(":") for label in self.labels]

    @property
    def critique_stops(self) -> list[str]:
        """Where a critique or a revision ends in the plain format: at the next turn or label."""
        return STOP_PLAIN + [f"\n\n{label}" for label in self.labels]

    @property
    def rationale_stops(self) -> list[str]:
        """Where a rationale ends, in both formats: at the next turn or at its own verdict."""
        return [*STOP_PLAIN, self.verdict]


FRAMES = {
    "en": Frame(
        critique_request="CritiqueRequest:",
        critique="Critique:",
        revision_request="RevisionRequest:",
        revision="Revision:",
        consider="Consider the following conversation between a human and an assistant:",
        answer="The answer is:",
        consider_cot="Consider the following conversation between a human (H) and an assistant (A):",
        think="Let's think step by step:",
        verdict="So the answer is:",
    ),
    "zh": Frame(
        critique_request="批评要求:",
        critique="批评:",
        revision_request="修改要求:",
        revision="修改:",
        consider="请阅读下面这段人类（Human）与助手（Assistant）的对话：",
        answer="答案是:",
        consider_cot="请阅读下面这段人类（H）与助手（A）的对话：",
        think="我们来一步一步地分析:",
        verdict="所以答案是:",
    ),
}


def escape(text: str, markers: Sequence[str] = tuple(_LONG.values()), brackets: bool = False) -> str:
    r"""Puts a backslash before each marker at a line's start, and into runs of three brackets when asked.

    Args:
        text: what a user or a model wrote.
        markers: names that open a turn when a colon follows, such as `Human`.
        brackets: also keep `[[[` and `]]]` from occurring, for text inside a comparison.

    Returns:
        Text without any of them; unchanged if it held none. `escape(escape(t)) == escape(t)`.
    """
    names = "|".join(re.escape(name) for name in markers)
    text = re.sub(rf"(?m)(^|[{_BREAKS}])([^\S\n{_BREAKS}]*)(?=(?:{names})[:：])", r"\1\2\\", text)
    return re.sub(r"\[\[(?=\[)|\]\](?=\])", r"\g<0>\\", text) if brackets else text


def _turns(messages: Messages, names: Mapping[str, str], markers: Sequence[str] = (), brackets: bool = False) -> str:
    markers = (*names.values(), *markers)
    return "".join(f"\n\n{names[m['role']]}: {escape(m['content'], markers, brackets)}" for m in messages)


def render_turns(messages: Messages) -> str:
    r"""A conversation as `\n\nHuman: …\n\nAssistant: …`; append `ASSISTANT` to ask for the next response.

    A system turn is rendered as `\n\nSystem: …`. Contents are kept as they are but for escaped turn markers.
    """
    return _turns(messages, _LONG)


# ---- critique and revision ----------------------------------------------------------------------------------------


def critique_prompt(
    messages: Messages, response: str, critique_request: str, few_shots: Critiques = (), language: str = "en"
) -> str:
    """The plain prompt whose continuation is a critique of `response`; ends with the label `Critique:`."""
    frame = FRAMES[language]
    shots = "".join(
        _critique_text(frame, s.messages, s.response, s.critique_request)
        + _revision_text(frame, s.critique, s.revision_request)
        + f" {s.revision}"
        for s in few_shots
    )
    return shots + _critique_text(frame, messages, response, critique_request)


def revision_prompt(
    messages: Messages,
    response: str,
    critique_request: str,
    critique: str,
    revision_request: str,
    few_shots: Critiques = (),
    language: str = "en",
) -> str:
    """The plain prompt whose continuation is a revised response; the critique prompt is its prefix."""
    prompt = critique_prompt(messages, response, critique_request, few_shots, language)
    return prompt + _revision_text(FRAMES[language], critique, revision_request)


def direct_revision_prompt(
    messages: Messages, response: str, revision_request: str, few_shots: Critiques = (), language: str = "en"
) -> str:
    """The plain prompt for a revision without a critique: its request follows the response (section 3.5)."""
    frame = FRAMES[language]
    shots = "".join(
        _direct_text(frame, s.messages, s.response, s.revision_request) + f" {s.revision}" for s in few_shots
    )
    return shots + _direct_text(frame, messages, response, revision_request)


def _answered(frame: Frame, messages: Messages, response: str) -> str:
    return _turns([*messages, {"role": "assistant", "content": response}], _LONG, frame.label_names)


def _critique_text(frame: Frame, messages: Messages, response: str, critique_request: str) -> str:
    said = _answered(frame, messages, response)
    return f"{said}\n\n{frame.critique_request} {critique_request}\n\n{frame.critique}"


def _revision_text(frame: Frame, critique: str, revision_request: str) -> str:
    said = escape(critique, (*_LONG.values(), *frame.label_names))
    return f" {said}\n\n{frame.revision_request} {revision_request}\n\n{frame.revision}"


def _direct_text(frame: Frame, messages: Messages, response: str, revision_request: str) -> str:
    said = _answered(frame, messages, response)
    return f"{said}\n\n{frame.revision_request} {revision_request}\n\n{frame.revision}"


def critique_prompt_messages(
    messages: Messages, response: str, critique_request: str, few_shots: Critiques = ()
) -> list[Message]:
    """The chat prompt for a critique: examples, conversation, response, and the request as the user's turn.

    Nothing is quoted here, so nothing is escaped: turns are kept apart by the chat template's special tokens.
    A system turn moves to the front, the only place where chat templates take one.
    """
    shots: list[Message] = []
    for s in few_shots:
        shots += [*_copy(s.messages), _assistant(s.response), _user(s.critique_request)]
        shots += [_assistant(s.critique), _user(s.revision_request), _assistant(s.revision)]
    return _after_examples(shots, messages, response, critique_request)


def revision_prompt_messages(
    messages: Messages,
    response: str,
    critique_request: str,
    critique: str,
    revision_request: str,
    few_shots: Critiques = (),
) -> list[Message]:
    """The chat prompt for a revision: the critique prompt, the critique, and the revision request."""
    prompt = critique_prompt_messages(messages, response, critique_request, few_shots)
    return [*prompt, _assistant(critique), _user(revision_request)]


def direct_revision_prompt_messages(
    messages: Messages, response: str, revision_request: str, few_shots: Critiques = ()
) -> list[Message]:
    """The chat prompt for a revision without a critique."""
    shots: list[Message] = []
    for s in few_shots:
        shots += [*_copy(s.messages), _assistant(s.response), _user(s.revision_request), _assistant(s.revision)]
    return _after_examples(shots, messages, response, revision_request)


def _after_examples(shots: list[Message], messages: Messages, response: str, request: str) -> list[Message]:
    turns = _copy(messages)
    system = turns[:1] if turns[0]["role"] == "system" else []
    return [*system, *shots, *turns[len(system) :], _assistant(response), _user(request)]


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _copy(messages: Messages) -> list[Message]:
    return [{"role": m["role"], "content": m["content"]} for m in messages]


# ---- new prompts ---------------------------------------------------------------------------------------------------


def list_prompt(examples: Sequence[str]) -> str:
    """A numbered list of texts, a line each, whose continuation is one more of their kind; it ends at `LIST_STOP`."""
    lines = [f"{number}. {' '.join(text.split())}{LIST_STOP}" for number, text in enumerate(examples, 1)]
    return "".join(lines) + f"{len(examples) + 1}."


# ---- comparisons --------------------------------------------------------------------------------------------------


def feedback_prompt(
    messages: Messages, question: str, response_a: str, response_b: str, few_shots: Feedbacks = (), language: str = "en"
) -> str:
    r"""The plain multiple-choice prompt; compare the log-probs of `CHOICES` after it.

    Args:
        messages: the conversation, ending with the user.
        question: in its published form: begins with a newline, ends with ` Options:`.
        response_a: shown as (A).
        response_b: shown as (B).
        few_shots: worked examples; one without a question is shown with this one.
        language: which frame.
    """
    frame = FRAMES[language]
    shots = "".join(
        f"\n\n{_comparison(frame.consider, _LONG, *_parts(s, question))}\n\n{frame.answer} ({s.answer})"
        for s in few_shots
    )
    asked = _comparison(frame.consider, _LONG, messages, question, response_a, response_b)
    return f"{shots}\n\n{asked}\n\n{frame.answer}"


def feedback_prompt_messages(
    messages: Messages, question: str, response_a: str, response_b: str, few_shots: Feedbacks = (), language: str = "en"
) -> list[Message]:
    """The same as chat: the last message is the assistant's, opened with `The answer is:`; `CHOICES` continue it."""
    frame = FRAMES[language]
    out: list[Message] = []
    for s in few_shots:
        example = _comparison(frame.consider, _LONG, *_parts(s, question))
        out += [_user(example), _assistant(f"{frame.answer} ({s.answer})")]
    asked = _comparison(frame.consider, _LONG, messages, question, response_a, response_b)
    return [*out, _user(asked), _assistant(frame.answer)]


def rationale_prompt(
    messages: Messages, question: str, response_a: str, response_b: str, few_shots: Cots = (), language: str = "en"
) -> str:
    """First half of the chain of thought, plain: its continuation is a rationale, up to `Frame.rationale_stops`."""
    frame, prompt = FRAMES[language], ""
    for s in few_shots:
        prompt += _thinking(frame, _comparison(frame.consider_cot, _SHORT, *_parts(s, question)))
        prompt = f"{verdict_prompt(prompt, s.rationale, language)} ({s.answer})"
    return prompt + _thinking(
        frame, _comparison(frame.consider_cot, _SHORT, messages, question, response_a, response_b)
    )


def verdict_prompt(rationale_prompt: str, rationale: str, language: str = "en") -> str:
    """Second half, plain: the rationale is put in and its verdict asked for; compare `CHOICES` after it."""
    return f"{rationale_prompt}{_continued(escape(rationale))}{HUMAN}\n{FRAMES[language].verdict}"


def rationale_prompt_messages(
    messages: Messages, question: str, response_a: str, response_b: str, few_shots: Cots = (), language: str = "en"
) -> list[Message]:
    """First half as chat: the last message is the assistant's, opened with `Let's think step by step:`."""
    frame = FRAMES[language]
    out: list[Message] = []
    for s in few_shots:
        opened = [_user(_comparison(frame.consider_cot, _SHORT, *_parts(s, question))), _assistant(frame.think)]
        example, concluded = verdict_prompt_messages(opened, s.rationale, language)
        out += [example, _assistant(f"{concluded['content']} ({s.answer})")]
    asked = _comparison(frame.consider_cot, _SHORT, messages, question, response_a, response_b)
    return [*out, _user(asked), _assistant(frame.think)]


def verdict_prompt_messages(rationale_messages: Messages, rationale: str, language: str = "en") -> list[Message]:
    """Second half as chat: the assistant's own turn goes on from its rationale to `So the answer is:`."""
    *before, opened = _copy(rationale_messages)
    return [*before, _assistant(f"{opened['content']}{_continued(rationale)}\n\n{FRAMES[language].verdict}")]


def _thinking(frame: Frame, asked: str) -> str:
    return f"{HUMAN} {asked}{ASSISTANT} {frame.think}"


def _continued(rationale: str) -> str:
    # Generated and published rationales bring their own first space or newline, stripped ones need one.
    rationale = rationale.rstrip()
    return rationale if rationale[:1].isspace() else f" {rationale}"


def _parts(shot: FeedbackFewShot, question: str) -> tuple[Messages, str, str, str]:
    return shot.messages, shot.question or question, shot.response_a, shot.response_b


def _comparison(
    opening: str, names: Mapping[str, str], messages: Messages, question: str, response_a: str, response_b: str
) -> str:
    # Short names stand inside a plain Human turn, so the long ones must not be forged there either.
    turns = _turns(messages, names, tuple(_LONG.values()), brackets=True)
    a, b = (escape(text, (*_LONG.values(), *names.values()), brackets=True) for text in (response_a, response_b))
    return f"{opening}{turns}\n\n{question}\n (A) [[[{a}]]]\n (B) [[[{b}]]]"
