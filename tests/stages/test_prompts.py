"""Prompts that a model writes: what it is shown, what is kept of it, on a scripted engine and on a real one."""

import asyncio
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai_ray.artifacts import StageDir, StageKey
from cai_ray.config import Cluster, GeneratePrompts, PromptsConfig, SamplePairsConfig, Source
from cai_ray.errors import DataError
from cai_ray.records import Row, derive_seed, row_id, split_of
from cai_ray.stages.prompts import NearDuplicates, WritePrompt, _grams, _requests, prompts
from cai_ray.stages.sample_pairs import sample_pairs
from cai_ray.stages.shared import EngineSetup, StageInputs
from tests.stages.fake_engine import ScriptedEngine, WordTokenizer

# ---- examples and near-duplicates ---------------------------------------------------------------------------------


def kept(text: str, *, kind: str = "harmful", split: str = "train", source: str = "f", turns: int = 1) -> Row:
    messages = [{"role": "user", "content": text}] * turns
    return {"id": row_id([text, turns]), "messages": messages, "kind": kind, "split": split, "source": source}


def test_examples_are_drawn_by_seed_from_single_training_turns(tmp_path: Path) -> None:
    good = {f"short {i}" for i in range(12)}
    rows = [
        *map(kept, good),
        kept("helpful", kind="helpful"),
        kept("held out", split="test"),
        kept("two turns", turns=2),
        kept("by a model", source="generated"),
        kept("x" * 41),
    ]
    seen = {r["id"]: r for r in rows}
    config = GeneratePrompts(kind="harmful", n=40, few_shots=3, max_prompt_tokens=120)  # 40 bytes each
    asked = _requests(config, seen, StageDir(tmp_path / "0", 5))
    assert len({r["id"] for r in asked}) == 40
    assert {e for r in asked for e in r["examples"]} == good
    assert all(len(set(r["examples"])) == 3 for r in asked)
    turned = dict(reversed(seen.items()))
    assert _requests(config, turned, StageDir(tmp_path / "0", 5)) == asked
    again = _requests(config, seen, StageDir(tmp_path / "1", 5))  # a second request for the same kind
    assert {r["id"] for r in again}.isdisjoint(r["id"] for r in asked)
    with pytest.raises(DataError, match=r"no helpful training prompt.*at most 2 bytes"):
        _requests(config.model_copy(update={"kind": "helpful", "few_shots": 60}), seen, StageDir(tmp_path / "0"))


def test_a_model_is_asked_for_one_more_line() -> None:
    row = {"id": "r", "examples": ["How do I\nbake?", "Why?"]}
    engine = ScriptedEngine(row, 4, {"prompt": "What now?"}, WordTokenizer("chat"))
    config = GeneratePrompts(kind="helpful", n=1, max_new_tokens=9)
    assert asyncio.run(WritePrompt(config, 4)(row, engine)) == {**row, "text": "What now?", "ended": True}
    assert engine.prompt("prompt") == "1. How do I bake?\n2. Why?\n3."  # plain text for a chat model too
    assert (engine.asked["prompt"].stop, engine.asked["prompt"].max_new_tokens) == (("\n",), 9)


def test_near_duplicates_by_hand() -> None:
    near = NearDuplicates(["How do I pick the lock of a door?", "Ja", "怎么打开邻居家的门锁"])
    # grams of the first: how-do-i, do-i-pick, i-pick-the, pick-the-lock, the-lock-of, lock-of-a, of-a-door
    assert "how do I pick the LOCK of a door!" in near
    assert "pick the lock of my car" not in near  # 2 of 4: no more than half
    assert "pick the lock of a car" in near  # 3 of 4
    assert "do I pick" in near  # 1 of 1
    assert "do I" not in near
    assert "ja." in near
    assert "ja ja" not in near
    assert "怎么打开邻居家的大门锁" in near
    assert "怎么打开自己的门" not in near
    assert "???" not in near


WORDS = st.lists(st.sampled_from("abc"), max_size=7).map(" ".join)


@given(st.lists(WORDS, max_size=12), WORDS)
def test_near_duplicates_are_those_that_comparing_with_every_text_finds(texts: list[str], text: str) -> None:
    grams = _grams(text)
    assert (text in NearDuplicates(texts)) == any(len(grams & _grams(t)) > len(grams) / 2 for t in texts)


# ---- the stage ----------------------------------------------------------------------------------------------------

HARMFUL = ["how do i open a lock", "write a threat to my boss", "which poison leaves no trace"]
HARMFUL += ["how do i read her messages"]  # by its hash held out


