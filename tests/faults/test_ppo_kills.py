"""PPO while its processes die by SIGKILL at random moments: tiny models, real engines."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from datetime import date

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from cai_ray.errors import StageFailed
from cai_ray.models.tokenization import Tokenizer
from cai_ray.rl.groups import Group
from cai_ray.rl.loop import TRAINER_RESTARTS
from cai_ray.rl.rollouts import prompts_of_steps
from tests.rl.conftest import CLUSTER, config, prompts

pytestmark = pytest.mark.full
ROLES = ("Actor", "Critic", "Reward", "Reference", "EngineActor")
TODAY = int(os.environ.get("CAI_RAY_KILL_SEED") or date.today().toordinal())  # other moments every day


def workers_of(role):
    names = (role, "Rollout") if role == "EngineActor" else (role,)  # what it is called while it works for PPO
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            name = (process.cmdline() or [""])[0]
        except psutil.Error:
            continue
        if name.startswith("ray::") and name.removeprefix("ray::").partition(".")[0] in names:
            found.append(process.pid)
    return found


class Killer:
    """Kills a process of some role at a random moment of the next second, after a share of the steps."""

    def __init__(self, seed, roles, kills, share):
        self._random, self._roles, self._left, self._share = random.Random(seed), roles, kills, share
        self.killed, self._step, self._over = [], threading.Event(), False
        self._thread = threading.Thread(target=self._work, daemon=True)

    def _work(self):
        while self._left:
            self._step.wait()
            self._step.clear()
            if self._over:
                return
            if self._random.random() > self._share:
                continue
            time.sleep(self._random.random())
            role = self._random.choice(self._roles)
            if pids := workers_of(role):
                os.kill(self._random.choice(pids), signal.SIGKILL)
                self.killed.append(role)
                self._left -= 1

    def end(self):
        self._over = True
        self._step.set()
        self._thread.join(10)

    @contextmanager
    def progress(self):
        """What `train` reports steps to."""
        if not self._thread.ident:
            self._thread.start()
        yield lambda done, total, words: self._step.set()


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


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
    killer = Killer(seed, ROLES[:4], 2, 0.5)
    train(tmp_path, config(steps=8, checkpoint_every=2), progress=killer.progress)
    killer.end()
    assert killer.killed, f"seed {seed} killed nobody"
    assert [line["step"] for line in lines(tmp_path)] == list(range(8))
    expected, found = (load_file(out / "model" / "model.safetensors") for out in (undisturbed, tmp_path))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6, msg=f"{seed} {killer.killed} {name}")


def test_twenty_kills_over_all_roles_and_each_prompt_counts_in_one_step(train, policy, tmp_path):
    killer, settings, counted = Killer(TODAY, ROLES, 20, 1.0), config(steps=30, checkpoint_every=1), {}

    @contextmanager
    def progress():
        def bar(done, total, words):  # a step is logged, and its checkpoint follows; until then it can come again
            batch = pq.read_table(tmp_path / "checkpoints" / f"rollouts-{done - 1}.parquet")
            counted[done - 1] = batch["prompt_id"].to_pylist()
            told(done, total, words)

        with killer.progress() as told:
            yield bar

    train(tmp_path, settings, progress=progress)
    killer.end()
    assert len(killer.killed) == 20, f"seed {TODAY}: the run was over after {killer.killed}"
    steps = lines(tmp_path)
    assert [line["step"] for line in steps] == list(range(30))
    wanted, *_ = prompts_of_steps(prompts(), settings, 7, Tokenizer.load(policy))
    assert counted == {step: [row["id"] for row in rows] for step, rows in enumerate(wanted)}
    assert max(line["rollout/logprob_gap"] for line in steps) < 5e-5
    assert max(line["rollout/logprob_gap_max"] for line in steps) < 1e-3


@pytest.mark.parametrize(
    ("roles", "count", "changes"),
    [(("EngineActor",), 2, {}), (("Actor",), 1, {"staleness": 1, "checkpoint_every": 2})],
    ids=["one of two engines", "the actor, one step ahead"],
)
def test_engines_drop_what_nobody_waits_for(roles, count, changes, train, tmp_path):
    """Weights come to idle engines only, and those that live still work on what was asked before the kill."""
    killer = Killer(TODAY, roles, TRAINER_RESTARTS, 1.0)  # all may hit the actor before its next checkpoint
    train(tmp_path, config(**{"steps": 12, **changes}), progress=killer.progress, count=count)
    killer.end()
    assert killer.killed, f"seed {TODAY} killed nobody"
    assert [line["step"] for line in lines(tmp_path)] == list(range(12))


def test_ranks_that_a_death_leaves_alone_start_again(train, tmp_path):
    """They say at once that their peer is gone, before Ray says that it died."""
    killer = Killer(TODAY, ("Actor", "Critic"), TRAINER_RESTARTS, 1.0)
    train(tmp_path, config(ranks=2, steps=12, checkpoint_every=2), progress=killer.progress)
    killer.end()
    assert killer.killed, f"seed {TODAY} killed nobody"
    assert [line["step"] for line in lines(tmp_path)] == list(range(12))


@pytest.mark.parametrize(
    ("role", "method", "ranks", "named"),
    [
        ("Reward", "score", 1, "score: no answer within 15 s from reward 0"),
        # The other rank waits for its gradients, and must not be told to have failed.
        ("Actor", "update", 2, "update_actor: no answer within 15 s from actor 0, actor 1"),
    ],
)
def test_a_hung_worker_is_named_within_the_limit(role, method, ranks, named, train, tmp_path, monkeypatch):
    stopped, submit, asked = [], Group.submit, []

    def stopping(self, wanted, *args, **how):
        if (self.role, wanted) == (role.lower(), method):
            asked.append(wanted)
            if len(asked) == 2:  # in the second step
                stopped.extend(workers_of(role))
                os.kill(stopped[0], signal.SIGSTOP)
        return submit(self, wanted, *args, **how)

    monkeypatch.setattr(Group, "submit", stopping)
    cluster = CLUSTER.model_copy(update={"step_timeout_s": 15.0})
    try:
        with pytest.raises(StageFailed, match=named):
            train(tmp_path, config(ranks=ranks), cluster=cluster)
    finally:
        for pid in stopped[:1]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    assert [line["step"] for line in lines(tmp_path)] == [0]


DRIVER = """
import sys
from pathlib import Path
from cai_ray.artifacts import StageDir
from cai_ray.rl.loop import run_ppo
from cai_ray.rl.setup import Setup
from contextlib import nullcontext
from tests.rl.conftest import CLUSTER, config, engines_of, prompts, small_pool
out, policy, reward = map(Path, sys.argv[1:])
settings = config(steps=5, checkpoint_every=2, kl_target=0.05, kl_horizon=40, kl_coef=0.05)
setup = Setup(settings, policy, (reward,), None, "auto", "cpu", 7, CLUSTER, "float32")
show = lambda: nullcontext(lambda done, total, words: None)
with small_pool(out.parent / "logs") as pool:
    run_ppo(setup, prompts(), engines_of(pool, policy), StageDir(out, 7), show)
