"""What stages share: their inputs, how they ask an engine, how they train, how rows are read and written."""

import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cai_ray.artifacts import StageDir, StageKey
from cai_ray.config import Answering, Cluster, LabelConfig, PreferenceModelConfig, Sampling, SftConfig
from cai_ray.constitution import Constitution
from cai_ray.errors import DataError
from cai_ray.generation.data_plane import MapSettings
from cai_ray.generation.engine import Completion, Request
from cai_ray.models.tokenization import PromptText, Tokenizer
from cai_ray.records import Message, Row, derive_seed, stored_rows, to_table
from cai_ray.templates import STOP_PLAIN
from cai_ray.training.launch import Job, Kind, run_training

PromptOf = Callable[[Sequence[Message]], PromptText]  # a step's prompt around a conversation
IN_MEMORY = 1000  # rows


@dataclass(frozen=True)
class EngineSetup:
    """A model that a stage reads, and how engines come to hold it."""

    pool: Any  # generation.pool.EnginePool
    model: Path
    format: str  # auto | plain | chat
    dtype: str
    run_tokens: int  # the run's longest prompt and response: an engine that holds them serves later stages too

    def engines(self, max_model_len: int, count: int | None = None, **options: Any) -> Callable[..., list[Any]]:
        """What gives engines that hold this model: started or reused when called, replaced when dead.

        It may be called with the placement group in which they are to be.

        Args:
            max_model_len: longest prompt and response together, tokens.
            count: how many; as many as the cluster is to have when None (`EnginePool.engines`).
            options: further ones of `EnginePool.engines`.
        """
        config = json.loads((self.model / "config.json").read_text("utf-8"))
        positions = config.get("text_config", config).get("max_position_embeddings")
        longest = max(max_model_len, min(self.run_tokens, positions or self.run_tokens))
        how = {"format": self.format, "dtype": self.dtype, "max_model_len": longest, "count": count, **options}
        return lambda group=None: self.pool.engines(self.model, **how, group=group)


@dataclass(frozen=True)
class StageInputs:
    """What a stage reads besides its section of the configuration: what its line in `pipeline.stage_table` names.

    Attributes:
        key: what its manifest says of all this.
        rows: a folder of parquet for each stage whose rows it reads.
        models: by name, in the table's order; for PPO `feedback_model`, too, where that is a reward.
        settings: how rows go to engines; the share of bad rows and the progress display of every stage.
        cluster: time limits, and how large engines are.
        device: cpu or gpu.
        threads: of the process that scores answers on a CPU.
        constitution: the principles that it draws from.
    """

    key: StageKey
    rows: tuple[Path, ...]
    models: Mapping[str, EngineSetup]
    settings: MapSettings
    cluster: Cluster
    device: str
    threads: int
    constitution: Constitution | None = None

    @property
    def setup(self) -> EngineSetup:
        """The first model: the one that answers or learns."""
        return next(iter(self.models.values()))


def warn_of_few(out: StageDir, wanted: int, found: int) -> None:
    """Says so where a constitution has fewer examples than few_shots asks for."""
    if found < wanted:
        out.warn(f"{out.name}.few_shots asks for {wanted} examples, the constitution has {found} of this kind.")


def check_length(ids: list[int], limit: int) -> list[int]:
    """Passes `ids` on.

    Raises:
        DataError: there are more than `limit`; the row is quarantined with this reason.
    """
    if len(ids) > limit:
        raise DataError(f"the prompt has {len(ids)} tokens, more than {limit}", "raise max_prompt_tokens")
    return ids


def around(build: Callable[..., PromptText], *rest: Any) -> PromptOf:
    """A step's prompt: what a function of `templates` makes of a conversation and the rest of its arguments."""
    return lambda messages: build(messages, *rest)


