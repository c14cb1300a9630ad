"""What engines write down while they work: which rows they hold, and every row that they have finished.

Each engine appends to files of its own and nothing is ever written twice, so no death can harm what is there; a row is
durable at most FLUSH_S after its end. Ray Data's own checkpoints would make whole blocks durable, after a write task
that waits for its turn among all others, and read one file a block to resume.
"""

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa

from cai_ray.records import Row, to_table

FLUSH_S = 1.0


@dataclass(frozen=True)
class Ledger:
    """The folder of an unfinished stage's notes, and what they tell of rows that kill their engine.

    Attributes:
        folder: shared by all engines. `*.arrows` are the finished rows, one or more streams of each engine; `*.held`,
            one of each engine, has an id when a row begins, and again when it ends.
        suspects: ids that were in an engine when it died; each engine runs one of them at a time.
        culprits: suspects that were there again, without company; they are bad rows.
    """

    folder: Path
    suspects: frozenset[str] = field(default_factory=frozenset)
    culprits: frozenset[str] = field(default_factory=frozenset)

    @contextlib.contextmanager
    def hold(self, engine: str, row: str) -> Iterator[None]:
        """Notes that an engine holds a row."""
        with (self.folder / f"{engine}.held").open("a") as notes:
            print(row, file=notes, flush=True)
            try:
                yield
            finally:
                print(row, file=notes)

    def held_by(self, engine: str) -> frozenset[str]:
        """Ids of the rows that an engine had begun and not ended."""
        path = self.folder / f"{engine}.held"
        notes = path.read_text("utf-8").split() if path.is_file() else []
        return frozenset(row for row, times in Counter(notes).items() if times % 2)

    def finished(self) -> Iterator[pa.RecordBatch]:
        """All durable rows, in batches; one that a death cut short is left out."""
        for path in sorted(self.folder.glob("*.arrows")):
            if path.stat().st_size:  # an empty file cannot be mapped
                with pa.memory_map(str(path)) as file:
                    yield from _whole_batches(file)

    def ids(self) -> set[str]:
        """Of all durable rows; only these bytes of the files are read."""
        return {row for batch in self.finished() for row in batch["id"].to_pylist()}


def _whole_batches(file: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    try:
        yield from pa.ipc.open_stream(file)
    except (pa.ArrowInvalid, OSError) as e:
        if getattr(e, "errno", None):  # the disk's, not Arrow's for fewer bytes than a batch announces
            raise


class RowLog:
    """An engine's finished rows on their way to disk.

    Args:
        ledger: where they go.
        engine: name of the engine.
        schema: of the rows.
    """

    def __init__(self, ledger: Ledger, engine: str, schema: pa.Schema):
        self.ledger, self.engine, self.schema = ledger, engine, schema
        self._waiting: list[Row] = []
        self._timer: asyncio.TimerHandle | None = None
        self._file: Any = None  # pyarrow.OSFile
        self._stream: Any = None  # pyarrow.RecordBatchStreamWriter into it

    def append(self, row: Row) -> None:
        """Takes a row, which will be durable within FLUSH_S; call it in an event loop."""
        self._waiting.append(row)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self._tick)

    def flush(self) -> None:
        """Makes all rows durable; raises OSError when the disk takes no more, and keeps them."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._waiting:
            return
        try:
            if self._stream is None:
                self._file = pa.OSFile(str(self.ledger.folder / f"{self.engine}-{uuid4().hex[:8]}.arrows"), "wb")
                self._stream = pa.ipc.new_stream(self._file, self.schema)
            self._stream.write_table(to_table(self._waiting, self.schema))
            os.fsync(self._file.fileno())  # on NFS also what makes it visible to other nodes
        except OSError:
            self._stream = None  # this file may end within a batch: what follows goes to another one
            raise
        self._waiting = []

    def _tick(self) -> None:
        self._timer = None
        with contextlib.suppress(OSError):  # the end of the block tries again, and says so
            self.flush()
