r"""Every prompt string, in two formats: `plain` for pretrained models, `chat` (messages) for instruct models.

Plain is the text of the Constitutional AI paper (arXiv 2212.08073), byte for byte in English. A chat function has the
same name with the suffix `_messages`; when its last message is the assistant's, the caller continues that message
(`continue_final_message`), else it asks for a new one. Worked examples come first, so that their prefix is cached.

Text that users or models wrote must neither open a turn nor close the quotation it stands in. A backslash is put
before a turn marker or label at a line's start (`\Human:`) and before the third bracket of a run (`[[\[`, `]]\]`);
nothing else changes, blank lines stay, and escaping twice is escaping once. Generated text is passed in stripped.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Generic, NamedTuple, ParamSpec

from cai_ray.constitution import OPTIONS, CotFewShot, CritiqueFewShot, FeedbackFewShot, Shot
from cai_ray.records import Message

Messages = Sequence[Message | Mapping[str, str]]
Critiques = Sequence[CritiqueFewShot]
Feedbacks = Sequence[FeedbackFewShot]
Cots = Sequence[CotFewShot]
Asked = tuple[Messages, str, str, str]  # a conversation, a question, two responses

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
    """The sentences around principles and answers in one language; `en` is the published text.

    The first four are the labels of a plain critique prompt, where a colon follows them.
    """

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
        """What opens a part of a plain critique prompt, as a turn marker does, when a colon follows."""
        return (self.critique_request, self.critique, self.revision_request, self.revision)

    @property
    def critique_stops(self) -> list[str]:
        """Where a critique or a revision ends in the plain format: at the next turn or label."""
        return STOP_PLAIN + [f"\n\n{label}:" for label in self.labels]

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
        critique_request="CritiqueRequest",
        critique="Critique",
        revision_request="RevisionRequest",
        revision="Revision",
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
        critique_request="批评要求",
        critique="批评",
        revision_request="修改要求",
        revision="修改",
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
    names = "|".join(re.escape(name) for name in markers) or "(?!)"
    text = re.sub(rf"(?m)(^|[{_BREAKS}])([^\S\n{_BREAKS}]*)(?=(?:{names})[:：])", r"\1\2\\", text)
    return re.sub(r"\[\[(?=\[)|\]\](?=\])", r"\g<0>\\", text) if brackets else text


def render_turns(messages: Messages) -> str:
    r"""A conversation as `\n\nHuman: …\n\nAssistant: …`; append `ASSISTANT` to ask for the next response.

    A system turn is rendered as `\n\nSystem: …`. Contents are kept as they are but for escaped turn markers.
    """
    return _turns(messages, _LONG, tuple(_LONG.values()))


def _turns(messages: Messages, names: Mapping[str, str], markers: Sequence[str], brackets: bool = False) -> str:
    return "".join(f"\n\n{names[m['role']]}: {escape(m['content'], markers, brackets)}" for m in messages)


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


# ---- two formats of one prompt ------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A piece of a prompt."""

    role: str  # whose turn it is part of
    text: str
    label: str = ""  # what stands before it in plain
    markers: Sequence[str] = ()  # which it must not forge in plain; chat turns are kept apart by special tokens


P = ParamSpec("P")


class Forms(NamedTuple, Generic[P]):
    """A prompt's plain and its chat form."""

    plain: Callable[P, str]
    chat: Callable[P, list[Message]]

    def of(self, format: str) -> Callable[P, str | list[Message]]:
        """The one for a tokenizer's format."""
        return self.plain if format == "plain" else self.chat


def _both_formats(build: Callable[P, list[Part]]) -> Forms[P]:
    """The plain and the chat form of a prompt.

    Plain puts an empty line before each part. Chat makes a turn of neighbours of one role; a system turn moves to the
    front, the only place where chat templates take one, and a last part without text is a turn to be asked for.
    """

    def plain(*args: P.args, **kwargs: P.kwargs) -> str:
        texts = (f"\n\n{label}{escape(text, markers)}" for _, text, label, markers in build(*args, **kwargs))
        return "".join(texts).removesuffix(" ")  # what is still to come brings its own space

    def chat(*args: P.args, **kwargs: P.kwargs) -> list[Message]:
        parts = sorted(build(*args, **kwargs), key=lambda part: part.role != "system")
        turns: list[Message] = []
        for role, together in groupby(parts if parts[-1].text else parts[:-1], key=lambda part: part.role):
            turns.append({"role": role, "content": "\n\n".join(part.text for part in together)})
        return turns

    plain.__doc__ = chat.__doc__ = build.__doc__
    return Forms(plain, chat)


# ---- critique and revision ----------------------------------------------------------------------------------------

_STEPS = ("critique_request", "critique", "revision_request", "revision")  # fields of frames and examples


def _critique(
    messages: Messages, response: str, critique_request: str, few_shots: Critiques = (), language: str = "en"
) -> list[Part]:
    """Its continuation is a critique of `response`; plain ends with the label `Critique:`, chat with the request."""
    return _revising(_STEPS, messages, response, [critique_request], few_shots, language)


