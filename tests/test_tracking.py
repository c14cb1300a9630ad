"""W&B's side of resuming: a stage that goes on continues its own curve."""

from pathlib import Path
from typing import Any

import pytest

from cai_ray.artifacts import StageDir, StageKey
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


def test_a_line_that_a_crash_cut_off_costs_no_other_sample(tmp_path: Path) -> None:
    config = parse_config({"models": {"helpful": "tiny", "pretrained": "tiny"}, "tracking": {"wandb": "off"}})
    out, logged = StageDir(tmp_path / "revise"), []

    class Run:
        summary: dict[str, Any] = {}  # noqa: RUF012

        def log(self, values: dict[str, Any]) -> None:
            logged.append(values["samples"])

        def finish(self, exit_code: int) -> None:
            assert exit_code == 0

    out.sample({"id": "a", "text": "one\u2028two"})
    with (out.path / "samples.jsonl").open("a") as file:
        file.write('{"id": "b", "te\n')
    tracker = StageTracker(config, out, tmp_path)
    tracker._run = Run()
    tracker.finish(out.commit(StageKey({}, {}, {}), {"rows": 1}))
    assert (logged[0].columns, logged[0].data) == (["id", "text"], [["a", "one\u2028two"]])
