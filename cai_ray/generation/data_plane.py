"""Rows through engines with Ray Data: durable as they end, bad rows apart, an engine's death survived.

Ray Data reads rows, cuts them into blocks and deals these out; the engines themselves write what they finish to the
stage's ledger, so no row passes Ray Data twice. The same call again generates only what the ledger lacks; finished rows
keep their bytes.
"""

import asyncio
import contextlib
import logging
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from ray.data import ExecutionResources
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from cai_ray.artifacts import Show, StageDir
from cai_ray.errors import DataError, StageFailed
from cai_ray.generation.actor import BAD, Program
from cai_ray.generation.ledger import Ledger
from cai_ray.generation.pool import DATA_CPUS, EngineHandle
from cai_ray.records import Row

RESTARTS = 2  # times that a stage goes on after an engine, or what feeds them, died of no row that is found out
POLL_S = 1.0
ANSWER_S = 30.0
PART_ROWS = 10_000
Info = dict[str, Any]  # what an engine says of itself (`EngineActor.info`)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MapSettings:
    """How rows are fed to engines.

    Attributes:
        rows_per_block: rows that are sent to an engine together.
        max_bad_fraction: share of bad rows beyond which the stage fails.
        timeout_s: longest time without any progress of any engine, seconds.
        progress: opens a display, which is told (rows done, rows in all, a few words).
        joining: engines that have not started yet and may join while rows are generated.
    """

    rows_per_block: int
    max_bad_fraction: float
    timeout_s: float
    progress: Show
    joining: Callable[[], Sequence[EngineHandle]] = tuple


def map_rows(
    inputs: Path,
    program: Program,
    get_engines: Callable[[], Sequence[EngineHandle]],
    out: StageDir,
    *,
    settings: MapSettings,
) -> dict[str, int]:
    """Runs a program on every row of a folder of parquet files; the ids of rows must be unique.

    Writes data/part-*.parquet, sorted by id, of `program.schema`, and quarantine.jsonl with {id, reason} of each bad
    row. A bad row is one for which the program raised a CaiError, or on which engines died again.

    Args:
        inputs: folder of the rows.
        program: what is done with a row.
        get_engines: gives idle engines with the model; it is asked again after an engine died.
        out: the stage's directory; the ledger lives under checkpoints/.
        settings: sizes and limits.

    Returns:
        Metrics: rows_in, which is rows_out + quarantined.

    Raises:
        DataError: two input rows have one id.
        StageFailed: too many bad rows, engines that die again and again, or no progress. What is done is kept.
    """
    expected = pq.read_table(inputs, columns=["id"]).sort_by("id")["id"].combine_chunks()
    distinct = len(expected.unique())
    if distinct < len(expected):
        raise DataError(f"{inputs} holds {len(expected)} rows but {distinct} ids", "make the ids unique")
    out.checkpoints.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(out.checkpoints.resolve())
    if set(expected.to_pylist()) - ledger.ids():
        _generate(inputs, ledger, program, get_engines, expected, settings)
    return _publish(ledger, program.schema, expected, out, settings.max_bad_fraction)


# ---- generating -----------------------------------------------------------------------------------------------------


def _generate(
    inputs: Path,
    ledger: Ledger,
    program: Program,
    get_engines: Callable[[], Sequence[EngineHandle]],
    expected: pa.Array,
    settings: MapSettings,
) -> None:
    """Fills the ledger with every missing row.

    Rows that were in an engine when it died are suspects, and run one at a time from then on. When engines go on dying,
    and once a culprit is known, suspects go first and without company: the one that a death finds there is a culprit.
    """
    ids, deaths = frozenset(expected.to_pylist()), 0
    while True:
        crew = _Crew(get_engines(), settings.joining())  # idle: nothing is added to the ledger meanwhile
        missing = ids - ledger.ids()
        wanted = (missing & ledger.suspects if deaths > 1 or ledger.culprits else missing) or missing
        try:
            job = _feed(inputs, wanted, program, crew, ledger, settings)
            _run(job, crew, len(ids) - len(missing), len(ids), settings)
            if wanted == missing:
                return
        except RayError as error:
            dead = [first["name"] for first, now in crew.infos() if not now]
            if not dead and not isinstance(error, RayActorError):
                raise  # a bug in the program, or in Ray Data
            held = frozenset[str]().union(*map(ledger.held_by, dead))
            found = ledger.culprits | (held if wanted <= ledger.suspects else frozenset())
            deaths = 1 if found > ledger.culprits else deaths + 1  # those before were of a row that is found out now
            if deaths > RESTARTS or len(found) > max(RESTARTS, settings.max_bad_fraction * len(ids)):
                raise StageFailed(
                    f"engines died again and again, of {len(found)} rows for certain, the last with {len(held)} rows: "
                    f"{', '.join(dead) or 'what feeds them'}",
                    "read the engines' logs, then continue with the same command",
                ) from None
            ledger = replace(ledger, suspects=ledger.suspects | held, culprits=found)


