"""What PPO scores by, and what it mixes in of `revise`'s rows."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from cai_ray.artifacts import StageDir, StageKey
from cai_ray.config import Cluster, PPOConfig
from cai_ray.constitution import load_constitution
from cai_ray.errors import DataError
from cai_ray.generation.data_plane import MapSettings
from cai_ray.models import tiny_model
from cai_ray.models.tokenization import Tokenizer
from cai_ray.records import PROMPT, REVISION, to_table
from cai_ray.rl.setup import Judge
from cai_ray.stages import ppo as stage
from cai_ray.stages.ppo import to_learn
from cai_ray.stages.shared import StageInputs, write_rows
from tests.training.rows import revision


def test_training_rows_are_cut_into_prompt_and_answer(tmp_path):
    tokenizer, config = Tokenizer.load(tiny_model()), PPOConfig(max_prompt_tokens=64, max_new_tokens=64)
    rows = [revision(i) for i in range(8)]
    odd = {
        **rows[-1],
        "id": "odd",
        "messages": rows[-1]["messages"] * 2,
    }  # two user turns in a row
    pq.write_table(to_table([*rows, odd], REVISION), tmp_path / "part.parquet")
    table, unusable = to_learn(tmp_path, config, tokenizer)
    found = table.to_pylist()
    assert unusable == 1
    assert len(found) == 6 * 2  # two rounds of each row that is not held out
    first = min((r for r in rows if r["split"] == "train"), key=lambda r: r["id"])
    mine = [row for row in found if row["id"].startswith(first["id"])]
    assert [row["prompt_ids"] for row in mine] == [tokenizer.prompt(first["messages"])] * 2
    texts = [tokenizer.hf.decode(row["response_ids"], skip_special_tokens=True) for row in mine]
    assert texts == [round["revision"] for round in first["rounds"]]
    assert all(row["response_ids"][-1] == tokenizer.eos_id for row in mine)


def test_nothing_to_mix_in_is_an_error(tmp_path):
    pq.write_table(to_table([revision(0)], REVISION), tmp_path / "part.parquet")  # held out
    with pytest.raises(DataError, match="ptx_coef has no training row"):
        to_learn(tmp_path, PPOConfig(), Tokenizer.load(tiny_model()))


def test_rewards_are_folders_judges_and_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def model(name: str, format: str = "auto") -> Any:
        return SimpleNamespace(model=tmp_path / name, format=format, dtype="float32", engines=lambda *_, **__: None)

    names = ("sft", "preference_model", "/models/pm", "pretrained", "/models/other")
    judge, folders = model("judge", "chat"), {name: model(name.strip("/")) for name in names}
    config = PPOConfig(
        reward=("preference_model", "/models/pm", "feedback_model", "mine.module:score"),
        heldout_reward="/models/other",
        evaluate_every=5,
    )
    turn = {"role": "user", "content": "Hi"}
    prompt = {"id": "p", "messages": [turn], "kind": "harmful", "source": "s", "split": "train"}
    rows = write_rows([prompt, {**prompt, "id": "q", "split": "test"}], PROMPT, tmp_path / "prompts")
    constitution = load_constitution("default")
    show = MapSettings(8, 0.25, 60, nullcontext)  # type: ignore[arg-type]
    key, models = StageKey({}, {}, {}), {**folders, "feedback_model": judge}
    given: list[Any] = []

    def run_ppo(*arguments: Any) -> tuple[dict[str, float], dict[str, Any]]:
        given.extend(arguments)
        arguments[3].path.mkdir()
        return {}, {}

    monkeypatch.setattr(stage, "run_ppo", run_ppo)
    inputs = StageInputs(key, (rows,), models, show, Cluster(), "cpu", 1, constitution)
    stage.ppo(config, inputs, StageDir(tmp_path / "ppo", 7))
    setup, prompts, *_, sl_rows, max_bad_fraction, held = given
    assert (setup.policy, setup.heldout_reward) == (tmp_path / "sft", tmp_path / "models/other")
    scored_by = (tmp_path / "preference_model", tmp_path / "models/pm", Judge(judge.model, "chat", constitution))
    assert setup.rewards == (*scored_by, "mine.module:score")
    assert ([p["id"] for p in prompts], sl_rows, max_bad_fraction) == (["p"], None, 0.25)
    assert [p["id"] for p in held] == ["q"]