def fit_turns(
    tokenizer: Tokenizer, prompt: PromptOf, messages: Sequence[Message], limits: Answering | LabelConfig
) -> tuple[PromptText, bool]:
    """A prompt around the most of a conversation that fits, and whether turns were dropped for it.

    Where `limits.too_long` says so, the fewest pairs of user and assistant go from the left; a system turn and the last
    turn stay. What is still too long is `ask`'s to refuse.
    """
    system = list(messages[:1] if messages[0]["role"] == "system" else ())
    turns = messages[len(system) :]

    def without(pairs: int) -> PromptText:
        return prompt([*system, *turns[2 * pairs :]])

    if limits.too_long == "quarantine":
        return without(0), False

    def fits(pairs: int) -> bool:
        return len(tokenizer.prompt(without(pairs))) <= limits.max_prompt_tokens

    # Searched by halves: one after the other, a conversation of absurd length would hold up every row beside it.
    dropped = bisect_left(range(len(turns) // 2), True, key=fits)
    return without(dropped), dropped > 0


async def ask(
    engine: Any,
    prompt: PromptText,
    row: Row,
    step: str,
    seed: int,
    limits: Sampling,
    *,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
) -> Completion:
    """One completion of `prompt`, sampled with the seed of (run seed, row id, step).

    Raises:
        DataError: the prompt is longer than `limits.max_prompt_tokens`.
    """
    tokenizer: Tokenizer = engine.tokenizer
    plain = isinstance(prompt, str) or tokenizer.format == "plain"
    request = Request(
        prompt_ids=check_length(tokenizer.prompt(prompt), limits.max_prompt_tokens),
        max_new_tokens=max_new_tokens or limits.max_new_tokens,
        temperature=limits.temperature,
        seed=derive_seed(seed, row["id"], step),
        stop=tuple(stop) or (tuple(STOP_PLAIN) if plain else ()),
    )
    return await engine.ask(request)


def read_rows(folder: Path, share: tuple[float, float] = (0.0, 1.0), **equal: str) -> list[Row]:
    """`iter_rows` as a list sorted by id."""
    return sorted(iter_rows(folder, share, **equal), key=lambda r: r["id"])


def iter_rows(folder: Path, share: tuple[float, float] = (0.0, 1.0), **equal: str) -> Iterator[Row]:
    """`stored_rows` of which each named column equals its value.

    `share` takes only ids whose hash lies in [low, high); it is the same in every run and stage, so that [0, 0.3] and
    [0.3, 1] have no row in common.
    """
    for row in stored_rows(folder):
        if all(row[k] == v for k, v in equal.items()) and in_share(row["id"], share):
            yield row


def in_share(row: str, share: tuple[float, float]) -> bool:
    """Whether a row's id, hashed into [0, 1), lies in [low, high)."""
    return share[0] <= derive_seed(0, row, "share") / 2**31 < share[1]


def write_rows(rows: Iterable[Row], schema: pa.Schema, folder: Path) -> Path:
    """Writes rows as a folder of parquet, in place of what it holds, few of them in memory at a time; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in folder.glob("part-*.parquet"):
        part.unlink()
    left = iter(rows)
    with pq.ParquetWriter(folder / "part-00000.parquet", schema) as file:
        while some := list(islice(left, IN_MEMORY)):
            file.write_table(to_table(some, schema))
    return folder


def fit(
    kind: Kind, config: SftConfig | PreferenceModelConfig, rows: Sequence[Path], inputs: StageInputs, out: StageDir
) -> dict[str, float]:
    """Trains on folders of rows and leaves the model in `out`; returns counts and the last metrics."""
    if inputs.device == "gpu":  # engines leave the GPUs that training is about to take
        inputs.setup.pool.release()
    job = Job(
        kind=kind,
        config=config,
        model=inputs.setup.model.resolve(),
        format=inputs.setup.format,
        inputs=tuple(folder.resolve() for folder in rows),
        out=out.path.resolve(),
        seed=out.seed,
        device=inputs.device,
        max_bad_fraction=inputs.settings.max_bad_fraction,
        start_timeout_s=inputs.cluster.start_timeout_s,
        step_timeout_s=inputs.cluster.step_timeout_s,
    )
    with inputs.settings.progress() as show, out.phase("train"):
        return run_training(job, out, show)
