"""W&B's side of resuming: a stage that goes on continues its own curve."""

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cai_ray.artifacts import StageDir, StageKey
from cai_ray.config import Config
from cai_ray.config_files import parse_config
from cai_ray.errors import ConfigError
from cai_ray.tracking import tracked


def configured(wandb: str = "on") -> Config:
    return parse_config({"models": {"helpful": "tiny", "pretrained": "tiny"}, "tracking": {"wandb": wandb}})


def test_a_resumed_stage_keeps_its_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for stage in ("sft", "sft", "preference_model"):
        out = StageDir(tmp_path / stage)
        with tracked(configured(), out, tmp_path):
            out.metrics(0, {"train/loss": 1.0})
            assert wandb.run is not None
            ids.append(wandb.run.id)
    assert ids[0] == ids[1] != ids[2]


def test_a_missing_key_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    wandb.teardown()  # it remembers an earlier test's environment
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / "nobody"))
    with (
        pytest.raises(ConfigError, match=r"W&B does not take the run: .*key"),
        tracked(configured(), StageDir(tmp_path / "sft"), tmp_path),
    ):
        pass


def watch(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a W&B run is told: each table of samples (None for a line without one), the summary, the exit code."""
    told: list[Any] = []
    run = SimpleNamespace(
        log=lambda values: told.append(values.get("samples")),
        summary=SimpleNamespace(update=told.append),
        finish=lambda exit_code: told.append(exit_code),
    )
    monkeypatch.setattr("wandb.init", lambda **_: run)
    return told


def test_samples_go_with_the_next_metrics_and_the_rest_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, told = StageDir(tmp_path / "revise"), watch(monkeypatch)
    with suppress(RuntimeError), tracked(configured(), out, tmp_path):
        out.sample({"id": "a", "text": "one\u2028two"})
        out.metrics(0, {"score": 1.0})
        out.metrics(1, {"score": 2.0})
        out.sample({"id": "b", "turns": ["x"]})
        raise RuntimeError("killed")  # what a run has seen counts most where it has failed
    first, nothing, last, code = told
    assert (first.columns, first.data) == (["id", "text"], [["a", "one\u2028two"]])
    assert (nothing, code) == (None, 1)
    assert (last.columns, last.data) == (["id", "turns"], [["b", '["x"]']])


def test_a_finished_stage_leaves_its_key_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, told = StageDir(tmp_path / "revise"), watch(monkeypatch)
    with tracked(configured(), out, tmp_path):
        out.commit(StageKey({}, {}, {}), {"rows": 3, "path": "x"})
    assert told == [{"rows": 3}, 0]


def test_without_wandb_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, told = StageDir(tmp_path / "revise"), watch(monkeypatch)
    with tracked(configured("off"), out, tmp_path):
        out.sample({"id": "a"})
        out.metrics(0, {"score": 1.0})
    assert (told, (out.path / "tracking.json").exists()) == ([], False)
