"""Durable blocks become sorted parts, however the blocks lie."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cai_ray.artifacts import StageDir
from cai_ray.errors import StageFailed
from cai_ray.generation import data_plane
from cai_ray.generation.actor import BAD
from cai_ray.generation.data_plane import RowCounts, _publish, _Work
from cai_ray.records import row_id, to_table

SCHEMA = pa.schema([("id", pa.string()), ("tags", pa.list_(pa.string()))])


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(data_plane, "PART_ROWS", 50)


def blocks(root, rows):
    work = _Work(root / "in", root / "rows", root / "ids", root / "journal")
    work.rows.mkdir(parents=True)
    for first in range(0, len(rows), 7):
        table = to_table(rows[first : first + 7], SCHEMA.append(pa.field(BAD, pa.string())))
        pq.write_table(table, work.rows / f"{first:03d}.parquet")
    return work


def test_parts_hold_fifty_ids_each_in_order_without_the_bad_ones(small_parts, tmp_path):
    rows = [
        {"id": row_id(n), "tags": [f"{n}"] if n % 2 else [], BAD: "odd" if n % 20 == 3 else None} for n in range(203)
    ]
    ids = sorted(r["id"] for r in rows)
    random.Random(0).shuffle(rows)
    work, out = blocks(tmp_path, rows), StageDir(tmp_path / "stage")
    (out.data / "part-00009.parquet").write_bytes(b"of an earlier call")
    assert _publish(work, SCHEMA, pa.array(ids), out, 0.05) == RowCounts(203, 193, 10)

    bad = {r["id"] for r in rows if r[BAD]}
    parts = sorted(out.data.iterdir())
    assert [p.name for p in parts] == [f"part-0000{n}.parquet" for n in range(5)]
    for n, part in enumerate(parts):
        table = pq.read_table(part)
        assert table.schema == SCHEMA
        assert table["id"].to_pylist() == [i for i in ids[50 * n : 50 * n + 50] if i not in bad]
    tags = {r["id"]: r["tags"] for r in rows}
    assert all(r["tags"] == tags[r["id"]] for r in pq.read_table(out.data).to_pylist())
    lines = [json.loads(line) for line in out.quarantine_path.read_text().splitlines()]
    assert lines == [{"id": i, "reason": "odd"} for i in sorted(bad)]
    assert not list(out.checkpoints.iterdir())  # what the sorting needed is gone


@pytest.mark.parametrize("fault", ["twice", "missing", "strange"])
def test_a_row_that_is_there_twice_or_not_or_unasked_stops_the_stage(fault, small_parts, tmp_path):
    ids = sorted(row_id(n) for n in range(60))
    rows = [{"id": i, "tags": []} for i in ids]
    rows = {"twice": [*rows, rows[3]], "missing": rows[1:], "strange": [*rows[1:], {"id": "zzz", "tags": []}]}[fault]
    with pytest.raises(StageFailed, match="rows went in and"):
        _publish(blocks(tmp_path, rows), SCHEMA, pa.array(ids), StageDir(tmp_path / "stage"), 1.0)


def test_no_rows_are_one_empty_part(tmp_path):
    work, out = _Work(*(tmp_path / n for n in "abcd")), StageDir(tmp_path / "stage")
    assert _publish(work, SCHEMA, pa.array([], pa.string()), out, 0.0) == RowCounts(0, 0, 0)
    assert pq.read_table(out.data / "part-00000.parquet").schema == SCHEMA
