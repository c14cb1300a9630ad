"""An engine that answers from a script and notes what it was asked; its tokens are words."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cai_ray.generation.engine import Completion, Request
from cai_ray.records import Row, derive_seed
from cai_ray.templates import ASSISTANT, render_turns

CUT = "…"  # ends a scripted text that reached its token limit
CONTROL = "<|end|>"


@dataclass
class WordTokenizer:
    """Tokens are words with the white space before them, so that the tokens of a prompt join to its text."""

    format: str = "plain"

    def prompt(self, prompt: str | Sequence[Mapping[str, str]]) -> list[Any]:
        if isinstance(prompt, str):
            return re.findall(r"\s*\S+", prompt)
        if self.format == "plain":
            return self.prompt(render_turns(prompt) + ASSISTANT)
        return [word for m in prompt for word in (f"<{m['role']}>", *self.prompt(m["content"]))]

    def leaks_control(self, ids: Sequence[Any], text: str) -> bool:
        return CONTROL in text


@dataclass
class ScriptedEngine:
    """Answers the request of a row's step, which it knows by its seed; a step without a line in the script fails."""

    row: Row
    seed: int
    script: Mapping[str, str]
    tokenizer: WordTokenizer = field(default_factory=WordTokenizer)
    max_model_len: int = 2048
    asked: dict[str, Request] = field(default_factory=dict)

    async def ask(self, request: Request) -> Completion:
        steps = {derive_seed(self.seed, self.row["id"], step): step for step in self.script}
        step = steps[request.seed]
        assert step not in self.asked
        self.asked[step] = request
        text = self.script[step]
        return Completion(text.split(), [], text.removesuffix(CUT), not text.endswith(CUT), 0)  # type: ignore[arg-type]

    def prompt(self, step: str) -> str:
        """What a step was asked."""
        return "".join(map(str, self.asked[step].prompt_ids))


def prompt_row(*turns: str, kind: str = "harmful", system: str = "") -> Row:
    """A `Prompt` row of alternating turns that begin and end with the user's."""
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
    head = [{"role": "system", "content": system}] if system else []
    return {"id": "row", "messages": [*head, *messages], "kind": kind, "source": "test", "split": "train"}
