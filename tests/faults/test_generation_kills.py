"""SIGKILL at random moments; then the same call: every row once, finished rows untouched, little done twice."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from cai_ray.artifacts import StageDir
from cai_ray.generation.ledger import FLUSH_S, Ledger
from tests.faults.chain import IN_FLIGHT, PER_BLOCK, Chain, settings, write_rows

ROWS = 120
SLACK_S = 1.0  # of an event loop on a busy machine, beyond the ledger's own second
VICTIMS = ("engine", "worker", "driver")
TODAY = int(os.environ.get("CAI_RAY_KILL_SEED") or date.today().toordinal())  # other moments every day
# Ray's own helpers, whose death is another test than ours, and workers that do nothing.
SPARED = ("StandIn", "EngineActor", "IDLE", "DashboardAgent", "RuntimeEnvAgent", "_", "ActorLocationTracker")


class Job:
    """A job of 120 rows, its directory, and what is found there."""

    def __init__(self, root):
        self.root, self.out, self.trace = root, StageDir(root / "stage"), root / "trace"
        self.ids = write_rows(root / "in", ROWS)
        self.trace.touch()

    def map(self, engines):
        from cai_ray.generation.data_plane import map_rows

        return map_rows(self.root / "in", Chain(self.trace), engines, self.out, settings=settings())

    def noted(self, word, since=0.0, until=float("inf")):
        """Ids of the rows that began or ended in a span of time."""
        notes = [line.split() for line in self.trace.read_text().splitlines()]
        return [i for i, what, when in notes if what == word and since <= float(when) < until]

    @property
    def ledger(self):
        return Ledger(self.out.checkpoints)

    def durable(self):
        """The finished rows by their ids."""
        return {row["id"]: row for batch in self.ledger.finished() for row in batch.to_pylist()}


def ray_workers():
    """Processes of this cluster that move rows: Ray Data's tasks and actors, whatever they are called."""
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline()).strip()
        except psutil.NoSuchProcess:
            continue
        name = title.removeprefix("ray::")
        if title != name and not name.startswith(SPARED):
            yield process.pid, name


class Killer(threading.Thread):
    """Kills one process when so many more rows have begun, and notes what was durable then."""

    def __init__(self, job, victim, moment, pids):
        super().__init__(daemon=True)
        self.job, self.pids, self.random, self.at = job, pids, moment, 0.0
        self.before = {p for p in pids() if victim == "worker"}  # of an earlier job, not gone yet
        self.since, self.base = time.time(), len(job.noted("begins"))
        self.rows = moment.randrange(max(1, (ROWS - len(job.durable())) * 9 // 10))
        self.delay = moment.uniform(0, 0.3)
        self.story = f"{victim} to die after {self.rows} rows and {self.delay:.2f} s"

    def run(self):
        while len(self.job.noted("begins")) < self.base + self.rows:
            time.sleep(0.005)
        time.sleep(self.delay)
        while not (candidates := sorted({*self.pids()} - self.before)):
            time.sleep(0.01)
        pid, name = self.random.choice(candidates)
        self.at = time.time()
        os.kill(pid, signal.SIGKILL)
        self.files = {f: f.read_bytes() for f in self.job.ledger.folder.glob("*.arrows")}
        self.kept = self.job.durable()
        self.story += f"; {name} died, {len(self.kept)} rows were durable"

    def check(self):
        """After the job's end: what was durable stayed, and no more than what was under way was done again."""
        assert all(f.read_bytes().startswith(data) for f, data in self.files.items()), self.story
        again = set(self.job.noted("begins", since=self.at))
        assert not again & self.kept.keys(), self.story
        lost = again & set(self.job.noted("begins", self.since, self.at))
        assert not lost & set(self.job.noted("ends", self.since, self.at - FLUSH_S - SLACK_S)), self.story
        assert len(lost) <= IN_FLIGHT * PER_BLOCK, self.story
        print(f"{self.story}, {len(lost)} were done again")


def start_driver(root, infos):
    import ray

    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "tests.faults.driver", address, str(root), *(i["name"] for i in infos)]
    with (root / "log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=Path(__file__).parents[2])


def check_kills(victim, seed, engines, root, times=1):
    import ray

    job, moment, kills = Job(root), random.Random(f"{victim} {seed}"), []
    for _ in range(times):
        infos = ray.get([e.info.remote() for e in engines()])
        if victim == "driver":
            driver = start_driver(root, infos)
            pids = lambda: [(driver.pid, "driver")]  # noqa: B023, E731  it is waited for in this round
        else:
            pids = ray_workers if victim == "worker" else lambda: [(i["pid"], i["name"]) for i in infos]  # noqa: B023
        kills.append(Killer(job, victim, moment, pids))
        kills[-1].start()
        if victim == "driver":
            assert driver.wait(100) == -signal.SIGKILL, (root / "log").read_text()
        else:
            job.map(engines)  # it survives by itself
        kills[-1].join(10)
        assert kills[-1].at, f"seed {seed}: the job was over before its {victim} died: {kills[-1].story}"
    counts = job.map(engines)
    assert (counts["rows_out"], counts["quarantined"]) == (ROWS, 0)

    table = pq.read_table(job.out.data)
    assert table["id"].to_pylist() == sorted(job.ids)
    stamps = dict(zip(table["id"].to_pylist(), table["stamp"].to_pylist(), strict=True))
    for kill in kills:
        print(f"seed {seed}: ", end="")
        kill.check()
        assert all(stamps[i] == row["stamp"] for i, row in kill.kept.items()), kill.story


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_kill_at_a_moment_of_the_day(victim, standins, tmp_path):
    check_kills(victim, TODAY, standins, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_kill_at_a_random_moment(victim, seed, standins, tmp_path):
    check_kills(victim, seed, standins, tmp_path)


@pytest.mark.full
def test_a_driver_that_is_killed_again_and_again(standins, tmp_path):
    check_kills("driver", 0, standins, tmp_path, times=4)


@pytest.mark.full
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_kill_beside_real_engines(victim, vllm_engines, tmp_path):
    check_kills(victim, TODAY, vllm_engines, tmp_path)
