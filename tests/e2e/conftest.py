"""One run of `tiny` through all nine stages, driven as a user drives it, and killed on the way."""

import os
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pytest

STAGES = ("prompts", "revise", "sft", "sample_pairs", "label", "preference_model", "ppo", "evaluate")
KILL_AFTER = STAGES[date.today().toordinal() % len(STAGES)]  # the driver dies as soon as this one has committed
LIMIT_S = 900


def cli(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """`cai-ray ARGUMENTS` as a process of its own session, its output in cwd/out.log."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "WANDB_"))}
    with (cwd / "out.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "cai_ray.cli", *arguments],
            cwd=cwd,
            env={**clean, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[str], cwd: Path, expect: int = 0, limit_s: float = LIMIT_S) -> str:
    """Waits for the end, checks the exit code, returns the output."""
    try:
        code = process.wait(limit_s)
    finally:
        process.kill()
    output = (cwd / "out.log").read_text("utf-8")
    assert code == expect, f"exit code {code}, expected {expect}:\n{output[-3000:]}"
    return output


def wait_for(path: Path, process: subprocess.Popen[str], cwd: Path, limit_s: float = LIMIT_S) -> None:
    """Waits until `path` exists; fails when the process ends before."""
    end = time.monotonic() + limit_s
    while not path.exists():
        assert process.poll() is None, (cwd / "out.log").read_text("utf-8")[-3000:]
        assert time.monotonic() < end, f"{path} did not appear in {limit_s} s"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run directory."""
    cwd = tmp_path_factory.mktemp("tiny")
    process = cli("run", "tiny", cwd=cwd)
    wait_for(cwd / "runs" / "tiny" / KILL_AFTER / "manifest.json", process, cwd)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finish(cli("run", "tiny", cwd=cwd), cwd)
    return cwd / "runs" / "tiny"
