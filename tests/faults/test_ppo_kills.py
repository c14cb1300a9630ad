"""PPO while its processes die by SIGKILL at random moments: tiny models, real engines."""

import json
import os
import random
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from datetime import date

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.rl.conftest import config

pytestmark = pytest.mark.full
ROLES = ("Actor", "Critic", "Reward", "Reference", "EngineActor")
TODAY = int(os.environ.get("CAI_RAY_KILL_SEED") or date.today().toordinal())  # other moments every day


def workers_of(role):
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            name = (process.cmdline() or [""])[0]
        except psutil.Error:
            continue
        if name == f"ray::{role}" or name.startswith(f"ray::{role}."):
            found.append(process.pid)
    return found


class Killer:
    """Kills one process of a role after the other, each at a random moment, until it has had its share."""

    def __init__(self, seed, roles, kills, pause_s):
        self._random, self._roles, self._left, self._pause_s = random.Random(seed), roles, kills, pause_s
        self.killed, self._stop = [], threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def _work(self):
        while self._left and not self._stop.wait(self._random.uniform(*self._pause_s)):
            role = self._random.choice(self._roles)
            if pids := workers_of(role):
                os.kill(self._random.choice(pids), signal.SIGKILL)
                self.killed.append(role)
                self._left -= 1

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join(10)


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def throughout(killer):
    """Begins to kill when the first step is done: what dies before has nothing to lose."""

    @contextmanager
    def progress():
        def bar(done, total, words):
            if not killer._thread.is_alive() and not killer.killed and killer._left:
                killer.__enter__()
            time.sleep(0.5)

        yield bar

    return progress


@pytest.fixture(scope="module")
def undisturbed(train, tmp_path_factory):
    """Eight steps whose rollouts are all kept, because no checkpoint covers them."""
    out = tmp_path_factory.mktemp("undisturbed")
    train(out, config(steps=8, checkpoint_every=100))
    return out


@pytest.mark.parametrize("seed", [TODAY, TODAY + 1, TODAY + 2])
def test_with_the_same_rollouts_kills_leave_no_trace_in_the_weights(seed, undisturbed, train, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for path in (undisturbed / "checkpoints").glob("rollouts-*.parquet"):
        shutil.copy(path, tmp_path / "checkpoints")
    killer = Killer(seed, ROLES[:4], 2, (1.0, 8.0))
    train(tmp_path, config(steps=8, checkpoint_every=2), progress=throughout(killer))
    killer.__exit__()
    assert killer.killed, f"seed {seed} killed nobody"
    assert [line["step"] for line in lines(tmp_path)] == list(range(8))
    expected, found = (load_file(out / "model" / "model.safetensors") for out in (undisturbed, tmp_path))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6, msg=f"{seed} {killer.killed} {name}")


def test_twenty_kills_over_all_roles_in_twenty_steps(train, tmp_path):
    killer = Killer(TODAY, ROLES, 20, (4.0, 25.0))
    metrics, _ = train(tmp_path, config(steps=20, checkpoint_every=1), progress=throughout(killer))
    killer.__exit__()
    assert len(killer.killed) == 20, f"seed {TODAY}: the run was over after {killer.killed}"
    steps = lines(tmp_path)
    assert [line["step"] for line in steps] == list(range(20))  # each prompt counts in one committed step
    assert metrics["prompts_used"] == 5
    assert max(line["rollout/logprob_gap"] for line in steps) < 5e-5
