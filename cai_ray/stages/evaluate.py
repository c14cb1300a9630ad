"""Stage 8: every model of the run answers the same held-out prompts; the preference model scores the answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from cai_ray.artifacts import Manifest, StageDir, StageKey
from cai_ray.config import EvaluateConfig
from cai_ray.errors import DataError
from cai_ray.evaluation.statistics import looks_like_refusal, mean_interval, win_rate
from cai_ray.generation.data_plane import MapSettings, RowCounts, map_rows
from cai_ray.records import PROMPT, Row, to_table
from cai_ray.stages.asking import EngineSetup, ask, read_rows

ANSWER = pa.schema(
    [*PROMPT, ("model", pa.string()), ("response", pa.string()), ("seed", pa.int64()), ("flags", pa.list_(pa.string()))]
)
SCORED = pa.schema([*ANSWER, ("score", pa.float64())])


@dataclass(frozen=True)
class EvaluateInputs:
    """What the stage reads besides its configuration."""

    key: StageKey
    prompts: Path
    models: dict[str, EngineSetup]  # in the order in which they were made; the last one is the policy
    reward: Path
    settings: MapSettings
    threads: int
    gpu: bool


def evaluate(config: EvaluateConfig, inputs: EvaluateInputs, out: StageDir) -> Manifest:
    """Writes one scored answer per model and held-out prompt, and each model's mean score, refusals and length.

    Raises:
        DataError: there is no held-out prompt.
        StageFailed: an engine died repeatedly, or more than the permitted share of rows is bad.
    """
    rows: list[Row] = []
    for kind in ("harmful", "helpful"):
        rows += read_rows(inputs.prompts, kind=kind, split="test")[: config.prompts]
    if not rows:
        raise DataError("evaluate: no prompt is in the held-out tenth", "give `prompts` more rows")
    counts: list[RowCounts] = []
    for name, setup in inputs.models.items():
        part = StageDir(out.path / "answers" / name, out.seed)
        work = part.path / "inputs"
        work.mkdir(parents=True, exist_ok=True)
        pq.write_table(to_table(rows, PROMPT), work / "part-00000.parquet")
        engines = setup.engines(config.max_prompt_tokens + config.max_new_tokens, inputs.settings.engines)
        with out.phase("generate"):
            counts.append(map_rows(work, Answer(config, out.seed, name), engines, part, settings=inputs.settings))
    with out.phase("score"):
        answers = _score(inputs, [out.path / "answers" / name / "data" for name in inputs.models], out)
    pq.write_table(to_table(answers, SCORED), out.data / "part-00000.parquet")
    metrics: dict[str, Any] = {
        "rows_in": sum(c.rows_in for c in counts),
        "rows_out": len(answers),
        "quarantined": sum(c.quarantined for c in counts),
    }
    policy = list(inputs.models)[-1]
    for name in inputs.models:
        for kind in ("harmful", "helpful"):
            metrics |= _summary([r for r in answers if r["model"] == name and r["kind"] == kind], f"{name}/{kind}")
        if name != policy:
            metrics |= _wins(answers, policy, name)
    first = {r["id"] for r in rows[:4]} | {r["id"] for r in rows[-4:]}
    for row in answers:
        if row["id"] in first:
            out.sample(row)
    return out.commit(inputs.key, metrics)


def _summary(rows: list[Row], prefix: str) -> dict[str, Any]:
    if not rows:
        return {}
    mean, low, high = mean_interval([r["score"] for r in rows])
    return {
        f"{prefix}/score": mean,
        f"{prefix}/score_low": low,
        f"{prefix}/score_high": high,
        f"{prefix}/refusals": sum(looks_like_refusal(r["response"]) for r in rows) / len(rows),
        f"{prefix}/words": sum(len(r["response"].split()) for r in rows) / len(rows),
        f"{prefix}/truncated": sum(bool(r["flags"]) for r in rows) / len(rows),
        f"{prefix}/prompts": len(rows),
    }


def _wins(answers: list[Row], policy: str, other: str) -> dict[str, float]:
    ours = {r["id"]: r["score"] for r in answers if r["model"] == policy}
    theirs = {r["id"]: r["score"] for r in answers if r["model"] == other}
    both = sorted(ours.keys() & theirs.keys())
    mean, low, high = mean_interval(win_rate([ours[i] for i in both], [theirs[i] for i in both]))
    key = f"{policy}/wins_over_{other}"
    return {key: mean, f"{key}_low": low, f"{key}_high": high}


@dataclass(frozen=True)
class Answer:
    """What the engine does with one row: one answer; every model gets the same seed for the same prompt."""

    config: EvaluateConfig
    seed: int
    model: str

    @property
    def schema(self) -> pa.Schema:
        """Schema of the rows that come out."""
        return ANSWER

    async def __call__(self, row: Row, engine: Any) -> Row:
        """The row's answer.

        Raises:
            DataError: the prompt is too long.
        """
        done = await ask(
            engine,
            row["messages"],
            row,
            "evaluate",
            seed=self.seed,
            max_prompt_tokens=self.config.max_prompt_tokens,
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
        )
        flags = [] if done.ended else ["truncated:response"]
        return {**row, "model": self.model, "response": done.text, "seed": self.seed, "flags": flags}


class Scorer:
    """Scores answers with the preference model, in a Ray Data actor."""

    def __init__(self, reward: str, gpu: bool, max_tokens: int):
        import torch

        from cai_ray.models.checkpoints import load_scalar_model
        from cai_ray.models.tokenization import Tokenizer

        self._device = torch.device("cuda" if gpu else "cpu")
        self._tokenizer = Tokenizer.load(Path(reward))
        self._model: Any = load_scalar_model(Path(reward), torch.float32).eval()
        self._model.to(self._device)
        self._max_tokens = max_tokens

    def __call__(self, table: pa.Table) -> pa.Table:
        """The table with a `score` column: raw scores, in the preference model's own units."""
        import torch

        from cai_ray.models.scalar import scores_at_end
        from cai_ray.models.tokenization import preference_input

        rows, scores = table.to_pylist(), []
        with torch.inference_mode():
            for row in rows:
                ids, _ = preference_input(
                    self._tokenizer.prompt(row["messages"]),
                    self._tokenizer.response(row["response"]),
                    self._tokenizer.eos_id,
                    self._max_tokens,
                )
                batch = torch.tensor([ids], device=self._device)
                scores.append(float(scores_at_end(self._model, batch, torch.tensor([len(ids)], device=self._device))))
        return to_table(({**r, "score": s} for r, s in zip(rows, scores, strict=True)), SCORED)


def _score(inputs: EvaluateInputs, folders: list[Path], out: StageDir) -> list[Row]:
    limit = 1 << 20  # nothing is cut here: what was sampled fits the model
    scored = ray.data.read_parquet([str(f) for f in folders]).map_batches(
        Scorer,
        fn_constructor_args=(str(inputs.reward), inputs.gpu, limit),
        batch_format="pyarrow",
        batch_size=64,
        concurrency=1,
        num_gpus=1 if inputs.gpu else 0,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(inputs.threads)}},
    )
    order = list(inputs.models)
    return sorted(scored.take_all(), key=lambda r: (r["id"], order.index(r["model"])))
