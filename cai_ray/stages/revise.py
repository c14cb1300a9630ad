"""Stage 2: the helpful model answers, criticises its answer by a drawn principle, and revises it, several rounds.

Bai et al. 2022 (arXiv 2212.08073), section 3. Helpful prompts get plain answers of the same model, which keep the
supervised model helpful.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from cai_ray import templates
from cai_ray.artifacts import Manifest, StageDir
from cai_ray.config import ReviseConfig
from cai_ray.constitution import Constitution, Principle, draw, draw_distinct
from cai_ray.errors import DataError
from cai_ray.evaluation.statistics import looks_like_refusal
from cai_ray.generation.data_plane import map_rows
from cai_ray.generation.engine import Completion
from cai_ray.models.tokenization import Tokenizer
from cai_ray.records import PROMPT, REVISION, Row, derive_seed, row_id
from cai_ray.stages.shared import PromptOf, StageInputs, around, ask, fit_turns, iter_rows, warn_of_few, write_rows
from cai_ray.templates import FRAMES, escape

OPENING = (12, 40)  # a revision leaks its critique when it begins with its first 40 characters, or all of 12 or more
MANY_REFUSALS = 0.5


def revise(config: ReviseConfig, inputs: StageInputs, out: StageDir) -> Manifest:
    """Writes one `Revision` row per harmful prompt and per helpful sample; the latter have no rounds.

    Raises:
        StageFailed: an engine died repeatedly, or more than the permitted share of rows is bad.
    """
    prompts = iter_rows(inputs.rows[0], config.share)
    work = write_rows((row for prompt in prompts for row in asked(prompt, config)), PROMPT, out.path / "inputs")
    assert inputs.constitution is not None
    program = ReviseRow(config, inputs.constitution, out.seed)
    warn_of_few(out, config.few_shots, len(inputs.constitution.critique_few_shots))
    engines = inputs.setup.engines(config.max_tokens)
    with out.phase("generate"):
        counts = map_rows(work, program, engines, out, settings=inputs.settings)

    for row in islice((r for r in iter_rows(out.data) if r["rounds"]), 8):
        out.sample(row)
    found = revise_statistics(iter_rows(out.data), config.rounds, out.warn)
    return out.commit(inputs.key, {**counts, **found})


def asked(prompt: Row, config: ReviseConfig) -> list[Row]:
    """A prompt's rows: itself, or where it is a helpful one each of its samples, so that rows in equal rows out."""
    if prompt["kind"] == "harmful":
        return [prompt]
    return [{**prompt, "id": row_id(prompt["id"], sample)} for sample in range(config.helpful_samples_per_prompt)]


def revise_statistics(rows: Iterable[Row], rounds: int, warn: Callable[[str], None]) -> dict[str, float]:
    """Rows by kind, flags by name and step, the share of harmful prompts whose first answer already refuses.

    Where most of them refuse, `warn` is told.
    """
    kinds, flags, refused = Counter[str](), Counter[str](), 0
    for row in rows:
        kinds[row["kind"]] += 1
        flags.update(flag.split("/")[0] for flag in row["flags"])
        refused += row["kind"] == "harmful" and looks_like_refusal(row["initial_response"])
    share = refused / max(1, kinds["harmful"])
    if share > MANY_REFUSALS:
        warn(
            f"The model that is to be revised refuses {share:.0%} of the harmful prompts in its first answer, which "
            "leaves the constitution nothing to do; take a helpful-only model, or prompts that it does answer."
        )
    return {
        "harmful": kinds["harmful"],
        "helpful": kinds.total() - kinds["harmful"],
        "rounds": rounds,
        "refused_at_first": share,
        **{f"flag/{name}": count for name, count in sorted(flags.items())},
    }


def faults(
    done: Completion, tokenizer: Tokenizer, language: str, before: str | None = None, critique: str = ""
) -> list[str]:
    """What makes a text unusable: `empty` and `role_leaked`; for a revision also `copy` and `critique_leaked`.

    Args:
        done: what was sampled.
        tokenizer: of the model that wrote it.
        language: of the labels that stand before critiques and revisions.
        before: the response that was to be revised; None for a text that is no revision.
        critique: of that response, if there is one.
    """
    folded, opening = _folded(done.text), _folded(critique)[: OPENING[1]]
    labelled = escape(done.text, FRAMES[language].labels) != done.text
    repeated = len(opening) >= OPENING[0] and folded.startswith(opening)
    found = {
        "empty": not folded,
        "copy": bool(folded) and before is not None and folded == _folded(before),
        "critique_leaked": before is not None and (labelled or repeated),
        # What would be escaped in a prompt opens a turn.
        "role_leaked": escape(done.text) != done.text or tokenizer.leaks_control(done.ids, done.text),
    }
    return [name for name, applies in found.items() if applies]


