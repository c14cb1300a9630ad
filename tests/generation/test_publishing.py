"""Finished rows become sorted parts, however they lie."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cai_ray.artifacts import StageDir
from cai_ray.errors import StageFailed
from cai_ray.generation import data_plane
from cai_ray.generation.actor import BAD
from cai_ray.generation.data_plane import _publish
from cai_ray.generation.ledger import Ledger
from cai_ray.records import row_id, to_table

SCHEMA = pa.schema([("id", pa.string()), ("tags", pa.list_(pa.string()))])


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(data_plane, "PART_ROWS", 50)


def counts(rows_in, rows_out, quarantined):
    return {"rows_in": rows_in, "rows_out": rows_out, "quarantined": quarantined}


def ledger_of(root, rows, engines=3):
    """A ledger in which engines wrote rows, seven at a time."""
    ledger, schema = Ledger(root), SCHEMA.append(pa.field(BAD, pa.string()))
    for engine in range(engines):
        with pa.ipc.new_stream(str(ledger.folder / f"engine-{engine}.arrows"), schema) as stream:
            for first in range(7 * engine, len(rows), 7 * engines):
                stream.write_table(to_table(rows[first : first + 7], schema))
    return ledger


def test_parts_hold_fifty_ids_each_in_order_without_the_bad_ones(small_parts, tmp_path):
    rows = [
        {"id": row_id(n), "tags": [f"{n}"] if n % 2 else [], BAD: "odd" if n % 20 == 3 else None} for n in range(203)
    ]
    ids = sorted(r["id"] for r in rows)
    random.Random(0).shuffle(rows)
    ledger, out = ledger_of(tmp_path, rows), StageDir(tmp_path / "stage")
    out.data.mkdir(parents=True)
    (out.data / "part-00009.parquet").write_bytes(b"of an earlier call")
    assert _publish(ledger, SCHEMA, pa.array(ids), out, 0.05) == counts(203, 193, 10)

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
    left = {path.name for path in ledger.folder.iterdir()}
    assert left == {"stage", *(f"engine-{n}.arrows" for n in range(3))}  # what the sorting needed is gone


def test_of_a_row_that_two_engines_ended_one_is_kept(small_parts, tmp_path):
    ids = sorted(row_id(n) for n in range(60))
    rows = [{"id": i, "tags": ["first"]} for i in ids] + [{"id": i, "tags": ["second"]} for i in ids[40:]]
    out = StageDir(tmp_path / "stage")
    assert _publish(ledger_of(tmp_path, rows, 1), SCHEMA, pa.array(ids), out, 0.0) == counts(60, 60, 0)
    assert pq.read_table(out.data).to_pylist() == rows[:60]


@pytest.mark.parametrize("fault", ["missing", "strange"])
def test_a_row_that_is_not_there_or_unasked_stops_the_stage(fault, small_parts, tmp_path):
    ids = sorted(row_id(n) for n in range(60))
    rows = [{"id": i, "tags": []} for i in ids]
    rows = {"missing": rows[1:], "strange": [*rows[1:], {"id": "zzz", "tags": []}]}[fault]
    with pytest.raises(StageFailed, match="rows went in and"):
        _publish(ledger_of(tmp_path, rows), SCHEMA, pa.array(ids), StageDir(tmp_path / "stage"), 1.0)


def test_no_rows_are_one_empty_part(tmp_path):
    out = StageDir(tmp_path / "stage")
    assert _publish(Ledger(tmp_path), SCHEMA, pa.array([], pa.string()), out, 0.0) == counts(0, 0, 0)
    assert pq.read_table(out.data / "part-00000.parquet").schema == SCHEMA
