"""What the killed jobs do: two steps a row, with a trace of every beginning and a stamp that nothing can repeat."""

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from cai_ray.config import Cluster
from cai_ray.generation.data_plane import MapSettings
from cai_ray.generation.engine import Request
from cai_ray.records import derive_seed, row_id, to_table

ROWS = pa.schema([("id", pa.string()), ("n", pa.int64())])
OUT = pa.schema([("id", pa.string()), ("text", pa.string()), ("stamp", pa.string())])
CLUSTER = Cluster(device="cpu", engines=2, kv_cache_gib=0.25, max_num_seqs=8, start_timeout_s=240, step_timeout_s=120)
MAX_LEN = 256
PER_BLOCK = 4
# Each engine has slots for two blocks and one block waiting.
IN_FLIGHT = CLUSTER.engines * (CLUSTER.max_num_seqs // PER_BLOCK + 1)


@dataclass(frozen=True)
class Chain:
    """An answer and its continuation. Rows of `deadly` numbers kill their engine."""

    trace: Path  # a line for every row that begins or ends: id, word, time
    new: int = 30
    deadly: tuple[int, ...] = ()

    @property
    def schema(self):
        return OUT

    async def __call__(self, row, engine):
        self._note(row, "begins")
        if row["n"] in self.deadly:
            os.abort()  # what a crash in native code looks like
        prompt, ids = engine.tokenizer.prompt([{"role": "user", "content": f"Say {row['n']}"}]), []
        for step in ("first", "second"):
            done = await engine.ask(Request(prompt + ids, self.new, 1.0, derive_seed(0, row["id"], step)))
            ids += done.ids
        self._note(row, "ends")
        return {"id": row["id"], "text": done.text, "stamp": uuid4().hex}

    def _note(self, row, word):
        with self.trace.open("a") as trace:
            print(row["id"], word, time.time(), file=trace)


def write_rows(folder, count):
    """Rows 0 ... count - 1, a file each hundred; returns the ids in that order."""
    folder.mkdir(parents=True)
    rows = [{"id": row_id(n), "n": n} for n in range(count)]
    for first in range(0, count, 100):
        pq.write_table(to_table(rows[first : first + 100], ROWS), folder / f"part-{first:05d}.parquet")
    return [r["id"] for r in rows]


@contextmanager
def silent():
    yield lambda done, total, extra: None


def settings(max_bad_fraction=0.0):
    return MapSettings(PER_BLOCK, max_bad_fraction, 120, silent)
