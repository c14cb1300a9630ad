"""W&B's side of resuming: a stage that goes on continues its own curve."""

from pathlib import Path

import pytest

from cai_ray.artifacts import StageDir
from cai_ray.config_files import parse_config
from cai_ray.tracking import StageTracker


def test_a_resumed_stage_keeps_its_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = parse_config({"models": {"helpful": "tiny", "pretrained": "tiny"}, "tracking": {"wandb": "on"}})
    ids = []
    for stage in ("sft", "sft", "preference_model"):
        tracker = StageTracker(config, StageDir(tmp_path / stage), tmp_path)
        tracker.log(0, {"train/loss": 1.0})
        ids.append(tracker._run.id)
        tracker.finish(None)
    assert ids[0] == ids[1] != ids[2]
