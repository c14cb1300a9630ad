"""The comparisons that the preference model is given."""

import json
from contextlib import nullcontext

import pyarrow.parquet as pq

from cai_ray.artifacts import StageDir, StageKey
from cai_ray.config import Cluster, Comparisons, PreferenceModelConfig
from cai_ray.generation.data_plane import MapSettings
from cai_ray.stages import preference_model as stage
from cai_ray.stages.shared import StageInputs


def test_a_comparison_that_comes_again_counts_once(tmp_path, monkeypatch):
    def write(name, *words):
        rows = [{"prompt": w, "chosen": f"{w}, yes", "rejected": f"{w}, no"} for w in words]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Comparisons(path=str(tmp_path / name))

    given = []

    def fit(name, config, folders, inputs, out):  # training itself is not what this is about
        given.extend(row["messages"][0]["content"] for f in folders for row in pq.read_table(f).to_pylist())
        return {"quarantined": 0}

    monkeypatch.setattr(stage, "fit", fit)
    again = write("c.jsonl", "rain", "sun").model_copy(update={"limit": 1})
    config = PreferenceModelConfig(
        data=(write("a.jsonl", "bread", "rain", "bread"), write("b.jsonl", "rain", "sun"), again)
    )
    key = StageKey({}, {"seed": 7}, {})
    settings = MapSettings(8, 0.01, 60, nullcontext)
    inputs = StageInputs(key, (), {}, settings, Cluster(), "cpu", 1)
    manifest = stage.preference_model(config, inputs, StageDir(tmp_path / "preference_model", 7))
    assert sorted(given) == ["bread", "rain", "sun"]
    assert manifest.metrics["duplicates"] == 3
    assert [manifest.metrics[f"rows/{source.path}"] for source in config.data[:2]] == [2, 1]
