"""Stage 8: every model of the run answers the same held-out prompts; the preference model scores the answers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.data

from cai_ray.artifacts import Manifest, StageDir
from cai_ray.config import EvaluateConfig
from cai_ray.evaluation.answers import ANSWER, SCORED, Scorer, summary, wins
from cai_ray.generation.data_plane import map_rows
from cai_ray.records import PROMPT, Row
from cai_ray.stages.shared import StageInputs, ask, read_rows, write_rows


def evaluate(config: EvaluateConfig, inputs: StageInputs, out: StageDir) -> Manifest:
    """Writes one scored answer per model and held-out prompt, and each model's mean score, refusals and length.

    Raises:
        StageFailed: an engine died repeatedly, or more than the permitted share of rows is bad.
    """
    rows: list[Row] = []
    for kind in ("harmful", "helpful"):
        rows += read_rows(inputs.rows[0], kind=kind, split="test")[: config.prompts]
    *asked, _ = inputs.models.items()  # the last one scores; the one before it is the policy
    # Numbered, because a model may be named by its folder.
    parts, bad = [StageDir(out.path / "answers" / str(n), out.seed) for n in range(len(asked))], []
    for part, (name, setup) in zip(parts, asked, strict=True):
        work = write_rows(rows, PROMPT, part.path / "inputs")
        engines = setup.engines(config.max_tokens)
        with out.phase("generate"):
            map_rows(work, Answer(config, out.seed, name), engines, part, settings=inputs.settings)
        bad += [{"model": name, **json.loads(line)} for line in part.quarantine_path.read_text("utf-8").splitlines()]
    if inputs.device == "gpu":  # the scorer takes a GPU that an engine may hold
        inputs.setup.pool.release()
    with out.phase("score"):
        scored = _score(inputs, [part.data for part in parts], out)
    answers = [row for row in scored if row["score"] is not None]
    unread = [{"id": r["id"], "model": r["model"], "reason": r["reason"]} for r in scored if r["score"] is None]
    out.quarantine(unread, len(scored), inputs.settings.max_bad_fraction)
    # With those that had no answer, which have kept to the limit.
    out.quarantine(bad + unread, len(rows) * len(parts), 1.0)
    write_rows(answers, SCORED, out.data)
    metrics: dict[str, Any] = {"rows_in": len(rows) * len(parts), "rows_out": len(answers)}
    metrics["quarantined"] = len(bad) + len(unread)
    policy = asked[-1][0]
    for name, _ in asked:
        for kind in ("harmful", "helpful"):
            metrics |= summary([r for r in answers if r["model"] == name and r["kind"] == kind], f"{name}/{kind}")
        if name != policy:
            metrics |= wins(answers, policy, name)
    first = {r["id"] for r in rows[:4]} | {r["id"] for r in rows[-4:]}
    for row in answers:
        if row["id"] in first:
            out.sample(row)
    return out.commit(inputs.key, metrics)


@dataclass(frozen=True)
class Answer:
    """What the engine does with one row: one answer; every model gets the same seed for the same prompt."""

    config: EvaluateConfig
    seed: int
    model: str

    schema = ANSWER

    async def __call__(self, row: Row, engine: Any) -> Row:
        """The row's answer.

        Raises:
            DataError: the prompt is too long.
        """
        done = await ask(engine, row["messages"], row, "evaluate", self.seed, self.config)
        flags = [] if done.ended else ["truncated:response"]
        return {**row, "model": self.model, "response": done.text, "seed": self.seed, "flags": flags}


def _score(inputs: StageInputs, folders: list[Path], out: StageDir) -> list[Row]:
    *order, scorer = inputs.models
    gpu = inputs.device == "gpu"
    scored = ray.data.read_parquet([str(f) for f in folders], partitioning=None).map_batches(
        Scorer,
        fn_constructor_args=(str(inputs.models[scorer].model), gpu),
        batch_format="pyarrow",
        batch_size=64,
        compute=ray.data.ActorPoolStrategy(size=1),
        max_restarts=0,  # Ray warns of a restart that may fail; this way the same command is the restart
        num_gpus=1 if gpu else 0,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(inputs.threads)}},
    )
    return sorted(scored.take_all(), key=lambda r: (r["id"], order.index(r["model"])))
