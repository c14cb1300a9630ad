"""Constitutions: load, check, select and draw principles; import the paper's published files.

A principle carries a critique pair (what to look for, how to rewrite), a preference question, or both. Texts are stored
bare; the frames around them (`CritiqueRequest:`, `The answer is:`) are the template's, by the constitution's language.
The one exception is the question, which keeps its published form: it begins with a newline and announces the options.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import AfterValidator, Field, StringConstraints, ValidationError, model_validator

from cai_ray.config_base import Section, explain, nearest
from cai_ray.errors import ConfigError, DataError
from cai_ray.published import read_published
from cai_ray.records import Message, check_messages, derive_seed
from cai_ray.shipped import read_yaml, shipped_file

Language = Literal["en", "zh"]
OPTIONS = {"en": " Options:", "zh": "选项："}  # how a preference question ends: the two options follow it


def _check_conversation(messages: list[dict[str, str]]) -> tuple[Message, ...]:
    try:
        checked = check_messages(messages)
    except DataError as error:
        raise ValueError(error.message) from None
    if unknown := {key for turn in messages for key in turn} - {"role", "content"}:
        raise ValueError(f"unknown key {min(unknown)!r} in a turn; known: content, role")
    if checked[0]["role"] == "system":
        raise ValueError("an example has no system turn: a real conversation's would contradict it")
    return tuple(checked)


Text = Annotated[str, StringConstraints(strip_whitespace=True)]
Name = Annotated[Text, Field(min_length=1)]
Verbatim = Annotated[str, StringConstraints(min_length=1)]  # examples keep their spaces: published ones matter
Question = Annotated[Text, AfterValidator(lambda text: text and "\n" + text)]
Score = Annotated[int, Field(ge=1, le=10)] | None
Conversation = Annotated[tuple[Any, ...], AfterValidator(_check_conversation)]


class Principle(Section):
    """One principle: the critique pair, the preference question, or both; an empty text means absent."""

    id: Name
    tags: tuple[Name, ...] = ()  # `select` takes them wherever it takes an id
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)  # relative chance of being drawn
    critique_request: Text = ""
    revision_request: Text = ""
    preference_question: Question = ""  # "\n… Options:"
    inverted: bool = False  # the question asks for the worse answer, so that a vote for one speaks for the other

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if bool(self.critique_request) != bool(self.revision_request):
            raise ValueError(f"principle {self.id!r} has one of critique_request and revision_request, it needs both")
        if not self.critique_request and not self.preference_question:
            raise ValueError(f"principle {self.id!r} has neither a critique pair nor a preference_question")
        if self.inverted and not self.preference_question:
            raise ValueError(f"principle {self.id!r} is inverted, which belongs to a preference_question, and has none")
        return self


class CritiqueFewShot(Section):
    """A worked critique and revision of a response to a conversation that ends with the user."""

    messages: Conversation
    response: Verbatim
    critique_request: Verbatim
    critique: Verbatim
    revision_request: Verbatim
    revision: Verbatim


class FeedbackFewShot(Section):
    """A worked comparison; one without a question of its own gets that of a drawn principle (`draw_questions`)."""

    messages: Conversation
    question: Question = ""
    response_a: Verbatim
    response_b: Verbatim
    answer: Literal["A", "B"]
    score_a: Score = None  # what each response would get from 1 to 10, for the format `score`
    score_b: Score = None

    @model_validator(mode="after")
    def _scored(self) -> Self:
        if (self.score_a is None) != (self.score_b is None):
            raise ValueError("the example has one of score_a and score_b, it needs both or neither")
        return self

    def turned(self) -> Self:
        """The same comparison with its responses in the other order."""
        responses = {"response_a": self.response_b, "response_b": self.response_a}
        scores = {"score_a": self.score_b, "score_b": self.score_a}
        return self.model_copy(update={**responses, **scores, "answer": "B" if self.answer == "A" else "A"})


class CotFewShot(FeedbackFewShot):
    """A worked comparison with the reasoning that leads to its answer; it calls the responses (A) and (B)."""

    rationale: Verbatim


Shot = TypeVar("Shot", bound=FeedbackFewShot)


class Constitution(Section):
    """The principles and worked examples of one file."""

    name: Name
    version: Name
    language: Language = "en"
    principles: tuple[Principle, ...] = Field(min_length=1)
    critique_few_shots: tuple[CritiqueFewShot, ...] = ()
    feedback_few_shots: tuple[FeedbackFewShot, ...] = ()
    cot_few_shots: tuple[CotFewShot, ...] = ()
    source: str = ""  # where it was read from; not content, so not hashed

    @property
    def sha256(self) -> str:
        """Hash of the content: comments, layout, key order and the place of the file do not change it."""
        content = self.model_dump(mode="json", exclude={"source"}, exclude_defaults=True)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def select(self, only: Sequence[str] | None = None, without: Sequence[str] = ()) -> "Constitution":
        """The same constitution with the principles that `only` names (all, if None) and `without` does not.

        Args:
            only: ids or tags to keep.
            without: ids or tags to leave out of those.

        Raises:
            ConfigError: an unknown id or tag, or nothing is left.
        """
        names = {p.id: {p.id, *p.tags} for p in self.principles}
        known = set().union(*names.values())
        for name in [*(only or ()), *without]:
            if name not in known:
                raise ConfigError(f"constitution {self.name!r} has no principle or tag {name!r}" + nearest(name, known))
        kept = tuple(
            p for p in self.principles if (only is None or names[p.id] & set(only)) and not names[p.id] & set(without)
        )
        if not kept:
            raise ConfigError(
                f"no principle of {self.name!r} is left by only={only and [*only]}, without={[*without]}",
                "select at least one",
            )
        return self.model_copy(update={"principles": kept})

    def for_critique(self) -> tuple[Principle, ...]:
        """The principles with a critique pair; ConfigError if there is none."""
        return self._having("critique_request")

    def for_feedback(self) -> tuple[Principle, ...]:
        """The principles with a preference question; ConfigError if there is none."""
        return self._having("preference_question")

    def _having(self, field: str) -> tuple[Principle, ...]:
        found = tuple(p for p in self.principles if getattr(p, field))
        if not found:
            raise ConfigError(
                f"no principle of constitution {self.name!r} has a {field}, and this stage draws from those that do",
                f"add a {field} to at least one principle, or name another file",
            )
        return found


_PARTS: dict[str, type[Section]] = {
    "principles": Principle,
    "critique_few_shots": CritiqueFewShot,
    "feedback_few_shots": FeedbackFewShot,
    "cot_few_shots": CotFewShot,
}


def _inconsistencies(c: Constitution) -> list[str]:
    """What is wrong with parts that are right each by itself."""
    ids = [principle.id for principle in c.principles]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    problems = [f"principle ids must be unique, these occur twice: {', '.join(twice)}"] if twice else []
    asked = [(f"principle {p.id!r}", p.preference_question) for p in c.principles]
    for field in ("feedback_few_shots", "cot_few_shots"):
        asked += [(f"{field}.{i}", shot.question) for i, shot in enumerate(getattr(c, field))]
    ending = OPTIONS[c.language]
    return problems + [
        f"{where}: the question must end with {ending!r}, because the two answers follow it"
        for where, question in asked
        if question and not question.endswith(ending)
    ]


def draw(principles: Sequence[Principle], seed: int) -> Principle:
    """One principle, with chances proportional to the weights; the same seed gives the same principle."""
    return random.Random(seed).choices(principles, [p.weight for p in principles])[0]


def draw_distinct(principles: Sequence[Principle], count: int, seed: int) -> list[Principle]:
    """`count` principles in the order in which they are drawn, none a second time before all have come.

    Each draw has chances proportional to the weights of those that are left.
    """
    clock, drawn = random.Random(seed), list[Principle]()
    while len(drawn) < count:
        # Clocks that ring at the rates of the weights do so in the order of such draws.
        drawn += sorted(principles, key=lambda p: clock.expovariate(p.weight))
    return drawn[:count]


def with_questions(shots: Sequence[Shot], principles: Sequence[Principle], seed: int) -> tuple[Shot, ...]:
    """Gives each example that has no question of its own the question of a principle drawn for it.

    The draw depends on the run's seed and the example's place, not on the row: all prompts of a run then begin with
    the same examples, which an engine computes once. Inverted principles stay out: examples name the better response.

    Raises:
        ConfigError: a question is needed, and every principle is inverted.
    """
    straight = [p for p in principles if not p.inverted]
    if not straight and not all(shot.question for shot in shots):
        raise ConfigError(
            "every preference question is inverted, and an example without a question needs one that is not",
            "give the examples questions of their own, or set few_shots: 0",
        )

    def asked(place: int, shot: Shot) -> Shot:
        principle = draw(straight, derive_seed(seed, str(place), "few_shot/principle"))
        return shot.model_copy(update={"question": principle.preference_question})

    return tuple(shot if shot.question else asked(i, shot) for i, shot in enumerate(shots))


def with_balanced_answers(shots: Sequence[Shot], seed: int) -> tuple[Shot, ...]:
    """Turns examples, chosen by the run's seed, so that A and B are right equally often, or all but one where odd."""
    order = sorted(range(len(shots)), key=lambda i: derive_seed(seed, str(i), "few_shot/order"))
    first = derive_seed(seed, "", "few_shot/first")
    wanted = {i: "AB"[(first + rank) % 2] for rank, i in enumerate(order)}
    return tuple(shot if shot.answer == wanted[i] else shot.turned() for i, shot in enumerate(shots))


