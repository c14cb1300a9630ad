"""The card in a published model's folder: where the model comes from, and no word of the data."""

import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import ModelCard

from cai_ray.artifacts import RunDir, StageKey
from cai_ray.config_files import load_config
from cai_ray.constitution import load_constitution, to_yaml
from cai_ray.pipeline import stage_table
from cai_ray.records import LABELED_PAIR, PROMPT, REVISION, to_table
from cai_ray.report.cards import model_card
from tests.test_export import DANGER, PAIRS, REVISIONS

CONFIG = {"run": {"name": "mine"}, "models": {"helpful": "tiny", "pretrained": "embedded"}}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Everything before a training stage is finished, and `sft` too."""
    run = RunDir(tmp_path / "mine")
    run.path.mkdir()
    (run.path / "config.yaml").write_text(yaml.safe_dump(CONFIG), "utf-8")
    sha = load_constitution("default").sha256
    for name, rows, schema, parts in (
        ("prompts", REVISIONS, PROMPT, {}),
        ("revise", REVISIONS, REVISION, {"models": {"helpful": "tiny@main"}, "principles": sha}),
        ("sft", [], None, {"models": {"pretrained": "embedded@main"}}),
        ("sample_pairs", [], None, {}),
        ("label", PAIRS, LABELED_PAIR, {"models": {"pretrained": "embedded@main"}, "principles": sha}),
        ("preference_model", PAIRS[:1], LABELED_PAIR, {}),  # its own rows: human comparisons
    ):
        out = run.stage(name, 7)
        out.path.mkdir()
        if schema:
            out.data.mkdir()
            pq.write_table(to_table(rows, schema), out.data / "part-00000.parquet")
        if "principles" in parts:
            out.constitution.write_text(to_yaml(load_constitution("default")), "utf-8")
        key = StageKey(section(run, name), {"seed": 7, **parts}, inputs(run, name))
        out.commit(key, {"rows": len(rows), "note": DANGER})
    return run


def section(run: RunDir, name: str) -> dict[str, Any]:
    config = load_config(str(run.path / "config.yaml"))
    return getattr(config, name).model_dump(mode="json")


def inputs(run: RunDir, name: str) -> dict[str, str]:
    """What the table of stages says that a stage reads."""
    config = load_config(str(run.path / "config.yaml"))
    found = {read: run.stage(read).manifest() for read in stage_table(config)[name].reads}
    return {read: manifest.sha256 if manifest else "" for read, manifest in found.items()}


def card(run: RunDir, name: str, metrics: dict[str, Any], **parts: Any) -> ModelCard:
    key = StageKey(
        section(run, name), {"seed": 7, "models": {"pretrained": "embedded@main"}, **parts}, inputs(run, name)
    )
    return ModelCard(model_card(run, name, key, metrics))


def test_a_card_says_what_the_model_is_made_of(run: RunDir) -> None:
    made = card(run, "sft", {"eval/loss": 1.23456, "train_examples": 3, "note": DANGER})
    assert (made.data.library_name, made.data.pipeline_tag) == ("transformers", "text-generation")
    assert made.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert made.text.lstrip().startswith("# mine: sft\n")
    assert "| starter:x | harmful | train | 2 |" in made.text
    assert "| starter:x | harmful | test | 1 |" in made.text
    assert "| starter:x | helpful | train | 2 |" in made.text
    constitution = load_constitution("default")
    (line,) = (line for line in made.text.splitlines() if line.startswith("| revise |"))
    assert f"{constitution.name}, version {constitution.version}, sha256 {constitution.sha256}" in line
    assert "| eval/loss | 1.235 |" in made.text
    (block,) = re.findall(r"```yaml\n(.*?)```", made.text, re.DOTALL)
    assert yaml.safe_load(block)["optim"]["lr"] == 1e-5
    assert "## Limits" in made.text
    assert "safety case" in made.text
    assert "not finished" not in made.text  # what is still to come says nothing about this model


def test_a_card_never_quotes_data(run: RunDir) -> None:
    for name in ("sft", "preference_model", "ppo"):
        text = card(run, name, {"note": DANGER, "eval/loss": 1.0}).content
        assert DANGER not in text
        assert "from_pretrained" in text


def test_a_preference_model_counts_labels_and_its_own_comparisons(run: RunDir) -> None:
    made = card(run, "preference_model", {"eval/accuracy": 0.7})
    assert made.data.pipeline_tag == "text-classification"
    assert "| starter:x | harmful | train | 2 |" in made.text
    assert "| starter:x |  | train | 1 |" in made.text  # one of its own
    assert [line.split(" ")[1] for line in made.text.splitlines() if line.startswith(("| sft", "| label", "| sample"))]
    assert made.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"  # where its beginning, the SL model, began
    assert "reward_mean" in made.text


def test_a_policy_that_a_feedback_model_rates_names_its_constitution(run: RunDir) -> None:
    config = {**CONFIG, "ppo": {"reward": "feedback_model", "critic_init": "policy"}}
    (run.path / "config.yaml").write_text(yaml.safe_dump(config), "utf-8")
    constitution = load_constitution("default")
    run.stage("ppo").path.mkdir(exist_ok=True)
    run.stage("ppo").constitution.write_text(to_yaml(constitution), "utf-8")  # as `execution` does when it begins
    (line,) = (
        line
        for line in card(run, "ppo", {}, principles=constitution.sha256).text.splitlines()
        if line.startswith("| ppo |")
    )
    assert f"| default, version {constitution.version}, sha256 {constitution.sha256} | 7 |" in line


def test_comparisons_of_others_are_not_called_a_models(run: RunDir) -> None:
    for name in ("preference_model", "ppo"):
        text = card(run, name, {}).content
        assert "No human labelled" not in text
        assert "are what their source says" in text
    lines = [line for line in card(run, "preference_model", {}).content.splitlines() if line.startswith("| starter")]
    assert any(line.startswith("| starter:x |  |") for line in lines)  # given comparisons: of no known kind


def test_another_stages_damage_does_not_cost_a_model(run: RunDir) -> None:
    (run.stage("label").manifest_path).write_text("{", "utf-8")
    assert "could not be read" in card(run, "sft", {}).content


def test_where_a_model_began(run: RunDir) -> None:
    assert card(run, "ppo", {}).data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"  # by way of the SL model
    for identity, hub_id in (("org/base-7b@main", "org/base-7b"), ("org/b@v1 plain", "org/b"), ("0f3a" * 16, None)):
        assert card(run, "sft", {}, models={"pretrained": identity}).data.base_model == hub_id
    other = {"preference_base": "org/other@main"}
    assert card(run, "preference_model", {}, models=other).data.base_model == "org/other"


def test_the_card_is_part_of_what_a_stage_commits(tmp_path: Path) -> None:
    out = RunDir(tmp_path).stage("sft", 7)
    out.model.mkdir(parents=True)
    out.card = lambda metrics: f"loss {metrics['eval/loss']}"
    manifest = out.commit(StageKey({}, {"seed": 7}, {}), {"eval/loss": 1.5})
    assert (out.model / "README.md").read_text("utf-8") == "loss 1.5"
    assert [entry["path"] for entry in manifest.outputs] == ["model/README.md"]
