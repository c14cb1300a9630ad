"""The whole pipeline on the real engines: provenance, accounting, models, metrics, what a killed driver leaves."""

import json
from pathlib import Path
from typing import Any

import pyarrow.dataset as pads
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from cai_ray.config_files import load_config
from cai_ray.models import tiny_model
from cai_ray.pipeline import NAMES
from cai_ray.records import derive_seed, row_id
from tests.e2e.conftest import KILL_AFTER

PPO_STEPS = load_config("tiny").ppo.steps


def manifest(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / stage / "manifest.json").read_text("utf-8"))


def rows(run: Path, stage: str) -> list[dict[str, Any]]:
    return pads.dataset(run / stage / "data", format="parquet").to_table().to_pylist()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def test_every_stage_has_a_manifest_and_ran_once(tiny_run: Path) -> None:
    log = (tiny_run / "run.log").read_text("utf-8")
    for stage in NAMES:
        assert manifest(tiny_run, stage)["stage"] == stage
        said = log.count(f" {stage} took ")  # a driver that died right after the commit could not say it
        assert said == 1 or (said == 0 and stage == KILL_AFTER), f"{stage} ran twice or never"
        assert stage != KILL_AFTER or f"{stage}: done before, skipped" in log
    assert "prompts: done before, skipped" in log
    assert (tiny_run / "report.html").stat().st_size > 5_000
    for stage in NAMES:
        inputs = manifest(tiny_run, stage)["inputs"]
        assert set(inputs) <= {*NAMES}


def test_rows_are_accounted_for_at_every_stage(tiny_run: Path) -> None:
    prompts = rows(tiny_run, "prompts")
    harmful = {r["id"] for r in prompts if r["kind"] == "harmful"}
    helpful = {r["id"] for r in prompts if r["kind"] == "helpful"}
    assert len(harmful) == 24
    assert len(helpful) == 12
    m = manifest(tiny_run, "prompts")["metrics"]
    assert m["conversations"] == len(prompts) + m["duplicates"] + m["over_limit"] + m["quarantined"]
    assert m["over_limit"] > 0
    m = manifest(tiny_run, "preference_model")["metrics"]
    assert m["raw_rows"] == m["rows/starter:helpful_comparisons"] + m["duplicates"] + m["over_limit"]
    quarantined = {}
    for stage in ("revise", "sample_pairs", "label", "evaluate"):
        m = manifest(tiny_run, stage)["metrics"]
        bad = [json.loads(x)["id"] for x in (tiny_run / stage / "quarantine.jsonl").read_text("utf-8").splitlines()]
        assert m["rows_in"] == m["rows_out"] + m["quarantined"]
        assert m["quarantined"] == len(bad)
        assert len(rows(tiny_run, stage)) == m["rows_out"]
        quarantined[stage] = set(bad)
    ids = {r["id"] for r in rows(tiny_run, "revise")}
    assert ids | quarantined["revise"] == harmful | {row_id(i, 0) for i in helpful}
    assert {r["id"] for r in rows(tiny_run, "sample_pairs")} | quarantined["sample_pairs"] == harmful
    assert {r["id"] for r in rows(tiny_run, "label")} | quarantined["label"] == {
        r["id"] for r in rows(tiny_run, "sample_pairs")
    }


def test_provenance_of_every_row(tiny_run: Path) -> None:
    for row in rows(tiny_run, "revise"):
        assert row["source"] in ("starter:red_team", "starter:helpful")
        assert row["seed"] == 0
        assert len(row["rounds"]) == (2 if row["kind"] == "harmful" else 0)
        assert all(r["principle_id"] and r["revision"] for r in row["rounds"])
    for row in rows(tiny_run, "label"):
        (vote,) = row["votes"]
        a, b = vote["logprob_a"], vote["logprob_b"]
        expected = torch.softmax(torch.tensor([a, b], dtype=torch.float64), 0)[0].item()
        assert vote["prob"] == pytest.approx(expected, abs=1e-12)
        assert row["label_prob"] == vote["prob"]
        assert vote["principle_id"]
    assert derive_seed(0, "x", "y") == derive_seed(0, "x", "y") != derive_seed(1, "x", "y")