def _revision(
    messages: Messages,
    response: str,
    critique_request: str,
    critique: str,
    revision_request: str,
    few_shots: Critiques = (),
    language: str = "en",
) -> list[Part]:
    """Its continuation is a revised response; the critique prompt is its prefix."""
    return _revising(_STEPS, messages, response, [critique_request, critique, revision_request], few_shots, language)


def _direct_revision(
    messages: Messages, response: str, revision_request: str, few_shots: Critiques = (), language: str = "en"
) -> list[Part]:
    """The prompt for a revision without a critique: its request follows the response (section 3.5)."""
    return _revising(_STEPS[2:], messages, response, [revision_request], few_shots, language)


def _revising(
    steps: Sequence[str], messages: Messages, response: str, texts: list[str], few_shots: Critiques, language: str
) -> list[Part]:
    """Examples with all steps, then a conversation with its response, the steps so far and the label of the next."""
    frame, parts = FRAMES[language], list[Part]()
    markers = (*_LONG.values(), *frame.labels)
    examples = [(s.messages, s.response, [getattr(s, step) for step in steps]) for s in few_shots]
    for said, answer, written in [*examples, (messages, response, [*texts, ""])]:
        for turn in (*said, _assistant(answer)):
            parts.append(Part(turn["role"], turn["content"], f"{_LONG[turn['role']]}: ", markers))
        for step, text in zip(steps, written, strict=False):
            role = "user" if step.endswith("request") else "assistant"
            parts.append(Part(role, text, f"{getattr(frame, step)}: ", markers if step == "critique" else ()))
    return parts


critique_prompt, critique_prompt_messages = CRITIQUE = _both_formats(_critique)
revision_prompt, revision_prompt_messages = REVISION = _both_formats(_revision)
direct_revision_prompt, direct_revision_prompt_messages = DIRECT_REVISION = _both_formats(_direct_revision)


# ---- new prompts ---------------------------------------------------------------------------------------------------


def list_prompt(examples: Sequence[str]) -> str:
    """A numbered list of texts, a line each, whose continuation is one more of their kind; it ends at `LIST_STOP`."""
    lines = [f"{number}. {' '.join(text.split())}{LIST_STOP}" for number, text in enumerate(examples, 1)]
    return "".join(lines) + f"{len(examples) + 1}."


# ---- comparisons --------------------------------------------------------------------------------------------------


def _multiple_choice(
    messages: Messages, question: str, response_a: str, response_b: str, few_shots: Feedbacks = (), language: str = "en"
) -> list[Part]:
    r"""A multiple choice; compare the log-probs of `CHOICES` after `The answer is:`, with which it ends.

    Args:
        messages: the conversation, ending with the user.
        question: in its published form: begins with a newline, ends with ` Options:`.
        response_a: shown as (A).
        response_b: shown as (B).
        few_shots: worked examples; one without a question is shown with this one.
        language: which frame.
    """
    frame, parts = FRAMES[language], list[Part]()
    for shot, asked in _cases(few_shots, (messages, question, response_a, response_b)):
        answer = f"{frame.answer} ({shot.answer})" if shot else frame.answer
        parts += [Part("user", _comparison(frame.consider, _LONG, asked)), Part("assistant", answer)]
    return parts


def _thought(
    messages: Messages, question: str, response_a: str, response_b: str, few_shots: Cots = (), language: str = "en"
) -> list[Part]:
    """First half of the chain of thought: its continuation is a rationale, up to `Frame.rationale_stops`.

    It ends with `Let's think step by step:`.
    """
    frame, parts = FRAMES[language], list[Part]()
    for shot, asked in _cases(few_shots, (messages, question, response_a, response_b)):
        thinking = frame.think + (_continued(shot.rationale) if shot else "")
        parts.append(Part("user", _comparison(frame.consider_cot, _SHORT, asked), "Human: "))
        parts.append(Part("assistant", thinking, "Assistant: ", tuple(_LONG.values())))
        if shot:
            parts.append(Part("assistant", f"{frame.verdict} ({shot.answer})", "Human:\n"))
    return parts


feedback_prompt, feedback_prompt_messages = FEEDBACK = _both_formats(_multiple_choice)
rationale_prompt, rationale_prompt_messages = RATIONALE = _both_formats(_thought)


def verdict_prompt(rationale_prompt: str, rationale: str, language: str = "en") -> str:
    """Second half, plain: the rationale is put in and its verdict asked for; compare `CHOICES` after it."""
    return f"{rationale_prompt}{_continued(escape(rationale))}{HUMAN}\n{FRAMES[language].verdict}"


def verdict_prompt_messages(opened: Sequence[Message], rationale: str, language: str = "en") -> list[Message]:
    """Second half as chat: the assistant's own turn goes on from its rationale to `So the answer is:`."""
    *before, last = opened
    return [*before, _assistant(f"{last['content']}{_continued(rationale)}\n\n{FRAMES[language].verdict}")]