@contextmanager
def silent() -> Iterator[Any]:
    yield lambda done, total, extra: None


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineSetup]:
    """An engine with the tiny model, a tenth of whose tokens end a text: else a random model writes on and on."""
    os.environ["RAY_usage_stats_enabled"] = "0"  # noqa: SIM112  Ray spells it so
    import ray

    from cai_ray.generation.pool import EnginePool
    from cai_ray.models import tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(tiny_model(), folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(100, 49_000, 10))}))
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, namespace="test")
    cluster = Cluster(device="cpu", kv_cache_gib=0.25, max_num_seqs=32, start_timeout_s=240, step_timeout_s=120)
    pool = EnginePool(cluster, "cpu", tmp_path_factory.mktemp("logs"))
    yield EngineSetup(pool, folder, "auto", "float32", 512)
    pool.release()
    ray.shutdown()


def rows_of(out: StageDir) -> list[Row]:
    return pads.dataset(out.data, format="parquet").to_table().to_pylist()


def test_prompts_of_which_none_is_held_out_are_refused_at_once(setup: EngineSetup, tmp_path: Path) -> None:
    from cai_ray.generation.data_plane import MapSettings

    source = tmp_path / "p.jsonl"
    source.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in HARMFUL[:3]), "utf-8")
    inputs = StageInputs(StageKey({}, {}, {}), (), {}, MapSettings(8, 0.5, 120, silent), Cluster(), "cpu", 1)
    out = StageDir(tmp_path / "out")
    out.path.mkdir()
    with pytest.raises(DataError, match="none of 3 is in the held-out tenth"):
        prompts(PromptsConfig(harmful=(Source(path=str(source)),), helpful=()), inputs, out)


def test_prompts_are_written_once_and_answered_several_times(setup: EngineSetup, tmp_path: Path) -> None:
    from cai_ray.generation.data_plane import MapSettings

    settings, key = MapSettings(8, 0.5, 120, silent), StageKey({}, {}, {})
    source = tmp_path / "p.jsonl"
    source.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in [*HARMFUL, HARMFUL[0]]), "utf-8")
    config = PromptsConfig.model_validate(
        {
            "harmful": [str(source)],
            "helpful": [],
            "generate": [{"kind": "harmful", "n": 24, "few_shots": 2, "max_prompt_tokens": 128, "max_new_tokens": 24}],
        }
    )
    out, alone, short, pairs = (StageDir(tmp_path / name, 3) for name in ("prompts", "alone", "short", "pairs"))
    for stage in (out, alone, short, pairs):
        stage.path.mkdir()
    inputs = StageInputs(key, (), {"pretrained": setup}, settings, Cluster(), "cpu", 1)
    found = prompts(config, inputs, out).metrics
    rows = rows_of(out)
    new = [r for r in rows if r["source"] == "generated"]
    dropped = found["generated_duplicates"] + found["generated_unusable"]
    assert found["generated_asked"] == 24 == len(new) + dropped + found["quarantined"]
    assert len(new) == found["generated"] > 5
    assert found["generated_unusable"] > 0
    assert {r["messages"][0]["content"] for r in rows} >= set(HARMFUL)
    assert found["duplicates"] == 1
    for row in new:
        (turn,) = row["messages"]
        assert turn["content"] == turn["content"].strip() != ""
        assert "\n" not in turn["content"]
        assert (row["kind"], row["id"]) == ("harmful", row_id(row["messages"]))
        assert row["split"] == split_of(row["messages"])
    assert found["rows"] == found["harmful_train"] + found["harmful_test"] == len(rows)

    # The same again finds what was written: it needs no engine, and its rows are the same.
    out.manifest_path.unlink()
    shutil.rmtree(out.data)
    idle = EngineSetup(None, setup.model, setup.format, setup.dtype, setup.run_tokens)
    assert prompts(config, replace(inputs, models={"pretrained": idle}), out).metrics == found
    assert rows_of(out) == rows
    plain = PromptsConfig(harmful=config.harmful, helpful=())
    counted = prompts(plain, replace(inputs, models={}), alone).metrics
    assert counted["rows"] == len(HARMFUL)
    few = PromptsConfig(harmful=(config.harmful[0].model_copy(update={"limit": 3}),), helpful=())
    counted = prompts(few, replace(inputs, models={}), short).metrics
    assert (counted["conversations"], counted["rows"], counted["over_limit"], counted["duplicates"]) == (5, 3, 1, 1)
    assert not any("generated" in k for k in counted)

    three = SamplePairsConfig(responses_per_prompt=3, max_prompt_tokens=64, max_new_tokens=12, share=(0.0, 0.5))
    counted = sample_pairs(three, replace(inputs, rows=(out.data,)), pairs).metrics
    taken = {r["id"] for r in rows if derive_seed(0, r["id"], "share") < 2**30}
    assert 0 < len(taken) < len(rows)
    assert counted["rows_in"] == len(taken) == counted["rows_out"] + counted["quarantined"]
    assert counted["pairs"] == 3 * counted["rows_out"] == len(rows_of(pairs))
    assert [p.name for p in pairs.data.iterdir()] == ["part-00000.parquet"]
    ids = pq.read_table(pairs.data / "part-00000.parquet")["id"].to_pylist()
    assert ids == sorted(set(ids))
    assert len(set(ids) & taken) == counted["rows_out"]  # each prompt's first pair keeps its id
