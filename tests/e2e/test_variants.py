"""Two ranks and two engines, W&B, a foreign Ray cluster and its Job API, Ctrl-C: each from the finished run's data."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from cai_ray.pipeline import NAMES
from tests.e2e.conftest import cli, finish, wait_for
from tests.e2e.wandb_files import OfflineRun, read_offline_runs

TWO = "ranks=2"


def tracked(run: Path, stage: str) -> OfflineRun:
    """The one W&B run of a stage, as W&B's own files have it."""
    (only,) = read_offline_runs(run)
    assert (only.name, only.group) == (f"{run.name}/{stage}", run.name)
    assert only.config["ppo"]["rollout_batch_size"] == 8
    return only


def metrics(path: Path) -> list[dict[str, float]]:
    return [json.loads(x) for x in (path / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("sft", ["sft.optim.lr=9e-4", "sft.sharding.ranks=2", "sft.sharding.zero_stage=2"]),
        (
            "preference_model",
            [
                "preference_model.optim.lr=9e-4",
                "preference_model.sharding.ranks=2",
                "preference_model.sharding.zero_stage=3",
            ],
        ),
        (
            "ppo",
            [
                *("ppo.steps=2", "ppo.actor.sharding.ranks=2", "ppo.actor.sharding.zero_stage=2", "ppo.engines=2"),
                *("ppo.critic.sharding.ranks=2", "ppo.critic.sharding.zero_stage=3"),
            ],
        ),
    ],
)
def test_two_ranks(tiny_run: Path, tmp_path: Path, stage: str, overrides: list[str]) -> None:
    arguments = ("run", "tiny", *overrides, "--name", "two", "--reuse", str(tiny_run), "--only", stage)
    finish(cli(*arguments, cwd=tmp_path, env={"WANDB_MODE": "offline"}), tmp_path)
    out = tmp_path / "runs" / "two" / stage
    lines = metrics(out)
    key = "objective/kl" if stage == "ppo" else "train/loss"
    logged = [row[key] for row in tracked(out.parent, stage).history if key in row]
    assert logged == [line[key] for line in lines if key in line]
    if stage == "ppo":
        workers = json.loads((out / "manifest.json").read_text("utf-8"))["workers"]
        assert {role: len(w) for role, w in workers.items()} == {
            **dict.fromkeys(("actor", "critic", "rollout"), 2),
            **dict.fromkeys(("reward", "reference"), 1),
        }
        assert all(x["rollout/logprob_gap"] < 2e-4 for x in lines)
    else:
        assert len(list((out / "logs").glob("rank-*.log"))) == 2
        (two, one) = ([x["eval/loss"] for x in m if "eval/loss" in x][-1] for m in (lines, metrics(tiny_run / stage)))
        assert two == pytest.approx(one, rel=0.2)


@pytest.mark.full
def test_a_job_on_a_running_cluster(tmp_path: Path) -> None:
    """`ray start --head`, the real Job API, and a whole run that joins by RAY_ADDRESS; the cluster outlives it."""
    ray = str(Path(sys.executable).parent / "ray")
    short = tempfile.mkdtemp(prefix="cai-")  # Ray puts sockets there, whose paths may have 107 characters
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    clean |= {
        "RAY_prestart_worker_first_driver": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    ports = [
        "--port=46379",
        "--dashboard-port=48265",
        "--ray-client-server-port=46301",
        "--dashboard-agent-listen-port=46365",
    ]
    start = [ray, "start", "--head", "--num-cpus=16", f"--temp-dir={short}", "--include-dashboard=true", *ports]
    subprocess.run(start, env=clean, check=True, timeout=120, capture_output=True)
    nodes = [p for p in psutil.process_iter(["cmdline"]) if short in " ".join(p.info["cmdline"] or [])]
    try:
        job = [sys.executable, "-m", "cai_ray.cli", "run", "tiny", f"run.dir={tmp_path}", "--name", "job"]
        environment = '{"env_vars": {"WANDB_MODE": "offline"}}'
        address = ["--address=http://127.0.0.1:48265", "--runtime-env-json", environment]
        submit = [ray, "job", "submit", *address, "--", *job]
        done = subprocess.run(submit, env=clean, capture_output=True, text=True, timeout=1200, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert re.search(r"[Ss]ucceeded", done.stdout + done.stderr)
        run = tmp_path / "job"
        logged = {r.name: r for r in read_offline_runs(run)}
        assert set(logged) == {f"job/{stage}" for stage in NAMES}  # a W&B run for every stage,
        assert {r.group for r in logged.values()} == {"job"}  # all in one group
        for stage in NAMES:
            numbers = json.loads((run / stage / "manifest.json").read_text("utf-8"))["metrics"]
            assert logged[f"job/{stage}"].config["ppo"]["rollout_batch_size"] == 8
            for key in numbers.keys() & {"mean_label", "rows_out", "train_examples", "objective/kl"}:
                assert logged[f"job/{stage}"].summary[key] == pytest.approx(numbers[key])
        assert logged["job/label"].summary["samples/nrows"] == 8
        assert any(p.is_running() for p in nodes)  # the cluster outlives the run that joined it
    finally:
        for p in nodes:
            p.kill()
        shutil.rmtree(short, ignore_errors=True)


def test_ctrl_c_leaves_nothing_and_says_how_to_go_on(tmp_path: Path) -> None:
    process = cli("run", "tiny", cwd=tmp_path)
    wait_for(tmp_path / "runs" / "tiny" / "revise" / "key.json", process, tmp_path)
    time.sleep(8)  # engines are starting
    below = psutil.Process(process.pid).children(recursive=True)
    assert below
    before = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    output = finish(process, tmp_path, expect=130, limit_s=15)
    assert time.monotonic() - before < 15
    assert "run tiny" in output
    assert "continue" in output
    assert not [p for p in below if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    ours = {str(process.pid), *(str(p.pid) for p in below)}
    assert not [p for p in Path("/dev/shm").iterdir() if ours & set(re.split(r"[-_.]", p.name))]
