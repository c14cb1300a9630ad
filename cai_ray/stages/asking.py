"""How the generating stages ask the engine: a prompt in either format, a step's seed, a limit on its length."""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset as pads

from cai_ray.errors import DataError
from cai_ray.generation.engine import Completion, Request
from cai_ray.models.tokenization import Tokenizer
from cai_ray.records import Message, Row, derive_seed
from cai_ray.templates import STOP_PLAIN

PromptText = str | Sequence[Message]
Show = Callable[[], AbstractContextManager[Callable[[float, float | None, str], None]]]  # opens a progress display


@dataclass(frozen=True)
class EngineSetup:
    """Which model an engine holds for a stage, and where it may run."""

    pool: Any  # generation.pool.EnginePool
    model: Path
    format: str  # auto | plain | chat
    dtype: str
    run_tokens: int  # the run's longest prompt and response: an engine that holds them serves later stages too

    def engines(self, max_model_len: int, count: int) -> Callable[[], list[Any]]:
        """What gives engines that hold this model: started or reused when called, replaced when dead.

        Args:
            max_model_len: longest prompt and response together, tokens.
            count: how many.
        """
        positions = json.loads((self.model / "config.json").read_text("utf-8")).get("max_position_embeddings")
        longest = max(max_model_len, min(self.run_tokens, positions or self.run_tokens))
        return lambda: self.pool.engines(
            self.model, format=self.format, dtype=self.dtype, max_model_len=longest, count=count
        )


def encode(tokenizer: Tokenizer, prompt: PromptText) -> list[int]:
    """Token ids of a plain prompt, or of messages up to where the assistant's text goes on."""
    if isinstance(prompt, str):
        return tokenizer.plain(prompt)
    return tokenizer.open(prompt) if prompt[-1]["role"] == "assistant" else tokenizer.prompt(prompt)


def check_length(ids: list[int], limit: int) -> list[int]:
    """Passes `ids` on.

    Raises:
        DataError: there are more than `limit`; the row is quarantined with this reason.
    """
    if len(ids) > limit:
        raise DataError(f"the prompt has {len(ids)} tokens, more than {limit}", "raise max_prompt_tokens")
    return ids


async def ask(
    engine: Any,
    prompt: PromptText,
    row: Row,
    step: str,
    *,
    seed: int,
    max_prompt_tokens: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    stop: Sequence[str] = (),
) -> Completion:
    """One completion of `prompt`, sampled with the seed of (run seed, row id, step).

    Raises:
        DataError: the prompt is longer than `max_prompt_tokens`.
    """
    tokenizer: Tokenizer = engine.tokenizer
    plain = isinstance(prompt, str) or tokenizer.format == "plain"
    return await engine.ask(
        Request(
            prompt_ids=check_length(encode(tokenizer, prompt), max_prompt_tokens),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=derive_seed(seed, row["id"], step),
            stop=tuple(stop) or (tuple(STOP_PLAIN) if plain else ()),
            eos_ids=tuple(tokenizer.eos_ids),
        )
    )


def read_rows(folder: Path, **equal: str) -> list[Row]:
    """Rows of a folder of parquet files, sorted by id, where each named column equals its value."""
    table = pads.dataset(folder, format="parquet").to_table()
    rows = table.sort_by("id").to_pylist()
    return [r for r in rows if all(r[k] == v for k, v in equal.items())]
