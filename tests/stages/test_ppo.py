"""What PPO mixes in of `revise`'s rows."""

import pyarrow.parquet as pq
import pytest

from cai_ray.config import PPOConfig
from cai_ray.errors import DataError
from cai_ray.models import tiny_model
from cai_ray.models.tokenization import Tokenizer
from cai_ray.records import REVISION, to_table
from cai_ray.stages.ppo import to_learn
from tests.training.rows import revision


def test_training_rows_are_cut_into_prompt_and_answer(tmp_path):
    tokenizer, config = Tokenizer.load(tiny_model()), PPOConfig(max_prompt_tokens=64, max_new_tokens=64)
    rows = [revision(i) for i in range(8)]
    pq.write_table(to_table(rows, REVISION), tmp_path / "part.parquet")
    found = to_learn(tmp_path, config, tokenizer).to_pylist()
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
