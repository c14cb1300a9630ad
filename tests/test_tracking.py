"""W&B's side of resuming: a stage that goes on continues its own curve."""

from pathlib import Path
from typing import Any

import pytest

from cai_ray.artifacts import StageDir
from cai_ray.config_files import parse_config
from cai_ray.errors import ConfigError
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


def test_a_missing_key_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    wandb.teardown()  # it remembers an earlier test's environment
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / "nobody"))
    config = parse_config({"models": {"helpful": "tiny", "pretrained": "tiny"}, "tracking": {"wandb": "on"}})
    with pytest.raises(ConfigError, match=r"W&B does not take the run: .*key"):
        StageTracker(config, StageDir(tmp_path / "sft"), tmp_path)


def test_samples_go_with_the_next_metrics_and_the_rest_at_the_end(tmp_path: Path) -> None:
    config = parse_config({"models": {"helpful": "tiny", "pretrained": "tiny"}, "tracking": {"wandb": "off"}})
    out, logged = StageDir(tmp_path / "revise"), []

    class Run:
        summary: dict[str, Any] = {}  # noqa: RUF012

        def log(self, values: dict[str, Any]) -> None:
            logged.append(values.get("samples"))

        def finish(self, exit_code: int) -> None:
            logged.append(exit_code)

    tracker = StageTracker(config, out, tmp_path)
    tracker._run, out.on_sample, out.on_metrics = Run(), tracker.sample, tracker.log
    out.sample({"id": "a", "text": "one\u2028two"})
    out.metrics(0, {"score": 1.0})
    out.metrics(1, {"score": 2.0})
    out.sample({"id": "b", "turns": ["x"]})
    tracker.finish(None)  # what a run has seen counts most where it has failed
    first, nothing, last, code = logged
    assert (first.columns, first.data) == (["id", "text"], [["a", "one\u2028two"]])
    assert (nothing, code) == (None, 1)
    assert (last.columns, last.data) == (["id", "turns"], [["b", '["x"]']])