class _Crew:
    """The engines of one attempt: those that are ready, and those that join while it runs.

    Attributes:
        ready: what each said of itself when it came.
        joining: the others, by what will be ready once they are.
    """

    def __init__(self, ready: Sequence[EngineHandle], joining: Sequence[EngineHandle]):
        asked = ray.get([e.info.remote() for e in ready], timeout=ANSWER_S)
        self.ready: dict[EngineHandle, Info] = dict(zip(ready, asked, strict=True))
        self.joining = {e.info.remote(): e for e in joining}

    def infos(self) -> list[tuple[Info, Info]]:
        """What each ready engine said of itself when it came, and says now: nothing where it does not answer.

        An engine that has become ready is among them; one that failed to start is left out, and the rest goes on.
        """
        for ref in [ref for ref in self.joining if ray.wait([ref], timeout=0)[0]]:
            engine = self.joining.pop(ref)
            try:
                self.ready[engine] = ray.get(ref)
            except RayActorError as e:
                log.warning("an engine did not start: %s", e)
        asked = [(first, e.info.remote()) for e, first in self.ready.items()]
        return [(first, _answer(ref)) for first, ref in asked]


def _answer(info: Any) -> Info:
    try:
        return ray.get(info, timeout=ANSWER_S)
    except (GetTimeoutError, RayActorError):
        return {}


class _Client:
    """Forwards blocks to the engine that has the fewest; holds nothing and computes nothing."""

    def __init__(self, ready: Sequence[EngineHandle], joining: Sequence[EngineHandle], program: Any, ledger: Ledger):
        self._program, self._ledger, self._joining = program, ledger, list(joining)
        self._blocks = dict.fromkeys(ready, 0)
        self._tasks: list[asyncio.Task[None]] = []

    async def __call__(self, block: pa.Table) -> pa.Table:
        while self._joining:
            self._tasks.append(asyncio.create_task(self._admit(self._joining.pop())))
        engine = min(self._blocks, key=lambda e: self._blocks[e])
        self._blocks[engine] += 1
        try:
            return pa.table({"rows": [await engine.record.remote(self._program, block, self._ledger)]})
        finally:
            self._blocks[engine] -= 1

    async def _admit(self, engine: EngineHandle) -> None:
        with contextlib.suppress(RayActorError):  # the driver says so (`_Crew.infos`)
            await engine.info.remote()
            self._blocks[engine] = 0