def _folded(text: str) -> str:
    return " ".join(text.split())


@dataclass(frozen=True)
class ReviseRow:
    """What the engine does with one row: a response, then rounds of critique and revision."""

    config: ReviseConfig
    constitution: Constitution
    seed: int

    schema = REVISION

    async def __call__(self, row: Row, engine: Any, response: str | None = None) -> Row:
        """The row's `Revision`, from a first response that is given, or else the model's own.

        Raises:
            DataError: a prompt is too long, a response or revision came out empty, or a text that is unusable came
                where such rows are to be quarantined.
        """
        flags: list[str] = []
        if response is None:
            response = await self._write(engine, list, row, "response", flags)
        latest: str = response
        out: Row = {**row, "initial_response": latest, "rounds": [], "seed": self.seed, "flags": flags}
        if row["kind"] == "harmful":
            for number, principle in enumerate(self._principles(row["id"]), 1):
                done = await self._round(engine, row, latest, principle, number, flags)
                out["rounds"].append(done)
                latest = done["revision"]
        return out

    def _principles(self, row: str) -> list[Principle]:
        principles, rounds = self.constitution.for_critique(), self.config.rounds
        if self.config.principles == "without_replacement":
            return draw_distinct(principles, rounds, derive_seed(self.seed, row, "principles"))
        return [draw(principles, derive_seed(self.seed, row, f"principle/{n}")) for n in range(1, rounds + 1)]

    async def _round(
        self, engine: Any, row: Row, response: str, principle: Principle, number: int, flags: list[str]
    ) -> Row:
        forms = (templates.CRITIQUE, templates.REVISION, templates.DIRECT_REVISION)
        critic, reviser, direct = (form.of(engine.tokenizer.format) for form in forms)
        examples = (self.constitution.critique_few_shots[: self.config.few_shots], self.constitution.language)
        request, mend, critique = principle.critique_request, principle.revision_request, ""

        if self.config.critique:
            prompt = around(critic, response, request, *examples)
            critique = await self._write(engine, prompt, row, f"critique/{number}", flags)
            prompt = around(reviser, response, request, critique, mend, *examples)
        else:
            prompt = around(direct, response, mend, *examples)
        known = {"before": response, "critique": critique}
        revision = await self._write(engine, prompt, row, f"revision/{number}", flags, **known)
        return {"principle_id": principle.id, "critique": critique, "revision": revision}

    async def _write(self, engine: Any, prompt: PromptOf, row: Row, step: str, flags: list[str], **known: str) -> str:
        """A step's text, sampled again where it is unusable and the policy says so; adds to `flags` what it is."""
        config, language, tokenizer = self.config, self.constitution.language, engine.tokenizer
        is_critique, framed = step.startswith("critique"), tokenizer.format == "plain" and step != "response"
        limit = config.max_critique_tokens if is_critique else config.max_new_tokens
        stop = FRAMES[language].critique_stops if framed else ()
        asked, shortened = fit_turns(tokenizer, prompt, row["messages"], config)
        tries = []
        for name in (step, f"{step}/retry"):
            done = await ask(engine, asked, row, name, self.seed, config, max_new_tokens=limit, stop=stop)
            tries.append((done, faults(done, tokenizer, language, **known)))
            if config.unusable != "retry" or not tries[-1][1]:
                break
        done, found = min(tries, key=lambda t: (bool(t[1]), "empty" in t[1]))  # the first of equally good ones
        if found and (config.unusable == "quarantine" or ("empty" in found and not is_critique)):
            raise DataError(f"the {step} came out unusable: {', '.join(found)}")
        also = {"shortened": shortened, "truncated": not done.ended, "retried": done is not tries[0][0]}
        flags += [f"{name}:{step}" for name in [*found, *(n for n, applies in also.items() if applies)]]
        return done.text