VERDICT = Forms(verdict_prompt, verdict_prompt_messages)  # pyright: ignore[reportArgumentType]  each takes its own


# ---- the formats of RLAIF (Lee et al. 2023, arXiv 2309.00267): their structure, our words --------------------------


def _numbered(
    messages: Messages,
    question: str,
    response_1: str,
    response_2: str,
    few_shots: Feedbacks = (),
    language: str = "en",
    think: bool = False,
) -> list[Part]:
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
    options, parts = (f" {frame.response} 1:", f" {frame.response} 2:"), [Part("user", frame.compare)]
    for shot, asked in _cases(few_shots, (messages, question, response_1, response_2)):
        parts.append(Part("user", _comparison(frame.conversation, _LONG, asked, options, frame.quoted_labels)))
        if think:
            parts.append(Part("user", frame.weigh))
        if think and isinstance(shot, CotFewShot):
            rationale = shot.rationale.replace("(A)", f"{frame.response} 1").replace("(B)", f"{frame.response} 2")
            parts.append(Part("assistant", frame.reasoning + _continued(rationale)))
        if shot:
            parts.append(Part("assistant", f"{frame.chosen} {1 + 'AB'.index(shot.answer)}"))
    return [*parts, Part("assistant", frame.reasoning if think else frame.chosen)]


rlaif_prompt, rlaif_prompt_messages = RLAIF = _both_formats(_numbered)


def rlaif_verdict_prompt(rationale_prompt: str, rationale: str, language: str = "en") -> str:
    """After the rationale, plain: it is put in and the choice asked for; compare `NUMBERS` after it."""
    frame = FRAMES[language]
    return f"{rationale_prompt}{_reasoned(frame, escape(rationale, (*_LONG.values(), *frame.quoted_labels)))}"


def rlaif_verdict_prompt_messages(opened: Sequence[Message], rationale: str, language: str = "en") -> list[Message]:
    """The same as chat: the assistant's own turn goes on from its rationale to `Chosen response:`."""
    *before, last = opened
    return [*before, _assistant(f"{last['content']}{_reasoned(FRAMES[language], rationale)}")]


RLAIF_VERDICT = Forms(rlaif_verdict_prompt, rlaif_verdict_prompt_messages)  # pyright: ignore[reportArgumentType]


def _scored(
    messages: Messages, question: str, response: str, few_shots: Feedbacks = (), language: str = "en"
) -> list[Part]:
    """A score of one response, from 1 to 10; compare `SCORES` after `Score from 1 to 10:`, with which it ends.

    Of each worked example `response_a` is shown with `score_a`; those without scores are left out.
    """
    frame, scored = FRAMES[language], [shot for shot in few_shots if shot.score_a is not None]
    parts = [Part("user", frame.rate)]
    for shot, (said, asked, shown, _) in _cases(scored, (messages, question, response, "")):
        turns, text = _quoted(_LONG, frame.quoted_labels, said, shown)
        criterion = asked.strip().removesuffix(OPTIONS[language].strip()).rstrip()  # one response has no options
        head = f"{frame.conversation}{turns}\n\n{frame.question} {criterion}"
        parts.append(Part("user", f"{head}\n\n{frame.response}: [[[{text}]]]"))
        parts.append(Part("assistant", f"{frame.score} {shot.score_a}" if shot else frame.score))
    return parts


score_prompt, score_prompt_messages = SCORE = _both_formats(_scored)


def _reasoned(frame: Frame, rationale: str) -> str:
    return f"{_continued(rationale)}\n\n{frame.chosen}"


# ---- what they share ----------------------------------------------------------------------------------------------


def _continued(rationale: str) -> str:
    # Generated and published rationales bring their own first space or newline, stripped ones need one.
    rationale = rationale.rstrip()
    return rationale if rationale[:1].isspace() else f" {rationale}"


def _cases(few_shots: Sequence[Shot], asked: Asked) -> Iterator[tuple[Shot | None, Asked]]:
    """The worked examples, one without a question with that which is asked, and last what is asked itself."""
    for shot in few_shots:
        yield shot, (shot.messages, shot.question or asked[1], shot.response_a, shot.response_b)
    yield None, asked


def _comparison(
    opening: str, names: Mapping[str, str], asked: Asked, options: Sequence[str] = CHOICES, labels: Sequence[str] = ()
) -> str:
    messages, question, *responses = asked
    turns, a, b = _quoted(names, labels, messages, *responses)
    return f"{opening}{turns}\n\n{question}\n{options[0]} [[[{a}]]]\n{options[1]} [[[{b}]]]"


def _quoted(names: Mapping[str, str], labels: Sequence[str], messages: Messages, *responses: str) -> list[str]:
    """The turns and the responses as they may stand inside a prompt."""
    # Short names stand inside a plain Human turn, so the long ones must not be forged there either.
    markers = (*_LONG.values(), *names.values(), *labels)
    return [_turns(messages, names, markers, brackets=True), *(escape(r, markers, brackets=True) for r in responses)]
