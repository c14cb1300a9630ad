"""Stage 2: the helpful model answers, criticises its answer by a drawn principle, and revises it, several rounds.

Bai et al. 2022 (arXiv 2212.08073), section 3. Helpful prompts get plain answers of the same model, which keep the
supervised model helpful.
"""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cai_ray.artifacts import Manifest, StageDir
from cai_ray.config import ReviseConfig
from cai_ray.constitution import Constitution, draw
from cai_ray.errors import DataError
from cai_ray.generation.data_plane import map_rows
from cai_ray.records import PROMPT, REVISION, Row, derive_seed, row_id
from cai_ray.stages.shared import GenerateInputs, ask, read_rows, write_rows
from cai_ray.templates import (
    FRAMES,
    critique_prompt,
    critique_prompt_messages,
    revision_prompt,
    revision_prompt_messages,
)


def revise(config: ReviseConfig, inputs: GenerateInputs, out: StageDir) -> Manifest:
    """Writes one `Revision` row per harmful prompt and per helpful sample; the latter have no rounds.

    Raises:
        StageFailed: an engine died repeatedly, or more than the permitted share of rows is bad.
    """
    rows = []
    for row in read_rows(inputs.rows):
        if row["kind"] == "harmful":
            rows.append(row)
        else:  # each sample is a row of its own, so that rows in equal rows out
            samples = range(config.helpful_samples_per_prompt)
            rows += [{**row, "id": row_id(row["id"], sample)} for sample in samples]
    work = write_rows(rows, PROMPT, out.path / "inputs")
    assert inputs.constitution is not None
    program = ReviseRow(config, inputs.constitution, out.seed)
    longest = max(config.max_new_tokens, config.max_critique_tokens)
    engines = inputs.setup.engines(config.max_prompt_tokens + longest, inputs.settings.engines)
    with out.phase("generate"):
        counts = map_rows(work, program, engines, out, settings=inputs.settings)

    done = read_rows(out.data)
    for row in [r for r in done if r["rounds"]][:8]:
        out.sample(row)
    flags = [f for r in done for f in r["flags"]]
    metrics = {
        **counts.as_metrics(),
        "harmful": sum(r["kind"] == "harmful" for r in done),
        "helpful": sum(r["kind"] == "helpful" for r in done),
        "rounds": config.rounds,
        **{f"flag/{name}": flags.count(name) for name in sorted(set(flags))},
    }
    return out.commit(inputs.key, metrics)


@dataclass(frozen=True)
class ReviseRow:
    """What the engine does with one row: a response, then rounds of critique and revision."""

    config: ReviseConfig
    constitution: Constitution
    seed: int

    @property
    def schema(self) -> pa.Schema:
        """Schema of the rows that come out."""
        return REVISION

    async def __call__(self, row: Row, engine: Any) -> Row:
        """The row's `Revision`.

        Raises:
            DataError: a prompt is too long, or a response or revision came out empty.
        """
        return await self.once(row, engine, None)

    async def once(self, row: Row, engine: Any, response: str | None) -> Row:
        """The same from a given first response; None lets the model answer."""
        flags: list[str] = []
        if response is None:
            response = await self._write(engine, row["messages"], row, "response", self.config.max_new_tokens, flags)
        latest: str = response
        out: Row = {**row, "initial_response": latest, "rounds": [], "seed": self.seed, "flags": flags}
        if row["kind"] == "harmful":
            for number in range(1, self.config.rounds + 1):
                done = await self._round(engine, row, latest, number, flags)
                out["rounds"].append(done)
                latest = done["revision"]
        return out

    async def _round(self, engine: Any, row: Row, response: str, number: int, flags: list[str]) -> Row:
        principles = self.constitution.for_critique()
        principle = draw(principles, derive_seed(self.seed, row["id"], f"principle/{number}"))
        shots = self.constitution.critique_few_shots[: self.config.few_shots]
        request, language = principle.critique_request or "", self.constitution.language
        plain = engine.tokenizer.format == "plain"
        stop = FRAMES[language].critique_stops if plain else ()

        head = (row["messages"], response, request)
        prompt = critique_prompt(*head, shots, language) if plain else critique_prompt_messages(*head, shots)
        limit = self.config.max_critique_tokens
        critique = await self._write(engine, prompt, row, f"critique/{number}", limit, flags, stop)

        head = (*head, critique, principle.revision_request or "")
        prompt = revision_prompt(*head, shots, language) if plain else revision_prompt_messages(*head, shots)
        limit = self.config.max_new_tokens
        revision = await self._write(engine, prompt, row, f"revision/{number}", limit, flags, stop)
        return {"principle_id": principle.id, "critique": critique, "revision": revision}

    async def _write(
        self, engine: Any, prompt: Any, row: Row, step: str, limit: int, flags: list[str], stop: Any = ()
    ) -> str:
        done = await ask(engine, prompt, row, step, self.seed, self.config, max_new_tokens=limit, stop=stop)
        if not done.ended:
            flags.append(f"truncated:{step.split('/')[0]}")
        if not done.text and not step.startswith("critique"):
            raise DataError(f"the {step.split('/')[0]} came out empty")
        return done.text
