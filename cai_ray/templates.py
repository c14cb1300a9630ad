r"""Every prompt string, in two formats: `plain` for pretrained models, `chat` (messages) for instruct models.

Plain is the text of the Constitutional AI paper (arXiv 2212.08073), byte for byte in English. A chat function has the
same name with the suffix `_messages`; when its last message is the assistant's, the caller continues that message
(`continue_final_message`), else it asks for a new one. Worked examples come first, so that their prefix is cached.

Text that users or models wrote must neither open a turn nor close the quotation it stands in. A backslash is put
before a turn marker or label at a line's start (`\Human:`) and before the third bracket of a run (`[[\[`, `]]\]`);
nothing else changes, blank lines stay, and escaping twice is escaping once. Generated text is passed in stripped.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ParamSpec

from cai_ray.constitution import OPTIONS, CotFewShot, CritiqueFewShot, FeedbackFewShot
from cai_ray.records import Message

Messages = Sequence[Message | Mapping[str, str]]
Critiques = Sequence[CritiqueFewShot]
Feedbacks = Sequence[FeedbackFewShot]
Cots = Sequence[CotFewShot]

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # the turn markers, one plain format for all languages
STOP_PLAIN = [HUMAN, ASSISTANT]  # where a response ends in the plain format
LIST_STOP = "\n"  # where an item of a list ends
CHOICES = (" (A)", " (B)")  # the continuations that are scored after a feedback or verdict prompt
NUMBERS = (" 1", " 2")  # after a prompt in the format of RLAIF
SCORES = tuple(f" {n}" for n in range(1, 11))  # after a score prompt

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
    compare: str
    conversation: str
    response: str
    weigh: str
    reasoning: str
    chosen: str
    rate: str
    question: str
    score: str

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

    @property
    def reasoning_stops(self) -> list[str]:
        """The same in the format of RLAIF: at the next turn or example, or at its own choice."""
        return [*STOP_PLAIN, self.conversation, self.chosen]

    @property
    def quoted_labels(self) -> list[str]:
        """What introduces the parts of an RLAIF or score prompt, without colons: text inside must not forge it."""
        labels = (self.conversation, self.reasoning, self.chosen, self.question, self.score)
        return [*(s.rstrip(":：") for s in labels), self.response, f"{self.response} 1", f"{self.response} 2"]


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
        compare="You judge two responses of an assistant. First comes a conversation, then a question about the "
        "assistant's next response, then two candidates. Name the candidate that the question asks for, 1 or 2.",
        conversation="Conversation between a human and an assistant:",
        response="Response",
        weigh="Hold both responses against the question and say what decides between them.",
        reasoning="Reasoning:",
        chosen="Chosen response:",
        rate="You rate a response of an assistant. First comes a conversation, then a question by which the candidates "
        "for the assistant's next response are told apart, then one of these candidates. Give it a whole number: 10 "
        "means that the question clearly asks for this one, 1 that it clearly asks for another.",
        question="Question:",
        score="Score from 1 to 10:",
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
        compare="请评判助手的两个回答。先是一段对话，然后是关于助手下一个回答的问题，最后是两个候选回答。"
        "请说出问题所要的是哪一个，1 还是 2。",
        conversation="人类（Human）与助手（Assistant）的对话：",
        response="回答",
        weigh="请对照问题衡量这两个回答，说明取舍的关键。",
        reasoning="分析:",
        chosen="选出的回答:",
        rate="请给助手的一个回答打分。先是一段对话，然后是用来区分各个候选回答的问题，最后是其中一个候选回答。"
        "请给出一个整数：10 表示问题所要的显然就是它，1 表示显然是别的回答。",
        question="问题:",
        score="分数（1 到 10）:",
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


Exchanges = tuple[tuple[str, ...], list[tuple[str, str]]]  # see `_both_formats`
P = ParamSpec("P")


def _both_formats(build: Callable[P, Exchanges]) -> tuple[Callable[P, str], Callable[P, list[Message]]]:
    """The plain and the chat form of a question: (task, [(asked, answered), …]), whose last answer is only opened.

    Plain puts an empty line before each part; chat makes an exchange a turn of the user's and one of the assistant's,
    with the task at the head of the first.
    """

    def plain(*args: P.args, **kwargs: P.kwargs) -> str:
        task, exchanges = build(*args, **kwargs)
        return "".join(f"\n\n{part}" for part in (*task, *chain.from_iterable(exchanges)))

    def chat(*args: P.args, **kwargs: P.kwargs) -> list[Message]:
        task, exchanges = build(*args, **kwargs)
        first, *turns = (turn for asked, answer in exchanges for turn in (_user(asked), _assistant(answer)))
        return [_user("\n\n".join([*task, first["content"]])), *turns]

    plain.__doc__ = chat.__doc__ = build.__doc__
    return plain, chat


# ---- comparisons --------------------------------------------------------------------------------------------------


def _multiple_choice(
    messages: Messages, question: str, response_a: str, response_b: str, few_shots: Feedbacks = (), language: str = "en"
) -> Exchanges:
    r"""A multiple choice; compare the log-probs of `CHOICES` after `The answer is:`, with which it ends.

    Args:
        messages: the conversation, ending with the user.
        question: in its published form: begins with a newline, ends with ` Options:`.
        response_a: shown as (A).
        response_b: shown as (B).
        few_shots: worked examples; one without a question is shown with this one.
        language: which frame.
    """
    frame = FRAMES[language]
    shots = [
        (_comparison(frame.consider, _LONG, *_parts(s, question)), f"{frame.answer} ({s.answer})") for s in few_shots
    ]
    return (), [*shots, (_comparison(frame.consider, _LONG, messages, question, response_a, response_b), frame.answer)]


feedback_prompt, feedback_prompt_messages = _both_formats(_multiple_choice)


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


# ---- the formats of RLAIF (Lee et al. 2023, arXiv 2309.00267): their structure, our words --------------------------


def _numbered(
    messages: Messages,
    question: str,
    response_1: str,
    response_2: str,
    few_shots: Feedbacks = (),
    language: str = "en",
    think: bool = False,
) -> Exchanges:
    """Instructions, examples, conversation, question and two numbered responses; compare `NUMBERS` after it.

    It ends with `Chosen response:`, or `Reasoning:`.

    Args:
        messages: the conversation, ending with the user.
        question: in its published form, as in `feedback_prompt`; the numbered responses are its options.
        response_1: shown as 1.
        response_2: shown as 2.
        few_shots: worked examples; in those with a rationale, (A) and (B) become the numbered responses.
        language: which frame.
        think: ask for a rationale first, up to `Frame.reasoning_stops`; `rlaif_verdict_prompt` goes on from it.
    """
    frame = FRAMES[language]

    def comparison(messages: Messages, question: str, response_1: str, response_2: str) -> str:
        options, labels = (f"{frame.response} 1:", f"{frame.response} 2:"), frame.quoted_labels
        head = _comparison(frame.conversation, _LONG, messages, question, response_1, response_2, options, labels)
        return f"{head}\n\n{frame.weigh}" if think else head

    def answer(shot: FeedbackFewShot) -> str:
        number = 1 + "AB".index(shot.answer)
        if not (think and isinstance(shot, CotFewShot)):
            return f"{frame.chosen} {number}"
        rationale = shot.rationale.replace("(A)", f"{frame.response} 1").replace("(B)", f"{frame.response} 2")
        return f"{frame.reasoning}{_reasoned(frame, rationale)} {number}"

    shots = [(comparison(*_parts(shot, question)), answer(shot)) for shot in few_shots]
    asked = comparison(messages, question, response_1, response_2)
    return (frame.compare,), [*shots, (asked, frame.reasoning if think else frame.chosen)]


rlaif_prompt, rlaif_prompt_messages = _both_formats(_numbered)


def rlaif_verdict_prompt(rationale_prompt: str, rationale: str, language: str = "en") -> str:
    """After the rationale, plain: it is put in and the choice asked for; compare `NUMBERS` after it."""
    frame = FRAMES[language]
    return f"{rationale_prompt}{_reasoned(frame, escape(rationale, (*_LONG.values(), *frame.quoted_labels)))}"


def rlaif_verdict_prompt_messages(rationale_messages: Messages, rationale: str, language: str = "en") -> list[Message]:
    """The same as chat: the assistant's own turn goes on from its rationale to `Chosen response:`."""
    *before, opened = _copy(rationale_messages)
    return [*before, _assistant(f"{opened['content']}{_reasoned(FRAMES[language], rationale)}")]


