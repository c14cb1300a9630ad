"""A stage that fails: one message with the fix, exit code 3, what was finished intact, and the same command goes on."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import cli, finish, wait_for

GIB = 2**30


def manifest(run: Path, stage: str) -> dict:
    return json.loads((run / stage / "manifest.json").read_text("utf-8"))


def test_malformed_rows_are_counted_and_too_many_fail_the_stage(tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"How do I do number {i}?"}) for i in range(20)]
    rows[3], rows[11] = "{torn", json.dumps({"prompt": ["not", "text"]})
    rows[5], rows[6], rows[7] = "[]", json.dumps({"text": "no such column"}), json.dumps({"prompt": "null \x00 byte"})
    (tmp_path / "mine.jsonl").write_text("\n".join(rows), "utf-8")
    command = ("run", "tiny", "prompts.harmful=[mine.jsonl]", "--only", "prompts")
    output = finish(cli(*command, cwd=tmp_path), tmp_path, expect=3, limit_s=300)
    run = tmp_path / "runs" / "tiny"
    assert "prompts: 5 of" in output
    assert "quarantine.jsonl" in output
    assert "run.max_bad_fraction" in output
    assert "Traceback" not in output
    assert not (run / "prompts" / "manifest.json").exists()

    (tmp_path / "out.log").unlink()
    finish(cli(*command, "run.max_bad_fraction=0.1", cwd=tmp_path), tmp_path, limit_s=300)
    metrics = manifest(run, "prompts")["metrics"]
    bad = [json.loads(x) for x in (run / "prompts" / "quarantine.jsonl").read_text("utf-8").splitlines()]
    assert (metrics["quarantined"], len(bad)) == (5, 5)
    assert all(b["id"].startswith("mine.jsonl:") and b["reason"] for b in bad)
    assert metrics["harmful_train"] + metrics["harmful_test"] == 15  # every good row


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own with just enough room to begin."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(2.2 * GIB)}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_stops_the_stage_and_harms_nothing(tmp_path: Path, small_disk: Path) -> None:
    command = ("run", "tiny", f"run.dir={small_disk}", "--only", "prompts")
    process = cli(*command, cwd=tmp_path)
    run = small_disk / "tiny"
    wait_for(run / "prompts" / "key.json", process, tmp_path)
    filler = small_disk / "filler"
    with filler.open("wb") as f:
        os.posix_fallocate(f.fileno(), 0, (os.statvfs(small_disk).f_bavail - 1) * os.statvfs(small_disk).f_frsize)
    with (small_disk / "rest").open("wb") as f:
        f.write(b"x" * os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize)
    output = finish(process, tmp_path, expect=3, limit_s=300)
    assert "the disk is full" in output
    assert "free some space" in output
    assert "the same command continues" in output
    assert "Traceback" not in output
    assert not (run / "prompts" / "manifest.json").exists()

    filler.unlink()
    (small_disk / "rest").unlink()
    finish(cli(*command, cwd=tmp_path), tmp_path, limit_s=300)
    assert manifest(run, "prompts")["metrics"]["rows"] == 36
