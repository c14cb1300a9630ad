"""Where answers lie and which rows are told to be bad, without engines and scorer."""

import json
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cai_ray.artifacts import StageDir, StageKey
from cai_ray.config import Cluster, EvaluateConfig
from cai_ray.errors import StageFailed
from cai_ray.evaluation.answers import ANSWER, SCORED
from cai_ray.generation.data_plane import MapSettings
from cai_ray.records import PROMPT, to_table
from cai_ray.stages import evaluate as stage
from cai_ray.stages.shared import StageInputs, write_rows


def all_but_one(inputs: Path, program: Any, engines: Any, out: StageDir, *, settings: MapSettings) -> dict[str, int]:
    """Stands in for the data plane: the first row is bad, the others are answered."""
    first, *rows = pq.read_table(inputs).to_pylist()
    done = [{**row, "model": program.model, "response": "Yes.", "seed": 0, "flags": []} for row in rows]
    out.data.mkdir(parents=True)
    pq.write_table(to_table(done, ANSWER), out.data / "part-00000.parquet")
    out.quarantine([{"id": first["id"], "reason": "too long"}], 1, 1.0)
    return {"rows_in": len(rows) + 1, "rows_out": len(rows), "quarantined": 1}


UNREAD = {"score": None, "reason": "no system turn"}


def score(inputs: StageInputs, folders: list[Path], *_: Any) -> list[dict[str, Any]]:
    """Stands in for the preference model."""
    rows = [row for folder in folders for row in pq.read_table(folder).to_pylist()]
    return [{**row, **({"score": 0.0, "reason": None} if row["id"] != "helpful1" else UNREAD)} for row in rows]


def test_a_model_s_folder_stays_as_it_is_and_bad_rows_are_told_with_their_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "map_rows", all_but_one)
    monkeypatch.setattr(stage, "_score", score)
    mine = tmp_path / "mine"
    mine.mkdir()
    prompts = [
        {"id": f"{kind}{i}", "messages": [{"role": "user", "content": "Hi"}], "kind": kind, "source": "s"}
        | {"split": "test"}
        for kind in ("harmful", "helpful")
        for i in range(2)
    ]
    setup: Any = SimpleNamespace(engines=lambda length: None)
    show = MapSettings(8, 0.5, 60, nullcontext)  # type: ignore[arg-type]
    rows = write_rows(prompts, pa.schema(PROMPT), tmp_path / "prompts")
    models = {"sft": setup, str(mine): setup}
    named = {**models, "preference_model": setup}
    inputs = StageInputs(StageKey({}, {}, {}), (rows,), named, show, Cluster(), "cpu", 1)
    out = StageDir(tmp_path / "evaluate")
    manifest = stage.evaluate(EvaluateConfig(), inputs, out)
    assert list(mine.iterdir()) == []
    assert {r["model"] for r in pq.read_table(out.data).to_pylist()} == set(models)
    bad = [json.loads(line) for line in out.quarantine_path.read_text("utf-8").splitlines()]
    assert bad == [
        *({"model": m, "id": "harmful0", "reason": "too long"} for m in models),
        *({"id": "helpful1", "model": m, "reason": "no system turn"} for m in models),
    ]
    counted = [manifest.metrics[name] for name in ("rows_in", "rows_out", "quarantined")]
    assert counted == [8, 4, 4]
    assert len(pq.read_table(out.data)) == 4
    strict = replace(inputs, settings=replace(show, max_bad_fraction=0.3))
    with pytest.raises(StageFailed, match="no system turn"):  # more than may be bad
        stage.evaluate(EvaluateConfig(), strict, StageDir(tmp_path / "strict"))


def test_a_run_below_a_folder_that_is_named_like_a_column_keeps_its_own_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.environ["RAY_usage_stats_enabled"] = "0"  # noqa: SIM112  Ray spells it so
    import ray

    class Zero:
        def __init__(self, reward: str, gpu: bool):
            pass

        def __call__(self, table: pa.Table) -> pa.Table:
            return to_table([{**row, "score": 0.0} for row in table.to_pylist()], SCORED)

    monkeypatch.setattr(stage, "Scorer", Zero)
    row = {"id": "a", "messages": [], "kind": "harmful", "source": "s", "split": "test"}
    row |= {"model": "sft", "response": "Yes.", "seed": 0, "flags": []}
    folder = write_rows([row], ANSWER, tmp_path / "model=7b" / "kind=x" / "data")
    models: Any = {"sft": None, "preference_model": SimpleNamespace(model=tmp_path)}
    show = MapSettings(8, 0.5, 60, nullcontext)  # type: ignore[arg-type]
    inputs = StageInputs(StageKey({}, {}, {}), (), models, show, Cluster(), "cpu", 1)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, namespace="test")
    try:
        assert stage._score(inputs, [folder], StageDir(tmp_path / "out")) == [{**row, "score": 0.0}]
    finally:
        ray.shutdown()