"""


def test_a_driver_that_is_killed_goes_on_where_it_was(policy, reward_model, tmp_path):
    """By the same command: optimizers, the KL coefficient on its way, prompts, seeds."""

    def start(out):
        environment = {**os.environ, "PYTHONPATH": os.getcwd()}
        return subprocess.Popen([sys.executable, "-c", DRIVER, out, policy, reward_model], env=environment)

    whole, broken = tmp_path / "whole" / "ppo", tmp_path / "broken" / "ppo"
    assert start(whole).wait(400) == 0
    first, deadline = start(broken), time.monotonic() + 300
    while not (broken / "metrics.jsonl").is_file() or len(lines(broken)) < 4:  # one step after the checkpoint
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait(30)
    assert psutil.wait_procs(family, timeout=120)[1] == []  # Ray's processes end with their driver
    assert start(broken).wait(400) == 0
    expected, found = lines(whole), lines(broken)
    assert [line["step"] for line in found] == list(range(5))
    assert len({line["objective/kl_coef"] for line in expected}) == 5  # it moves at every step
    for one, other in zip(expected, found, strict=True):
        for name in ("objective/kl_coef", "objective/score", "objective/kl", "policy/grad_norm", "rollout/length"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), (one["step"], name)


def test_rollouts_of_weights_that_are_too_old_are_refused(train, tmp_path):
    train(tmp_path / "one", config(steps=1, checkpoint_every=100))
    (tmp_path / "two" / "checkpoints").mkdir(parents=True)
    kept = pq.read_table(tmp_path / "one" / "checkpoints" / "rollouts-0.parquet")
    for step in (0, 1):
        kept = kept.set_column(kept.column_names.index("step"), "step", pa.array([step] * len(kept), pa.int32()))
        pq.write_table(kept, tmp_path / "two" / "checkpoints" / f"rollouts-{step}.parquet")
    with pytest.raises(StageFailed, match=r"the weights of steps \[0\], the oldest allowed is 1"):
        train(tmp_path / "two", config(steps=2, checkpoint_every=100))