def load_constitution(path_or_name: str | Path) -> Constitution:
    """Reads and checks a constitution.

    Args:
        path_or_name: a YAML file, the name of a shipped one (`default`), or a folder of the paper's JSON files.

    Raises:
        ConfigError: no such file, or its content is not a constitution; the message names every place.
    """
    return _checked(read_constitution(path_or_name))


def read_constitution(path_or_name: str | Path) -> dict[str, Any]:
    """The content of a constitution, not yet checked, and its `source`; `load_constitution` says what can be named.

    Raises:
        ConfigError: no such file, or it is not readable or holds no principles.
    """
    if not shipped_file("constitutions", str(path_or_name)) and Path(path_or_name).is_dir():
        return read_published(Path(path_or_name))
    path, data = read_yaml("constitutions", str(path_or_name))
    if not data.get("principles"):
        raise ConfigError(
            f"{path} holds no principles", "give it name, version and a list `principles`, as in the shipped ones"
        )
    return {**data, "source": str(path)}


def import_published(folder: str | Path) -> Constitution:
    """The constitution that the paper's authors published, from their five JSON files.

    16 principles with the critique pair, then 16 with the question: the lists are independent and are never zipped.

    Args:
        folder: the repository or its folder `prompts`.

    Raises:
        ConfigError: a file is missing or has another form than the published one.
    """
    return _checked(read_published(Path(folder)))


