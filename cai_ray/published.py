"""Reads the files of the Constitutional AI paper's repository (github.com/anthropics/ConstitutionalHarmlessnessPaper).

Their instructions and examples are finished prompt text; here they are taken apart into bare texts, from which the
templates rebuild the published bytes. Two of the six chain-of-thought examples open unlike the rest (a line break or
the letters H and A are missing); they come out with the common opening.
"""

import json
import re
from pathlib import Path
from typing import Any

from cai_ray.errors import ConfigError
from cai_ray.records import Message

_FILES = (
    "CritiqueRevisionInstructions",
    "RLMadisonInstructions",
    "CritiqueRevisionFewShotPrompts",
    "RLMadisonFewShotPrompts",
    "RLMadisonPrecogFewShotPrompts",
)
_FIX = "take the files from the repository as they are"
_REQUEST = re.compile(r"\n\nCritiqueRequest: (?P<critique_request>.*)\n\nCritique:", re.DOTALL)
_MENDING = re.compile(r"\n\nRevisionRequest: (?P<revision_request>.*)\n\nRevision:", re.DOTALL)
_COT = re.compile(
    r"\n{0,2}Human: Consider the following conversation between a human(?: \(H\))? and an assistant(?: \(A\))?:"
    r"(?P<turns>.*?)\n\n\{\}\n \(A\) \[\[\[(?P<response_a>.*?)\]\]\]\n \(B\) \[\[\[(?P<response_b>.*?)\]\]\]"
    # The rationale keeps its first space or newline.
    r"\n\nAssistant: Let's think step by step:(?P<rationale>.*)\n\nHuman:\nSo the answer is: \((?P<answer>[AB])\)",
    re.DOTALL,
)
_CRITIQUE = re.compile(
    r"(?P<turns>.*)\n\nAssistant: (?P<response>.*?)\n\nCritiqueRequest: (?P<critique_request>.*)"
    r"\n\nCritique: (?P<critique>.*)\n\nRevisionRequest: (?P<revision_request>.*)"
    r"\n\nRevision: (?P<revision>.*?)(?:\n\nHuman:)?",  # dangling marker
    re.DOTALL,
)


def read_published(folder: Path) -> dict[str, Any]:
    """The five published files as the content of one constitution, not yet checked.

    The comparison examples come without a question and without an order: the better answer is A, B, A, B, A in turn.

    Args:
        folder: the repository or its folder `prompts`.

    Raises:
        ConfigError: a file is missing or has another form than the published one.
    """
    folder = folder / "prompts" if (folder / "prompts").is_dir() else folder
    try:
        files = [json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in _FILES]
        return {"name": "published", "version": "arXiv:2212.08073", "source": str(folder), **_content(*files)}
    except OSError as error:
        raise ConfigError(f"{folder} does not hold the published files: {error}", "clone their repository") from None
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"the files in {folder} do not have the published form: {error!r}", _FIX) from None


def _content(pairs: Any, questions: Any, critiques: Any, comparisons: Any, cots: Any) -> dict[str, Any]:
    principles = [
        {"id": name, "tags": ["critique"], **_match(_REQUEST, x["prompt"][0]), **_match(_MENDING, x["edit_request"])}
        for name, x in pairs.items()
    ]
    for i, question in enumerate(questions):
        principles.append({"id": f"question{i}", "tags": ["feedback"], "preference_question": question})
    return {
        "principles": principles,
        "critique_few_shots": [_shot(_CRITIQUE, text, "Human", "Assistant") for text in critiques],
        "feedback_few_shots": [_feedback_shot(shot, "AB"[i % 2]) for i, shot in enumerate(comparisons)],
        "cot_few_shots": [_shot(_COT, shot["prompt"], "H", "A") for shot in cots],
    }


def _match(pattern: re.Pattern[str], text: str) -> dict[str, Any]:
    match = pattern.fullmatch(text)
    if match is None:
        raise ConfigError(f"a published text does not have the published form {pattern.pattern!r}", _FIX)
    return match.groupdict()


def _split_turns(text: str, user: str, assistant: str) -> list[Message]:
    parts = re.split(rf"\n\n({user}|{assistant}): ", text)
    roles = {user: "user", assistant: "assistant"}
    return [{"role": roles[name], "content": said} for name, said in zip(parts[1::2], parts[2::2], strict=True)]


def _shot(pattern: re.Pattern[str], text: str, user: str, assistant: str) -> dict[str, Any]:
    parts = _match(pattern, text)
    return {"messages": _split_turns(parts.pop("turns"), user, assistant), **parts}


def _feedback_shot(shot: dict[str, Any], answer: str) -> dict[str, Any]:
    better, worse = shot["corrects"][0], shot["incorrects"][0]
    a, b = (better, worse) if answer == "A" else (worse, better)
    messages = _split_turns(shot["prompt"].removesuffix("\n\nAssistant:"), "Human", "Assistant")
    return {"messages": messages, "response_a": a, "response_b": b, "answer": answer}
