"""Stage 4: the SL model answers each harmful prompt twice (Bai et al. 2022, section 4)."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cai_ray.artifacts import Manifest, StageDir
from cai_ray.config import SamplePairsConfig
from cai_ray.errors import DataError
from cai_ray.generation.data_plane import map_rows
from cai_ray.records import PROMPT, RESPONSE_PAIR, Row
from cai_ray.stages.shared import GenerateInputs, ask, read_rows, write_rows


def sample_pairs(config: SamplePairsConfig, inputs: GenerateInputs, out: StageDir) -> Manifest:
    """Writes one `ResponsePair` row per harmful prompt.

    Raises:
        StageFailed: an engine died repeatedly, or more than the permitted share of rows is bad.
    """
    work = write_rows(read_rows(inputs.rows, kind="harmful"), PROMPT, out.path / "inputs")
    program = SamplePair(config, out.seed)
    engines = inputs.setup.engines(config.max_prompt_tokens + config.max_new_tokens, inputs.settings.engines)
    with out.phase("generate"):
        counts = map_rows(work, program, engines, out, settings=inputs.settings)
    done = read_rows(out.data)
    for row in done[:8]:
        out.sample(row)
    same = sum(r["response_a"] == r["response_b"] for r in done)
    truncated = sum(len(r["flags"]) for r in done) / max(1, 2 * len(done))
    return out.commit(inputs.key, {**counts.as_metrics(), "equal_responses": same, "truncated": truncated})


@dataclass(frozen=True)
class SamplePair:
    """What the engine does with one row: two answers with seeds of their own."""

    config: SamplePairsConfig
    seed: int

    @property
    def schema(self) -> pa.Schema:
        """Schema of the rows that come out."""
        return RESPONSE_PAIR

    async def __call__(self, row: Row, engine: Any) -> Row:
        """The row's `ResponsePair`.

        Raises:
            DataError: the prompt is too long, or an answer came out empty.
        """
        flags: list[str] = []
        texts = []
        for letter in "ab":
            done = await ask(engine, row["messages"], row, f"response_{letter}", self.seed, self.config)
            if not done.text:
                raise DataError(f"response_{letter} came out empty")
            if not done.ended:
                flags.append(f"truncated:response_{letter}")
            texts.append(done.text)
        return {**row, "response_a": texts[0], "response_b": texts[1], "seed": self.seed, "flags": flags}