def _feed(
    inputs: Path, missing: frozenset[str], program: Program, crew: _Crew, ledger: Ledger, settings: MapSettings
) -> Callable[[], None]:
    """The Ray Data job that generates what is missing, ready to be started."""
    # Enough blocks in flight to fill every engine while the slowest rows of some blocks are awaited.
    slots = max(info["slots"] for info in crew.ready.values())
    in_flight = (-(-slots // settings.rows_per_block) + 1) * (len(crew.ready) + len(crew.joining))
    arguments = (list(crew.ready), list(crew.joining.values()), ray.put(program), ledger)
    wanted = ray.put(missing)

    def job() -> None:
        context = ray.data.DataContext.get_current().copy()
        context.execution_options.resource_limits = ExecutionResources(cpu=DATA_CPUS)
        context.execution_no_progress_timeout_s = -1  # it counts blocks, which may take long; _run watches tokens
        with ray.data.DataContext.current(context):
            rows = ray.data.read_parquet(str(inputs), partitioning=None)
            rows = rows.map_batches(partial(_among, wanted), batch_size=None, batch_format="pyarrow")
            done = rows.repartition(target_num_rows_per_block=settings.rows_per_block).map_batches(
                _Client,
                batch_size=None,
                batch_format="pyarrow",
                fn_constructor_args=arguments,
                compute=ray.data.ActorPoolStrategy(
                    size=1, max_tasks_in_flight_per_actor=in_flight, max_concurrent_calls_per_actor=in_flight
                ),
                num_cpus=0.1,
                max_restarts=0,
            )
            for _ in done.iter_batches(batch_size=None, batch_format="pyarrow"):
                pass

    return job


def _among(wanted: Any, block: pa.Table) -> pa.Table:
    """The rows of a block whose ids are in a set, given by reference lest every task carry it."""
    ids = ray.get(wanted, timeout=ANSWER_S)
    return block.filter(pa.array([i in ids for i in block["id"].to_pylist()]))


def _run(job: Callable[[], None], crew: _Crew, before: int, total: int, settings: MapSettings) -> None:
    """Runs a job to its end; shows its progress, and stops it when the engines stand still."""
    start = moved = time.monotonic()
    last: list[tuple[Info, Info]] = []
    with ThreadPoolExecutor(1, "ray-data") as thread, settings.progress() as show:
        future: Future[None] = thread.submit(job)
        try:
            while not wait([future], POLL_S).done:
                now, infos = time.monotonic(), crew.infos()
                moved = now if infos != last else moved
                last = infos
                rows, tokens = (sum(i[k] - first[k] for first, i in infos if i) for k in ("rows", "tokens"))
                show(min(total, before + rows), total, f"{tokens / (now - start):.0f} tokens/s" if tokens else "")
                if now - moved > settings.timeout_s:
                    names = ", ".join(first["name"] for first, info in infos if info.get("unfinished", 1))
                    raise StageFailed(
                        f"no progress for {settings.timeout_s:.0f} s; waiting for {names or 'Ray Data'}",
                        "read the engines' logs; where steps are that slow, raise cluster.step_timeout_s",
                    )
        finally:
            if not future.done():  # stuck, or interrupted: without engines the job ends at once
                for engine in [*crew.ready, *crew.joining.values()]:
                    ray.kill(engine)
        future.result()


# ---- publishing -----------------------------------------------------------------------------------------------------


def _publish(
    ledger: Ledger, schema: pa.Schema, expected: pa.Array, out: StageDir, max_bad_fraction: float
) -> dict[str, int]:
    """Sorts the durable rows into the stage's data and its quarantine; one part of them is in memory at a time.

    Args:
        ledger: where the rows are.
        schema: of the rows that are published.
        expected: the ids that went in, sorted.
        out: the stage's directory.
        max_bad_fraction: as in `MapSettings`.
    """
    out.data.mkdir(parents=True, exist_ok=True)
    for old in out.data.glob("part-*.parquet"):
        old.unlink()
    bad: list[Row] = []
    with TemporaryDirectory(dir=ledger.folder) as folder:
        parts = _split(ledger, schema.append(pa.field(BAD, pa.string())), expected, Path(folder))
        for number, part in enumerate(parts):
            table = _first_of_each(pa.ipc.open_stream(part).read_all()).sort_by("id")
            wanted = expected[number * PART_ROWS : (number + 1) * PART_ROWS]
            if not table["id"].combine_chunks().equals(wanted):
                raise StageFailed(
                    f"{len(wanted)} rows went in and {len(table)} came out, or others",
                    f"report this as a bug; to start the stage afresh remove {out.checkpoints}",
                )
            good = table.filter(table[BAD].is_null()).select(schema.names)
            pq.write_table(good, out.data / f"part-{number:05d}.parquet")
            bad += table.filter(table[BAD].is_valid()).select(["id", BAD]).rename_columns(["id", "reason"]).to_pylist()
    out.quarantine(bad, len(expected), max_bad_fraction)
    return {"rows_in": len(expected), "rows_out": len(expected) - len(bad), "quarantined": len(bad)}


def _first_of_each(table: pa.Table) -> pa.Table:
    """One row of each id. An engine whose driver was killed may end rows that the next driver has asked for again."""
    places = table.select(["id"]).append_column("place", pa.array(range(len(table))))
    return table.take(places.group_by("id").aggregate([("place", "min")])["place_min"])


def _split(ledger: Ledger, schema: pa.Schema, expected: pa.Array, folder: Path) -> list[Path]:
    """Deals the rows out to a file for each PART_ROWS of the expected ids, in the order of the ids."""
    firsts = expected[::PART_ROWS].to_pylist() or [""]
    parts = [folder / str(n) for n in range(len(firsts))]
    with ExitStack() as stack:
        writers = [stack.enter_context(pa.ipc.new_stream(part, schema)) for part in parts]
        for batch in ledger.finished():
            places = [max(0, bisect_right(firsts, i) - 1) for i in batch["id"].to_pylist()]
            for place in set(places):
                writers[place].write_batch(batch.filter(pa.array([p == place for p in places])))
    return parts
