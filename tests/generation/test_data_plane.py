import json
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cai_ray.artifacts import StageDir
from cai_ray.errors import DataError, StageFailed
from cai_ray.generation.ledger import Ledger
from tests.generation.conftest import MAX_LEN
from tests.generation.programs import OUT, TwoSteps, write_rows


def settings(seen=None, max_bad_fraction=0.5, rows_per_block=4):
    from cai_ray.generation.data_plane import MapSettings

    @contextmanager
    def show():
        yield lambda done, total, extra: seen.append((done, total)) if seen is not None else None

    return MapSettings(rows_per_block, max_bad_fraction, 120, show)


@pytest.fixture
def engines(pool, model):
    return lambda: pool.engines(model, dtype="float32", max_model_len=MAX_LEN)


def no_engines():
    raise AssertionError("finished rows need no engine")


def read(folder):
    return {r["id"]: r for f in sorted(folder.glob("*.parquet")) for r in pq.read_table(f).to_pylist()}


def durable(out):
    return {r["id"]: r for batch in Ledger(out.checkpoints).finished() for r in batch.to_pylist()}


def quarantine(out):
    return [json.loads(line) for line in out.quarantine_path.read_text().splitlines()]


def test_rows_come_out_once_sorted_and_bad_ones_apart(engines, tmp_path):
    from cai_ray.generation.data_plane import map_rows

    ids, out, seen = write_rows(tmp_path / "in", 30), StageDir(tmp_path / "stage"), []
    program = TwoSteps(bad=(3, 17))
    counts = map_rows(tmp_path / "in", program, engines, out, settings=settings(seen))
    assert counts == {"rows_in": 30, "rows_out": 28, "quarantined": 2}
    (part,) = out.data.glob("*")
    table = pq.read_table(part)
    good = sorted(set(ids) - {ids[3], ids[17]})
    assert (part.name, table.schema, table["id"].to_pylist()) == ("part-00000.parquet", OUT, good)
    assert all(len(r) == 12 for r in table["ids"].to_pylist())
    assert quarantine(out) == [{"id": i, "reason": "made bad on purpose"} for i in sorted((ids[3], ids[17]))]
    assert sum(batch.num_rows for batch in Ledger(out.checkpoints).finished()) == 30
    assert {total for _, total in seen} <= {30}

    # too many bad rows: the stage fails, what it did stays, and no engine starts for it again
    before = part.read_bytes()
    with pytest.raises(StageFailed, match=r"2 of 30 rows are bad, the limit is 5.0%; most often: 2 x made bad"):
        map_rows(tmp_path / "in", program, no_engines, out, settings=settings(max_bad_fraction=0.05))
    assert map_rows(tmp_path / "in", program, no_engines, out, settings=settings()) == counts
    assert part.read_bytes() == before


def test_a_bug_in_a_program_is_no_bad_row(engines, tmp_path):
    from cai_ray.generation.data_plane import map_rows

    write_rows(tmp_path / "in", 6)
    with pytest.raises(Exception, match="a bug"):
        map_rows(tmp_path / "in", TwoSteps(bug=(2,)), engines, StageDir(tmp_path / "stage"), settings=settings())
    assert not (tmp_path / "stage" / "data").exists()


def test_rows_with_one_id_are_refused(tmp_path):
    from cai_ray.generation.data_plane import map_rows

    write_rows(tmp_path / "in", 6)
    (tmp_path / "in" / "again.parquet").write_bytes((tmp_path / "in" / "part-00000.parquet").read_bytes())
    with pytest.raises(DataError, match="12 rows but 6 ids"):
        map_rows(tmp_path / "in", TwoSteps(), no_engines, StageDir(tmp_path / "stage"), settings=settings())


@pytest.mark.full
def test_a_row_that_kills_its_engine_is_found(engines, tmp_path):
    from cai_ray.generation.data_plane import map_rows

    ids, out, started = write_rows(tmp_path / "in", 24), StageDir(tmp_path / "stage"), []

    def fresh():
        started.extend(handles := engines())
        return handles

    # One block, so that all rows are with the engine when it dies: others that came later would cost a third.
    counts = map_rows(tmp_path / "in", TwoSteps(deadly=(9,)), fresh, out, settings=settings(rows_per_block=24))
    assert (counts["rows_out"], counts["quarantined"]) == (23, 1)
    assert quarantine(out) == [{"id": ids[9], "reason": "its engine died on it twice"}]
    assert len(set(started)) == 3  # two died of it
    assert set(read(out.data)) == set(ids) - {ids[9]}


@pytest.mark.full
def test_a_killed_driver_loses_and_repeats_nothing(pool, engines, tmp_path):
    import ray

    from cai_ray.generation.data_plane import map_rows

    (engine,) = engines()
    ids = write_rows(tmp_path / "in", 160)
    out = StageDir(tmp_path / "stage")
    name = ray.get(engine.info.remote())["name"]
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "tests.generation.driver", address, name, str(tmp_path)]
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log, cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 120
    while len(durable(out)) < 20:
        assert driver.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline, "the driver finished no rows in time"
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    time.sleep(2)  # Ray ends what belonged to the driver
    before = durable(out)
    assert 0 < len(before) < len(ids)

    map_rows(tmp_path / "in", TwoSteps(new=40), engines, out, settings=settings(max_bad_fraction=0.0))
    after = pq.read_table(out.data / "part-00000.parquet").to_pylist()
    assert Counter(r["id"] for r in after) == Counter(ids)
    again = {r["id"]: r for r in after}
    assert all(again[i]["text"] == r["text"] and again[i]["ids"] == r["ids"] for i, r in before.items())
    assert durable(out).items() >= before.items()


@pytest.mark.full
def test_an_engine_that_starts_later_joins(pool, engines, tmp_path, monkeypatch):
    from cai_ray.generation.data_plane import map_rows

    ids, out = write_rows(tmp_path / "in", 4000), StageDir(tmp_path / "stage")
    pool.release()
    monkeypatch.setattr(pool, "cluster", pool.cluster.model_copy(update={"max_engines": 2}))
    elastic = replace(settings(rows_per_block=50), joining=pool.joining)
    counts = map_rows(tmp_path / "in", TwoSteps(new=30), engines, out, settings=elastic)
    assert counts["rows_out"] == len(ids)
    held = [path.read_text().split() for path in out.checkpoints.glob("*.held")]
    assert len(held) == 2
    assert min(len(set(rows)) for rows in held) > 50  # both had work
    assert pool.joining() == []