def _checked(data: dict[str, Any]) -> Constitution:
    found, problems = examine(data)
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ConfigError(f"{data['source']} is not a valid constitution:{lines}", "mend these lines")
    return found


def examine(data: dict[str, Any]) -> tuple[Constitution, list[str]]:
    """What of `data` can be read as a constitution, and everything that keeps it from being one."""
    try:
        found = Constitution.model_validate(data)
        return found, _inconsistencies(found)
    except ValidationError as error:
        mistakes = error.errors(include_url=False)
    bad, parts = {mistake["loc"][:2] for mistake in mistakes}, {}
    for field, kind in _PARTS.items():
        items = data[field] if isinstance(data.get(field), list) else []
        parts[field] = tuple(kind.model_validate(x) for i, x in enumerate(items) if (field, i) not in bad)
    head = {field: str(data.get(field, "")) for field in ("name", "version", "source")}
    language = data["language"] if str(data.get("language")) in OPTIONS else "en"
    partial = Constitution.model_construct(None, **head, language=language, **parts)
    mistakes.sort(key=lambda mistake: len(mistake["loc"]) > 1)  # those of the whole come first
    return partial, [*(explain(mistake, Constitution) for mistake in mistakes), *_inconsistencies(partial)]


class _Readable(yaml.SafeDumper):
    """Long texts as block scalars, so that they can be read and edited."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    if set(text) & set("\r\x85\u2028\u2029"):  # to YAML they are line breaks like any other, so they are escaped
        style = '"'
    elif "\n" in text:
        style = "|"
    elif len(text) > 80:
        style = "|" if text[0] == " " else ">"  # a folded line that is indented does not come back
    else:
        style = None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Readable.add_representer(str, _text)


def to_yaml(constitution: Constitution) -> str:
    """The constitution as YAML that `load_constitution` reads back, equal in everything but `source`."""
    content = constitution.model_dump(mode="json", exclude={"source"}, exclude_defaults=True)
    for item in [item for field in _PARTS for item in content.get(field, ())]:
        for key in item.keys() & {"preference_question", "question"}:
            item[key] = item[key].strip()  # loading puts the line break back
    return yaml.dump(content, Dumper=_Readable, sort_keys=False, allow_unicode=True, width=110)
