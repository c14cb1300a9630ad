"""Whether the data plane keeps up with many engines and stays small: timed stand-ins in the engines' place.

    python -m tests.bench.scale [--rows 200000] [--actors 32]

`map_rows` sends Prompt rows through engines that sleep instead of sampling and give Revision rows of the usual size.
The driver, a process of its own, is killed when half of the rows are durable; a second one makes the same call and
finishes. Measured: the driver's memory (resident set, every half second), the share of the engines' slots that hold a
row from the first block to the kill, and to the end, and the seconds from the second call to its first block.

A row's simulated time decides how many blocks a second the machine must move: actors * slots / row seconds / rows per
block. Keep that below what its cores can do (about 15 on two), or this measures the machine. The last line is one JSON
object.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from cai_ray.generation.ledger import RowLog
from cai_ray.records import PROMPT, REVISION, Row, row_id, to_table

MIB = 2**20
NAMESPACE = "scale"
CHUNK = 10_000


class StandIn:
    """What `map_rows` sees of an engine actor; a block takes the time of its rows and computes nothing."""

    def __init__(self, name: str, slots: int, block_rows: int, row_s: float):
        self.name, self.slots, self.row_s = name, slots, row_s
        self.lanes = asyncio.Semaphore(slots // block_rows)
        self.random = random.Random(name)
        self.tasks: set[Any] = set()
        self.log: RowLog | None = None
        self.reset()

    def reset(self) -> None:
        """Forgets what was counted."""
        self.rows = self.held = 0
        self.first = self.changed = self.slot_s = 0.0

    def _write(self, rows: list[Row], ledger: Any) -> None:
        if self.log is None or self.log.ledger.folder != ledger.folder:
            self.log = RowLog(ledger, self.name, REVISION.append(pa.field("bad_reason", pa.string())))
        for row in rows:
            self.log.append(row)
        self.log.flush()

    def _hold(self, rows: int) -> None:
        now = time.time()
        self.slot_s += self.held * (now - self.changed) if self.changed else 0.0
        self.held, self.changed = self.held + rows, now

    async def record(self, program: Any, table: pa.Table, ledger: Any) -> int:
        """Gives a block's rows to the ledger, after their time."""
        task = asyncio.current_task()
        self.tasks.add(task)
        try:
            async with self.lanes:
                self.first = self.first or time.time()
                self._hold(table.num_rows)
                try:
                    await asyncio.sleep(self.row_s * self.random.uniform(0.8, 1.2))
                finally:
                    self._hold(-table.num_rows)
            self.rows += table.num_rows
            self._write(program.answer(table), ledger)
            return table.num_rows
        finally:
            self.tasks.discard(task)

    async def abort(self) -> None:
        """Drops every block, as an engine does before the next job."""
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.reset()

    async def info(self) -> dict[str, Any]:
        """What feeder and driver ask; and, for this benchmark, how long slots held rows."""
        self._hold(0)
        who = {"name": self.name, "slots": self.slots, "slot_s": self.slot_s, "first": self.first, "now": self.changed}
        return {**who, "rows": self.rows, "tokens": self.rows * 1000, "unfinished": self.held}


@dataclass(frozen=True)
class Answer:
    """Revision rows of two rounds, about 2.5 kB each."""

    schema: pa.Schema = REVISION

    def answer(self, table: pa.Table) -> list[Row]:
        """A block's rows."""
        return [self._row(row) for row in table.to_pylist()]

    def _row(self, row: Row) -> Row:
        text = f"{row['id']} " * 30
        rounds = [{"principle_id": "p", "critique": text, "revision": text} for _ in range(2)]
        return {**row, "initial_response": text, "rounds": rounds, "seed": 0, "flags": []}


# ---- the driver -----------------------------------------------------------------------------------------------------


@contextmanager
def silent() -> Any:
    yield lambda done, total, extra: None


def drive(root: Path, address: str, names: list[str], block_rows: int) -> None:
    """The call that is measured; it prints when it begins and when it has ended."""
    import ray

    from cai_ray.artifacts import StageDir
    from cai_ray.generation.data_plane import MapSettings, map_rows

    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")

    def engines() -> list[Any]:
        handles = [ray.get_actor(name) for name in names]
        ray.get([h.abort.remote() for h in handles])
        return handles

    engines()
    print(json.dumps({"call": time.time()}), flush=True)
    settings = MapSettings(block_rows, 0.0, 600, silent)
    counts = map_rows(root / "in", Answer(), engines, StageDir(root / "revise"), settings=settings)
    print(json.dumps({"end": time.time(), **counts}), flush=True)


class Driver:
    """A driver's process and its memory over time."""

    def __init__(self, root: Path, address: str, names: list[str], block_rows: int):
        command = [sys.executable, "-m", "tests.bench.scale", "--drive", str(root), address, str(block_rows), *names]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        assert self.process.stdout is not None
        self.out = self.process.stdout
        self.call = self.said()["call"]
        self.rss: list[tuple[float, float]] = []  # seconds since the call, MiB

    def said(self) -> dict[str, Any]:
        """The next thing that the driver prints; Ray prints warnings between."""
        return json.loads(next(line for line in self.out if line.startswith("{")))

    def sample(self) -> bool:
        """Notes the memory; False once the process has ended."""
        try:
            size = psutil.Process(self.process.pid).memory_info().rss / MIB
        except psutil.NoSuchProcess:
            return False
        self.rss.append((time.time() - self.call, size))
        time.sleep(0.5)
        return self.process.poll() is None


def slope(samples: list[tuple[float, float]]) -> float:
    """MiB a minute by least squares."""
    n = len(samples)
    mean_t, mean_m = sum(t for t, _ in samples) / n, sum(m for _, m in samples) / n
    return 60 * sum((t - mean_t) * (m - mean_m) for t, m in samples) / sum((t - mean_t) ** 2 for t, _ in samples)


