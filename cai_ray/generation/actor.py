"""The Ray actor that holds an engine: many callers, one continuous batch.

vLLM belongs to one thread; callers wait in the actor's event loop. A conversation of several steps is a *program* that
runs here: a row that finishes a step asks its next at once, so steps of different rows share the batch and no row waits
for another.
"""

import asyncio
import contextlib
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from cai_ray.artifacts import print_to
from cai_ray.errors import CaiError, DataError
from cai_ray.generation.engine import AnyRequest, Engine, Result, ScoreRequest
from cai_ray.generation.ledger import Ledger, RowLog
from cai_ray.models.tokenization import Tokenizer
from cai_ray.records import Row, to_table

BAD = "bad_reason"  # column beside a program's own: why the row is bad, null where it is good


class Program(Protocol):
    """What the engine does with one row; picklable."""

    @property
    def schema(self) -> pa.Schema:
        """Schema of the rows that come out."""
        ...

    async def __call__(self, row: Row, engine: "EngineActor") -> Row:
        """The row that comes out; a CaiError makes it a bad row and stops no other."""
        ...


class EngineActor:
    """An engine behind an event loop; `pool.EnginePool` makes it a Ray actor.

    Args:
        name: how log and ledger call it.
        log_file: takes all that this process and vLLM's own processes print.
        model_folder: what `Engine` loads.
        options: further arguments of `Engine`.
    """

    def __init__(self, name: str, log_file: Path, model_folder: Path, options: dict[str, Any]):
        print_to(log_file)
        self.name = name
        self._thread = ThreadPoolExecutor(1, "engine")  # OpenMP and CUDA remember the thread that made the engine
        self._engine: Engine = self._thread.submit(lambda: Engine(model_folder, **options)).result()
        self._inbox: deque[tuple[str, Any]] = deque()  # (id, request), or (id, None) to abort
        self._futures: dict[str, asyncio.Future[Result]] = {}
        self._numbers, self._rows = count(), 0
        self._driver: asyncio.Task[None] | None = None
        self._calls = set[asyncio.Future[Any]]()  # what the engine's thread does, and what waits for it
        self._running: set[asyncio.Task[Any]] = set()
        self._alone, self._wake = asyncio.Lock(), asyncio.Event()
        self._log: RowLog | None = None

    # ---- requests -------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the model that is loaded."""
        return self._engine.tokenizer

    async def prompt_logprobs(self, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> list[list[float]]:
        """Untempered log-probabilities of `ids[i][starts[i]:]`, nats. Slow: it bypasses the prefix cache."""
        return await asyncio.gather(*(self.ask(ScoreRequest(i, s)) for i, s in zip(ids, starts, strict=True)))

    async def ask(self, request: AnyRequest) -> Result:
        """The result of one request; raises DataError when it does not fit the engine."""
        if self._driver is None:
            self._driver = asyncio.create_task(self._drive())
            self._driver.add_done_callback(_die)
        key = str(next(self._numbers))
        future = self._futures[key] = asyncio.get_running_loop().create_future()
        self._inbox.append((key, request))
        self._wake.set()
        try:
            return await future
        except asyncio.CancelledError:
            self._futures.pop(key, None)
            self._inbox.append((key, None))
            self._wake.set()
            raise

    async def _drive(self) -> None:
        """Steps the engine while there is work and hands each result to its caller."""
        while True:
            self._wake.clear()
            for key, result in await self._call(self._advance):
                if (future := self._futures.pop(key, None)) and not future.done():
                    answer = future.set_exception if isinstance(result, CaiError) else future.set_result
                    answer(result)
            if not self._futures:
                await self._wake.wait()

    def _advance(self) -> list[tuple[str, Any]]:
        """Steps until a request ends, or something else is asked; waking the event loop at each takes time."""
        results: list[tuple[str, Any]] = []
        while self._inbox:
            key, request = self._inbox.popleft()
            try:
                self._engine.abort(key) if request is None else self._engine.add(key, request)
            except CaiError as e:
                results.append((key, e))
        while self._engine.busy and not (results or self._inbox or len(self._calls) > 1):
            results = self._engine.step()
        return results

    async def _call(self, function: Any, *args: Any) -> Any:
        self._calls.add(call := asyncio.get_running_loop().run_in_executor(self._thread, function, *args))
        call.add_done_callback(self._calls.discard)
        return await call

    # ---- programs -------------------------------------------------------------------------------------------------

    async def run(self, program: Program, table: pa.Table, piece: tuple[int, int | None] = (0, None)) -> pa.Table:
        """Runs a program on a piece of a table (first row and how many), all at once, in the one continuous batch.

        Returns:
            A table of `program.schema` and the column `bad_reason`, rows in order. A bad row has its id and the reason.

        Raises:
            Exception: what a program raised that is no CaiError: a bug, not a bad row.
        """
        rows = await self._rows_of(table.slice(*piece), partial(self._row, program))
        return to_table(rows, _with_reason(program))

    async def record(self, program: Program, table: pa.Table, ledger: Ledger) -> int:
        """`run`, with its rows written to a ledger; returns how many there are, once all of them are durable."""
        if self._log is None or self._log.ledger.folder != ledger.folder:
            self._log = RowLog(ledger, self.name, _with_reason(program))
        try:
            return len(await self._rows_of(table, partial(self._recorded, program, ledger, self._log)))
        finally:
            self._log.flush()

    async def _rows_of(self, table: pa.Table, work: Callable[[pa.Table], Coroutine[Any, Any, Row]]) -> list[Row]:
        tasks: list[asyncio.Task[Row]] = []
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(work(table.slice(i, 1))) for i in range(table.num_rows)]
                self._running.update(tasks)
        except BaseExceptionGroup as e:
            raise e.exceptions[0] from None
        finally:
            self._running.difference_update(tasks)
        return [task.result() for task in tasks]  # a row that was cancelled is not done: it raises

    async def _row(self, program: Program, table: pa.Table) -> Row:
        try:
            return await program(_readable(table), self)
        except CaiError as e:
            return {"id": table["id"][0].as_py(), BAD: e.message}

    async def _recorded(self, program: Program, ledger: Ledger, log: RowLog, table: pa.Table) -> Row:
        row_id: str = table["id"][0].as_py()
        if row_id in ledger.culprits:
            out: Row = {"id": row_id, BAD: "its engine died on it twice"}
        else:
            async with self._alone if row_id in ledger.suspects else contextlib.nullcontext():
                with ledger.hold(self.name, row_id):
                    out = await self._row(program, table)
        log.append(out)
        self._rows += 1
        return out

    async def abort(self) -> None:
        """Ends every program that runs here; their callers see it cancelled."""
        for task in list(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        while self._inbox:  # until the engine has dropped their requests
            await asyncio.sleep(0.01)

    # ---- weights and bookkeeping ----------------------------------------------------------------------------------

    async def call(self, method: str, *args: Any) -> tuple[Any, Any]:
        """A method of this actor, or one of the `Engine` (`load_checkpoint`, `sleep`) between two of its steps.

        Returns:
            (a table that it returned, {"span": when it ran, two times in seconds since the epoch}), or (None, anything
            else): who calls may pass the table on without seeing it.
        """
        begun, own = time.time(), getattr(self, method, None)
        found = await (own(*args) if own else self._call(getattr(self._engine, method), *args))
        return (found, {"span": (begun, time.time())}) if isinstance(found, pa.Table) else (None, found)

    async def info(self) -> dict[str, Any]:
        """Who this is, what weights it holds, and what it has done since the start.

        `slots` are the sequences that it takes at once, `steps` the engine's, `rows` and `tokens` those that are
        finished, `unfinished` the requests that are not.
        """
        e = self._engine
        who = {"name": self.name, "pid": os.getpid(), "node": os.uname().nodename, "slots": e.max_num_seqs}
        weights = {"version": e.version, "holds": e.holds, "loaded": e.loaded, "updating": e.updating}
        done = {"steps": e.steps, "tokens": e.tokens_out, "rows": self._rows, "unfinished": len(self._futures)}
        return {**who, **weights, **done}


def _with_reason(program: Program) -> pa.Schema:
    return program.schema.append(pa.field(BAD, pa.string()))


def _readable(table: pa.Table) -> Row:
    """The one row of a table; Arrow takes bytes for text unchecked."""
    try:
        return table.to_pylist()[0]
    except UnicodeDecodeError:
        raise DataError("the row holds text that is not UTF-8") from None


def _die(driver: "asyncio.Task[None]") -> None:
    """An engine that raised is broken. The process ends, so that every caller sees the same: a dead actor."""
    if not driver.cancelled():
        traceback.print_exception(driver.exception())
        sys.stderr.flush()
        os._exit(1)
