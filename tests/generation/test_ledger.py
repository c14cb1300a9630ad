"""What engines write stays, wherever a death cuts it short."""

import asyncio
import resource
from contextlib import contextmanager

import pyarrow as pa
import pytest

from cai_ray.generation.ledger import FLUSH_S, Ledger, RowLog

SCHEMA = pa.schema([("id", pa.string()), ("tags", pa.list_(pa.string())), ("bad_reason", pa.string())])


def rows(*numbers):
    return [{"id": f"{n:03d}", "tags": ["x"] * (n % 3), "bad_reason": "odd" if n % 2 else None} for n in numbers]


async def write(log, *numbers):
    for row in rows(*numbers):
        log.append(row)
    log.flush()


def finished(ledger):
    return [row for batch in ledger.finished() for row in batch.to_pylist()]


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path)


@contextmanager
def no_file_above(size):
    """The kernel's limit; a write beyond it fails like one to a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_row_is_durable_within_a_second_of_its_end_and_no_file_is_made_for_none(ledger):
    async def check():
        log = RowLog(ledger, "engine", SCHEMA)
        log.flush()
        assert finished(ledger) == list(ledger.folder.iterdir()) == []
        log.append(*rows(1))
        await asyncio.sleep(0.1)
        log.append(*rows(2))
        assert finished(ledger) == []
        await asyncio.sleep(FLUSH_S)
        assert finished(ledger) == rows(1, 2)

    asyncio.run(check())


def test_a_file_cut_at_any_byte_gives_its_whole_batches(ledger):
    log = RowLog(ledger, "engine", SCHEMA)
    (sizes, written) = [], [(1, 2, 3), (4,), (5, 6)]
    for numbers in written:
        asyncio.run(write(log, *numbers))
        sizes.append(next(ledger.folder.glob("*.arrows")).stat().st_size)
    (path,) = ledger.folder.glob("*.arrows")
    data = path.read_bytes()
    assert len(data) == sizes[-1]
    for end in range(len(data)):
        path.write_bytes(data[:end])
        whole = [n for size, numbers in zip(sizes, written, strict=True) if size <= end for n in numbers]
        assert finished(ledger) == rows(*whole)
        assert ledger.ids() == {f"{n:03d}" for n in whole}


def test_a_disk_that_takes_no_more_is_reported_and_loses_nothing(ledger):
    log = RowLog(ledger, "engine", SCHEMA)
    asyncio.run(write(log, 1, 2))
    (path,) = ledger.folder.glob("*.arrows")
    with no_file_above(path.stat().st_size + 100), pytest.raises(OSError, match="File too large"):
        asyncio.run(write(log, 3))
    assert finished(ledger) == rows(1, 2)
    asyncio.run(write(log, 4))
    assert sorted(finished(ledger), key=lambda r: r["id"]) == rows(1, 2, 3, 4)


def test_a_disk_that_fails_behind_the_scenes_is_reported_at_the_end_of_the_block(ledger):
    async def check():
        log = RowLog(ledger, "engine", SCHEMA)
        with no_file_above(10):
            log.append(*rows(1))
            await asyncio.sleep(FLUSH_S + 0.2)
            with pytest.raises(OSError, match="File too large"):
                log.flush()
        log.flush()
        assert finished(ledger) == rows(1)

    asyncio.run(check())


def test_what_an_engine_holds_is_what_began_and_did_not_end(ledger):
    with ledger.hold("a", "1"), ledger.hold("a", "2"):
        with ledger.hold("a", "3"):
            assert ledger.held_by("a") == {"1", "2", "3"}
        assert (ledger.held_by("a"), ledger.held_by("b")) == ({"1", "2"}, frozenset())
    assert ledger.held_by("a") == frozenset()
