"""Stage 4: the SL model answers each harmful prompt several times, and the answers are paired.

Bai et al. 2022 (arXiv 2212.08073), section 4. Each answer is sampled once, however many pairs it is in.
"""

import asyncio
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any

import pyarrow as pa

from cai_ray.artifacts import Manifest, StageDir
from cai_ray.config import SamplePairsConfig
from cai_ray.errors import DataError
from cai_ray.generation.data_plane import map_rows
from cai_ray.records import PROMPT, RESPONSE_PAIR, Row, row_id
from cai_ray.stages.shared import StageInputs, ask, fit_turns, read_rows, write_rows

_ANSWERS = pa.list_(pa.struct([("text", pa.string()), ("ended", pa.bool_())]))
RESPONSES = pa.schema([*PROMPT, ("responses", _ANSWERS), *(RESPONSE_PAIR.field(n) for n in ("seed", "flags"))])


def sample_pairs(config: SamplePairsConfig, inputs: StageInputs, out: StageDir) -> Manifest:
    """Writes the `ResponsePair` rows of every harmful prompt.

    Raises:
        StageFailed: an engine died repeatedly, or more than the permitted share of rows is bad.
    """
    rows = read_rows(inputs.rows[0], config.share, kind="harmful")
    work = write_rows(rows, PROMPT, out.path / "inputs")
    program = SampleResponses(config, out.seed)
    engines = inputs.setup.engines(config.max_tokens)
    with out.phase("generate"):
        counts = map_rows(work, program, engines, out, settings=inputs.settings)
    # Until the manifest is written, the same command gathers the answers again: pairs may take their place.
    answered = read_rows(out.data)
    done = sorted((pair for row in answered for pair in pairs_of(row, config.pairs)), key=lambda r: r["id"])
    write_rows(done, RESPONSE_PAIR, out.data)
    for row in done[:8]:
        out.sample(row)
    sampled = [r for row in answered for r in row["responses"]]
    metrics = {
        **counts,  # of prompts
        "pairs": len(done),
        "equal_responses": sum(r["response_a"] == r["response_b"] for r in done),
        "truncated": sum(not r["ended"] for r in sampled) / max(1, len(sampled)),
        "shortened": sum("shortened:prompt" in row["flags"] for row in answered),
    }
    return out.commit(inputs.key, metrics)


def pair_indices(count: int, design: str) -> list[tuple[int, int]]:
    """Which of `count` answers are compared, as (shown first, shown second).

    `all` gives every pair, `ring` each answer with the next and the last with the first. Every answer stands first as
    often as second, or once more or less, so that a judge's liking for the first favours none.
    """
    if design == "ring" and count > 2:
        return [(i, (i + 1) % count) for i in range(count)]
    return [(i, j) if (j - i) % 2 else (j, i) for j in range(count) for i in range(j)]


def pairs_of(row: Row, design: str) -> list[Row]:
    """The `ResponsePair` rows of a `RESPONSES` row; the pair of its first two answers keeps the prompt's id."""
    out = []
    for pair in pair_indices(len(row["responses"]), design):
        a, b = (row["responses"][i] for i in pair)
        cut = [f"truncated:{name}" for name, r in (("response_a", a), ("response_b", b)) if not r["ended"]]
        texts = {"response_a": a["text"], "response_b": b["text"], "flags": [*row["flags"], *cut]}
        out.append({**row, "id": row["id"] if pair == (0, 1) else row_id([row["id"], *pair]), **texts})
    return out


@dataclass(frozen=True)
class SampleResponses:
    """What the engine does with one row: several answers with seeds of their own, side by side."""

    config: SamplePairsConfig
    seed: int

    schema = RESPONSES

    async def __call__(self, row: Row, engine: Any) -> Row:
        """The row with its answers.

        Raises:
            DataError: the prompt is too long, or an answer came out empty.
        """
        config = self.config
        prompt, shortened = fit_turns(engine.tokenizer, list, row["messages"], config)
        steps = [f"response_{letter}" for letter in ascii_lowercase[: config.responses_per_prompt]]
        done = await asyncio.gather(*(ask(engine, prompt, row, step, self.seed, config) for step in steps))
        for step, answer in zip(steps, done, strict=True):
            if not answer.text:
                raise DataError(f"{step} came out empty")
        responses = [{"text": d.text, "ended": d.ended} for d in done]
        return {**row, "responses": responses, "seed": self.seed, "flags": ["shortened:prompt"] if shortened else []}
