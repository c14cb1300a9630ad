"""PPO's checkpoints: one folder for actor, critic and controller, which counts only with the manifest written last."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cai_ray.artifacts import write_atomic


def commit_checkpoint(folder: Path, state: Mapping[str, Any], keep: int = 1) -> None:
    """Makes a filled folder a checkpoint: its manifest (`state`, and the sizes of all files) is written last.

    Then all but the newest `keep` checkpoints go, and the rollouts of steps that the oldest of these covers.
    """
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    write_atomic(folder / "manifest.json", json.dumps({**state, "files": files}))
    whole = sorted(_step_of(path.parent) for path in folder.parent.glob("step-*/manifest.json"))
    oldest = [step for step in whole if step <= state["step"]][-keep:][0]
    for path in folder.parent.iterdir():
        if _step_of(path) < oldest:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def last_checkpoint(checkpoints: Path, before: float = math.inf) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of those from which a step below `before` continues, and its state; None if none."""
    for folder in sorted(checkpoints.glob("step-*"), key=_step_of, reverse=True):
        manifest = folder / "manifest.json"
        if _step_of(folder) < before and manifest.is_file():
            state = json.loads(manifest.read_text("utf-8"))
            if all((folder / n).is_file() and (folder / n).stat().st_size == s for n, s in state["files"].items()):
                return folder, state
    return None


def forget_checkpoints(checkpoints: Path, step: int) -> None:
    """Removes the checkpoints from which step `step` or a later one continues."""
    for folder in checkpoints.glob("step-*"):
        if _step_of(folder) >= step:
            shutil.rmtree(folder)


def _step_of(path: Path) -> int:
    """The number in `step-12` or `rollouts-12.parquet`: the first step that a checkpoint or rollouts are for."""
    number = path.stem.rpartition("-")[2]
    return int(number) if number.isdigit() else 0
