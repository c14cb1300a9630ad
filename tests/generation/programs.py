"""Programs that the tests send to an engine, and rows for them."""

import os
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from cai_ray.errors import DataError
from cai_ray.generation.engine import Request
from cai_ray.records import derive_seed, row_id, to_table

ROWS = pa.schema([("id", pa.string()), ("n", pa.int64())])
OUT = pa.schema([("id", pa.string()), ("text", pa.string()), ("ids", pa.list_(pa.int64()))])


@dataclass(frozen=True)
class TwoSteps:
    """An answer and its continuation; some rows are bad, kill the engine, or hit a bug."""

    new: int = 6
    bad: tuple[int, ...] = ()
    deadly: tuple[int, ...] = ()
    bug: tuple[int, ...] = ()

    @property
    def schema(self):
        return OUT

    async def __call__(self, row, engine):
        if row["n"] in self.bad:
            raise DataError("made bad on purpose")
        if row["n"] in self.bug:
            raise KeyError("a bug")
        prompt, ids = engine.tokenizer.prompt([{"role": "user", "content": f"Say {row['n']}"}]), []
        for step in ("first", "second"):
            done = await engine.ask(Request(prompt + ids, self.new, 1.0, derive_seed(0, row["id"], step)))
            ids += done.ids
            if row["n"] in self.deadly:
                os._exit(1)
        return {"id": row["id"], "text": done.text, "ids": ids}


def write_rows(folder, count):
    """Rows 0 ... count - 1 in one file; returns the ids in that order."""
    folder.mkdir(parents=True)
    rows = [{"id": row_id(n), "n": n} for n in range(count)]
    pq.write_table(to_table(rows, ROWS), folder / "part-00000.parquet")
    return [r["id"] for r in rows]