# ---- the measurement ------------------------------------------------------------------------------------------------


def write_prompts(folder: Path, count: int) -> None:
    """One file of prompts, as the stage before `revise` leaves it."""
    folder.mkdir(parents=True)
    ids = sorted(row_id(n) for n in range(count))
    rest = {"kind": "harmful", "source": "made", "split": "train"}
    with pq.ParquetWriter(folder / "part-00000.parquet", PROMPT) as writer:
        for first in range(0, count, CHUNK):
            rows = [
                {"id": i, "messages": [{"role": "user", "content": f"Prompt {i} " * 5}], **rest}
                for i in ids[first : first + CHUNK]
            ]
            writer.write_table(to_table(rows, PROMPT))


def pool_stats(engines: list[Any]) -> dict[str, float]:
    """Of all stand-ins: when the first block began, now, and how long slots held rows."""
    import ray

    each = ray.get([e.info.remote() for e in engines])
    begun = [s["first"] for s in each if s["first"]]
    total = {k: sum(s[k] for s in each) for k in ("rows", "slot_s")}
    return {"first": min(begun, default=0.0), "now": time.time(), **total}


def busy(before: dict[str, float], after: dict[str, float], slots: int) -> float:
    """Share of the slots that held a row between two looks."""
    return (after["slot_s"] - before["slot_s"]) / (slots * (after["now"] - before["now"]))


def watch(driver: Driver, engines: list[Any], slots: int, until_rows: int | None) -> dict[str, Any]:
    """Follows a driver until so many rows are done, and kills it, or to its end."""
    looks: list[dict[str, float]] = []
    while driver.sample():
        if len(driver.rss) % 10 == 0:
            looks.append(pool_stats(engines))
            if until_rows and looks[-1]["rows"] >= until_rows:
                driver.process.send_signal(signal.SIGKILL)
    code = driver.process.wait()
    assert code == (-signal.SIGKILL if until_rows else 0), f"the driver ended with {code}"
    looks = [look for look in looks if look["first"]]
    first = {"slot_s": 0.0, "now": looks[0]["first"]}
    last = next(look for look in looks if look["rows"] == looks[-1]["rows"])  # the end of the work
    grown = [s for s in driver.rss if s[0] > looks[0]["first"] - driver.call + 30 and s[0] < last["now"] - driver.call]
    return {
        "rows": int(looks[-1]["rows"]),
        "generate_s": round(last["now"] - first["now"], 1),
        "first_block_s": round(first["now"] - driver.call, 1),
        "pool_busy": round(busy(first, last, slots), 4),
        "driver_max_mib": round(max(m for _, m in driver.rss)),
        "driver_mib_per_minute": round(slope(grown), 3) if len(grown) > 20 else None,
        "driver_mib": [round(m) for _, m in driver.rss[:: max(1, len(driver.rss) // 20)]],
    }


def measure(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Both halves of the run."""
    import ray

    for key in ("RAY_prestart_worker_first_driver", "RAY_enable_worker_prestart", "RAY_worker_niceness"):
        os.environ.setdefault(key, "0")
    os.environ.setdefault("RAY_usage_stats_enabled", "0")
    write_prompts(root / "in", args.rows)
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, namespace=NAMESPACE)
    names = [f"engine-{n:02d}" for n in range(args.actors)]
    settings = (args.slots, args.block_rows, args.row_s)
    many = ray.remote(StandIn).options
    engines = [many(name=n, num_cpus=0, max_concurrency=1000).remote(n, *settings) for n in names]
    ray.get([e.info.remote() for e in engines])
    print(f"{args.actors} stand-ins are ready", file=sys.stderr, flush=True)
    address, slots = ray.get_runtime_context().gcs_address, args.actors * args.slots
    first = watch(Driver(root, address, names, args.block_rows), engines, slots, args.rows // 2)
    print(json.dumps(first), file=sys.stderr, flush=True)
    time.sleep(2)
    driver = Driver(root, address, names, args.block_rows)
    second = watch(driver, engines, slots, None)
    end = driver.said()
    ray.shutdown()
    ids = pq.read_table(root / "revise" / "data", columns=["id"])["id"]
    spans = first["generate_s"], second["generate_s"]
    return {
        "rows": args.rows,
        "rows_out": end["rows_out"],
        "every_id_once": ids.to_pylist() == sorted(row_id(n) for n in range(args.rows)),
        "driver_max_mib": max(first["driver_max_mib"], second["driver_max_mib"]),
        "driver_mib_per_minute": [first["driver_mib_per_minute"], second["driver_mib_per_minute"]],
        "pool_busy": round((first["pool_busy"] * spans[0] + second["pool_busy"] * spans[1]) / sum(spans), 4),
        "resume_starts_s": second["first_block_s"],
        "publish_s": round(end["end"] - driver.call - second["first_block_s"] - second["generate_s"], 1),
        "blocks_per_s": round(args.actors * args.slots / args.row_s / args.block_rows, 2),
        "settings": {k: v for k, v in vars(args).items() if k != "drive"},
        "halves": [first, second],
    }


def main() -> None:
    """Reads the arguments and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--actors", type=int, default=32)
    parser.add_argument("--slots", type=int, default=128, help="rows that an engine holds at once")
    parser.add_argument("--block-rows", type=int, default=32)
    parser.add_argument("--row-s", type=float, default=12.0, help="simulated seconds of a row")
    parser.add_argument("--drive", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive:
        root, address, block_rows, *names = args.drive
        drive(Path(root), address, names, int(block_rows))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(args, Path(folder))))


if __name__ == "__main__":
    main()
