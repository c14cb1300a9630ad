"""PPO's checkpoints: one folder for actor, critic and controller, which counts only with the manifest written last."""

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cai_ray.artifacts import write_atomic


def commit_checkpoint(folder: Path, state: Mapping[str, Any], keep: int = 1) -> None:
    """Makes a filled folder a checkpoint: its manifest (`state`, and the sizes of all files) is written last.

    Then all but the newest `keep` checkpoints go, and rollouts and adapters of steps that the oldest of these covers.
    """
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    write_atomic(folder / "manifest.json", json.dumps({**state, "files": files}))
    whole = sorted(_step_of(path.parent) for path in folder.parent.glob("step-*/manifest.json"))
    oldest = [step for step in whole if step <= state["step"]][-keep:][0]
    _remove(path for path in list(folder.parent.iterdir()) if _step_of(path) < oldest)


def last_checkpoint(checkpoints: Path, before: float = math.inf) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of those from which a step below `before` continues, and its state; None if none."""
    for folder in sorted(checkpoints.glob("step-*"), key=_step_of, reverse=True):
        manifest = folder / "manifest.json"
        if _step_of(folder) < before and manifest.is_file():
            state = json.loads(manifest.read_text("utf-8"))
            if all((folder / n).is_file() and (folder / n).stat().st_size == s for n, s in state["files"].items()):
                return folder, state
    return None


def go_back(checkpoints: Path, step: int) -> bool:
    """Makes the newest checkpoint from before `step` the last, with twice the KL coefficient; whether there is one.

    What is from after it goes: other checkpoints, and the rollouts of steps that will be trained otherwise.
    """
    found = last_checkpoint(checkpoints, step)
    if not found:
        return False
    folder, state = found
    # Rollouts come first: whoever dies here must not find, beside the older policy, rollouts of the one that is left.
    _remove(path for path in sorted(checkpoints.iterdir()) if _step_of(path) > state["step"])
    state["kl_coef"] *= 2
    write_atomic(folder / "manifest.json", json.dumps(state))
    return True


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _step_of(path: Path) -> int:
    """The number in `step-12` or `rollouts-12.parquet`: the first step that it is for."""
    number = path.stem.rpartition("-")[2]
    return int(number) if number.isdigit() else 0