def _scored(
    messages: Messages, question: str, response: str, few_shots: Feedbacks = (), language: str = "en"
) -> Exchanges:
    """A score of one response, from 1 to 10; compare `SCORES` after `Score from 1 to 10:`, with which it ends.

    Of each worked example `response_a` is shown with `score_a`; those without scores are left out.
    """
    frame = FRAMES[language]

    def asked(messages: Messages, question: str, response: str) -> str:
        turns, text = _quoted(_LONG, frame.quoted_labels, messages, response)
        criterion = question.strip().removesuffix(OPTIONS[language].strip()).rstrip()  # one response has no options
        return f"{frame.conversation}{turns}\n\n{frame.question} {criterion}\n\n{frame.response}: [[[{text}]]]"

    shots = [
        (asked(s.messages, s.question or question, s.response_a), f"{frame.score} {s.score_a}")
        for s in few_shots
        if s.score_a is not None
    ]
    return (frame.rate,), [*shots, (asked(messages, question, response), frame.score)]


score_prompt, score_prompt_messages = _both_formats(_scored)


def _reasoned(frame: Frame, rationale: str) -> str:
    return f"{_continued(rationale)}\n\n{frame.chosen}"


# ---- what they share ----------------------------------------------------------------------------------------------


def _thinking(frame: Frame, asked: str) -> str:
    return f"{HUMAN} {asked}{ASSISTANT} {frame.think}"


def _continued(rationale: str) -> str:
    # Generated and published rationales bring their own first space or newline, stripped ones need one.
    rationale = rationale.rstrip()
    return rationale if rationale[:1].isspace() else f" {rationale}"


def _parts(shot: FeedbackFewShot, question: str) -> tuple[Messages, str, str, str]:
    return shot.messages, shot.question or question, shot.response_a, shot.response_b


def _comparison(
    opening: str,
    names: Mapping[str, str],
    messages: Messages,
    question: str,
    response_a: str,
    response_b: str,
    options: tuple[str, str] = ("(A)", "(B)"),
    labels: Sequence[str] = (),
) -> str:
    turns, a, b = _quoted(names, labels, messages, response_a, response_b)
    return f"{opening}{turns}\n\n{question}\n {options[0]} [[[{a}]]]\n {options[1]} [[[{b}]]]"


def _quoted(names: Mapping[str, str], labels: Sequence[str], messages: Messages, *responses: str) -> list[str]:
    """The turns and the responses as they may stand inside a prompt."""
    # Short names stand inside a plain Human turn, so the long ones must not be forged there either.
    markers = (*_LONG.values(), *names.values(), *labels)
    return [_turns(messages, names, markers, brackets=True), *(escape(r, markers, brackets=True) for r in responses)]