def test_the_run_says_what_its_judge_is_worth(tiny_run: Path) -> None:
    found = manifest(tiny_run, "label")["metrics"]
    assert (found["gate/comparisons"], found["gate/quarantined"]) == (8, 0)
    assert found["gate/accuracy_low"] < found["gate/accuracy"] < found["gate/accuracy_high"]
    for text in ((tiny_run / "run.log").read_text("utf-8"), (tiny_run / "report.html").read_text("utf-8")):
        assert ("THE JUDGE IS NOT ABOVE CHANCE" in text) == (found["gate/accuracy_low"] <= 0.5)


def test_models_load_differ_from_their_inputs_and_answer(tiny_run: Path) -> None:
    start = weights(tiny_model())
    sft, policy = weights(tiny_run / "sft" / "model"), weights(tiny_run / "ppo" / "model")
    assert sft.keys() == start.keys() == policy.keys()
    assert max(float((sft[k] - start[k]).abs().max()) for k in sft) > 1e-4
    assert max(float((policy[k] - sft[k]).abs().max()) for k in sft) > 1e-4
    for stage in ("sft", "ppo"):
        folder = tiny_run / stage / "model"
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] > ids["input_ids"].shape[1]
    for stage in ("sft", "preference_model", "ppo"):
        card = ModelCard.load(tiny_run / stage / "model" / "README.md")
        assert card.data.library_name == "transformers"
        assert f": {stage}\n" in card.text
        assert "| starter:" in card.text
        said = [m["content"] for row in rows(tiny_run, "prompts") for m in row["messages"]]
        assert not any(text in card.text for text in said)
    scorer = AutoModelForSequenceClassification.from_pretrained(tiny_run / "preference_model" / "model")
    assert scorer.config.num_labels == 1
    assert scorer.config.reward_std > 0
    assert scorer(torch.tensor([[1, 5, 7, 2]])).logits.shape == (1, 1)


def test_training_lowers_the_held_out_loss(tiny_run: Path) -> None:
    lines = [json.loads(x) for x in (tiny_run / "sft" / "metrics.jsonl").read_text("utf-8").splitlines()]
    held_out = [x["eval/loss"] for x in lines if "eval/loss" in x]
    assert len(held_out) >= 2
    assert held_out[-1] < held_out[0]


def test_ppo_metrics_exist_for_every_step_and_are_sane(tiny_run: Path) -> None:
    lines = [json.loads(x) for x in (tiny_run / "ppo" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [x["step"] for x in lines] == list(range(PPO_STEPS))
    for line in lines:
        assert line["rollout/logprob_gap"] < 2e-4
        assert line["rollout/logprob_gap_max"] < 2e-3
        assert line["policy/logprob_shift"] >= 0.02  # a skipped sync would exceed the gap's limit by far
        for key in ("objective/score", "policy/loss", "policy/entropy", "policy/clipfrac", "value/loss"):
            assert key in line
        parts = sum(v for k, v in line.items() if k.startswith("time/") and k != "time/step")
        assert parts == pytest.approx(line["time/step"], rel=0.02)
    assert abs(lines[0]["objective/kl"]) < 0.01  # the policy is its reference


def test_the_five_roles_are_distinct_processes(tiny_run: Path) -> None:
    workers = manifest(tiny_run, "ppo")["workers"]
    assert set(workers) == {"actor", "critic", "reward", "reference", "rollout"}
    pids = [w["pid"] for role in workers.values() for w in role]
    assert len(set(pids)) == len(pids) == 5


def test_no_prompt_and_no_answer_is_quoted_in_logs(tiny_run: Path) -> None:
    log = (tiny_run / "run.log").read_text("utf-8")
    texts = [row["messages"][-1]["content"] for row in rows(tiny_run, "prompts") if row["kind"] == "harmful"]
    for row in rows(tiny_run, "revise"):
        texts += [row["initial_response"], *(step[key] for step in row["rounds"] for key in ("critique", "revision"))]
    assert len(texts) > 100
    assert not [text for text in texts if len(text) >= 12 and text in log]
