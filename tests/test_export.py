"""What `cai-ray export` writes, read back with `datasets` and by TRL's own trainers."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner

from cai_ray import export as export_module
from cai_ray.artifacts import RunDir, StageKey
from cai_ray.cli import main
from cai_ray.constitution import load_constitution, to_yaml
from cai_ray.errors import ConfigError, DataError
from cai_ray.export import export_run
from cai_ray.records import LABELED_PAIR, REVISION, Row, to_table

DANGER = "a text that no card may quote"
PRINCIPLES = load_constitution("default").for_critique()
CONFIG = {"models": {"helpful": "tiny", "pretrained": "tiny"}}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": f"{text} {DANGER}"} for i, text in enumerate(texts)]


def head(name: str, kind: str = "harmful", split: str = "train", messages: Any = None) -> Row:
    row = {
        "id": name,
        "messages": messages or turns(f"ask {name}"),
        "kind": kind,
        "source": "starter:x",
        "split": split,
    }
    return {**row, "seed": 7, "flags": []}


def rounds(*revisions: str) -> list[Row]:
    return [
        {"principle_id": PRINCIPLES[i].id, "critique": f"critique {i} {DANGER}", "revision": text}
        for i, text in enumerate(revisions)
    ]


REVISIONS = [
    {**head("h1"), "initial_response": "first", "rounds": rounds("one", "two")},
    {
        **head("h2", split="test", messages=turns("a", "b", "c")),
        "initial_response": "first",
        "rounds": rounds("1", "2"),
    },
    {**head("h3"), "initial_response": "first", "rounds": rounds(" ", "two")},  # an empty revision is not learned
    {**head("g1", kind="helpful"), "initial_response": "help", "rounds": []},
    {**head("g2", kind="helpful"), "initial_response": "", "rounds": []},
]
VOTES = [{"principle_id": name, "prob": 0.2} for name in ("b", "a", "b")]
PAIRS = [
    {**head("p1"), "response_a": "left", "response_b": "right", "label_prob": 0.2, "votes": VOTES},
    {**head("p2"), "response_a": "left", "response_b": "right", "label_prob": 0.5, "votes": []},
    {**head("p3", split="test"), "response_a": "left", "response_b": "right", "label_prob": 0.9, "votes": VOTES[:1]},
]


def finish_revise(run: RunDir, *files: list[Row]) -> None:
    default = load_constitution("default")
    commit(run, "revise", list(files), REVISION, models={"helpful": "tiny@main"}, principles=default.sha256)
    run.stage("revise").constitution.write_text(to_yaml(default), "utf-8")


def commit(
    run: RunDir,
    stage: str,
    files: list[list[Row]],
    schema: Any,
    metrics: Row | None = None,
    reads: str | None = None,
    **parts: Any,
) -> None:
    out = run.stage(stage, 7)
    read = run.stage(reads).manifest() if reads else None
    out.data.mkdir(parents=True)
    for number, rows in enumerate(files):
        pq.write_table(to_table(rows, schema), out.data / f"part-{number:05}.parquet")
    out.commit(StageKey({}, {"seed": 7, **parts}, {reads: read.sha256} if reads and read else {}), metrics or {})


@pytest.fixture(autouse=True)
def _caches(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Revisions, labels and what lies between them are finished; no stage trains anything here."""
    run = RunDir(tmp_path / "run")
    finish_revise(run, REVISIONS[:2], REVISIONS[2:])
    metrics = {"rows_out": 3, "mean_entropy": 0.6743, "note": DANGER}
    commit(run, "sft", [], None, reads="revise")
    commit(run, "sample_pairs", [], None, reads="sft")
    models = {"pretrained": "tiny@main"}
    commit(run, "label", [PAIRS], LABELED_PAIR, metrics, "sample_pairs", models=models, principles="gone")
    (run.path / "config.yaml").write_text(yaml.safe_dump(CONFIG), "utf-8")
    return run


def load(folder: Path) -> dict[str, list[Row]]:
    import datasets

    return {name: split.to_list() for name, split in datasets.load_dataset(str(folder)).items()}


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text} for text in texts]


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("all", {"h1-1": "one", "h1-2": "two", "h2-1": "1", "h2-2": "2", "h3-2": "two", "g1": "help"}),
        ("last", {"h1-2": "two", "h2-2": "2", "h3-2": "two", "g1": "help"}),
        ([1], {"h1-1": "one", "h2-1": "1", "g1": "help"}),
    ],
)
def test_sft_holds_what_the_sl_model_learns(run: RunDir, tmp_path: Path, which: Any, expected: dict[str, str]) -> None:
    (run.path / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "sft": {"rounds": which}}), "utf-8")
    export_run(run, tmp_path / "out")
    found = load(tmp_path / "out" / "sft")
    assert {row["id"] for row in found["test"]} == {name for name in expected if name.startswith("h2")}
    prompts = {row["id"]: row["messages"] for row in REVISIONS}
    for row in [*found["train"], *found["test"]]:
        assert row["messages"] == [*prompts[row["id"].split("-")[0]], *said(expected.pop(row["id"]))]
        assert row["kind"] == ("helpful" if row["id"] == "g1" else "harmful")
        assert row["source"] == "starter:x"
    assert not expected


def test_preferences_are_turned_so_that_the_chosen_one_is_likelier(run: RunDir, tmp_path: Path) -> None:
    export_run(run, tmp_path / "out")
    found = load(tmp_path / "out" / "preferences")
    rows = {row["id"]: row for row in [*found["train"], *found["test"]]}
    assert [row["id"] for row in found["test"]] == ["p3"]
    got = {name: (row["chosen"], row["rejected"], row["label_prob"]) for name, row in rows.items()}
    assert got == {
        "p1": (said("right"), said("left"), 0.8),
        "p2": (said("left"), said("right"), 0.5),
        "p3": (said("left"), said("right"), 0.9),
    }
    assert [rows[name]["principle_ids"] for name in ("p1", "p2", "p3")] == [["b", "a"], [], ["b"]]
    assert all(rows[row["id"]]["prompt"] == row["messages"] for row in PAIRS)


def test_equal_responses_are_no_preference(run: RunDir, tmp_path: Path) -> None:
    equal = {**head("p4"), "response_a": "left", "response_b": " left", "label_prob": 0.5, "votes": VOTES}
    pq.write_table(to_table([equal], LABELED_PAIR), run.stage("label").data / "part-00001.parquet")
    export_run(run, tmp_path / "out")
    found = load(tmp_path / "out" / "preferences")
    assert {row["id"] for row in [*found["train"], *found["test"]]} == {"p1", "p2", "p3"}


def test_cai_has_a_row_a_round_with_the_principles_own_words(run: RunDir, tmp_path: Path) -> None:
    export_run(run, tmp_path / "out")
    found = load(tmp_path / "out" / "cai")
    assert {split: [row["id"] for row in rows] for split, rows in found.items()} == {
        "train": ["h1-1", "h1-2", "h3-1", "h3-2"],
        "test": ["h2-1", "h2-2"],
    }
    first, second = found["train"][:2]
    assert (first["init_prompt"], first["init_response"]) == (f"ask h1 {DANGER}", "first")
    assert (second["init_response"], second["revision_response"], second["round"]) == ("one", "two", 2)
    assert second["principle_id"] == PRINCIPLES[1].id
    assert second["critic_prompt"] == PRINCIPLES[1].critique_request
    assert second["revision_prompt"] == PRINCIPLES[1].revision_request
    assert second["critic_response"] == f"critique 1 {DANGER}"
    transcript = f"\n\nHuman: a {DANGER}\n\nAssistant: b {DANGER}\n\nHuman: c {DANGER}"
    assert found["test"][0]["init_prompt"] == transcript


def test_cards_say_where_the_rows_come_from_and_quote_nothing(run: RunDir, tmp_path: Path) -> None:
    export_run(run, tmp_path / "out")
    cards = {name: (tmp_path / "out" / name / "README.md").read_text("utf-8") for name in ("sft", "preferences", "cai")}
    for name, card in cards.items():
        assert DANGER not in card
        header = yaml.safe_load(card.split("---\n")[1])
        files = header["configs"][0]["data_files"]
        assert [f["split"] for f in files] == ["train", "test"]
        assert all((tmp_path / "out" / name / f["path"]).is_file() for f in files)
        assert "No human labelled anything here" in card
        assert "proves the mechanics" in card  # the report's caution about the tiny model
        assert "tiny@main" in card
    assert (
        f"| revise | helpful: tiny@main | default, version 1, sha256 {load_constitution('default').sha256} | 7 |"
        in cards["sft"]
    )
    assert (
        "| revise | helpful: tiny@main | default, version 1" in cards["preferences"]
    )  # its SL model learned from them
    assert "| train | helpful | 1 |\n| train | harmful | 3 |\n| test | harmful | 2 |" in cards["sft"]
    assert "Rows of `revise` that became none: 1, because" in cards["sft"]
    assert "Rows of `revise` that became none: 2, because" in cards["cai"]
    assert "| label | pretrained: tiny@main | sha256 gone |" in cards["preferences"]
    assert "| mean_entropy | 0.6743 |" in cards["preferences"]
    assert "near chance" in cards["preferences"]


def test_what_is_not_finished_is_left_out_and_said(run: RunDir, tmp_path: Path) -> None:
    (run.path / "label" / "manifest.json").unlink()
    lines = export_run(run, tmp_path / "out")
    assert lines == [
        "sft: 4 train, 2 test from revise",
        "cai: 4 train, 2 test from revise",
        "preferences: left out, the stage label is not finished",
    ]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["cai", "sft"]
    (run.path / "revise" / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="nothing to export yet"):
        export_run(run, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_split_without_rows_is_not_announced(run: RunDir, tmp_path: Path) -> None:
    run.discard("label")
    commit(run, "label", [PAIRS[:2], []], LABELED_PAIR)
    export_run(run, tmp_path / "out")
    assert set(load(tmp_path / "out" / "preferences")) == {"train"}
    run.discard("label")
    commit(run, "label", [], LABELED_PAIR)
    lines = export_run(run, tmp_path / "unlabeled")
    assert lines[-1] == (
        "preferences: left out, no row of label became one: they have no label, or their responses are equal"
    )
    run.discard("revise")
    finish_revise(run, REVISIONS[3:4])
    lines = export_run(run, tmp_path / "helpful")
    assert "cai: left out, no row of revise became one: helpful prompts have no rounds" in lines
    assert [path.name for path in (tmp_path / "helpful").iterdir()] == ["sft"]


def test_rounds_are_left_out_when_their_constitution_has_changed(run: RunDir, tmp_path: Path) -> None:
    kept = run.stage("revise").constitution
    for out, change in (("changed", lambda: kept.write_text(to_yaml(load_constitution("zh")))), ("lost", kept.unlink)):
        change()
        lines = export_run(run, tmp_path / out)
        assert f"cai: left out, {kept} is not the constitution that the stage drew from" in lines[-1]
        assert "version" not in (tmp_path / out / "sft" / "README.md").read_text("utf-8")


def test_a_run_keeps_its_constitution_whatever_becomes_of_the_file(run: RunDir, tmp_path: Path) -> None:
    settings = {**CONFIG, "constitution": {"critique": str(tmp_path / "gone.yaml")}}
    (run.path / "config.yaml").write_text(yaml.safe_dump(settings), "utf-8")
    assert "cai: 4 train, 2 test from revise" in export_run(run, tmp_path / "out")


def test_a_stage_taken_over_by_reference_is_exported(run: RunDir, tmp_path: Path) -> None:
    other = RunDir(tmp_path / "other")
    other.take_over("revise", run.stage("revise"))
    (other.path / "config.yaml").write_text(yaml.safe_dump(CONFIG), "utf-8")
    export_run(other, tmp_path / "out")
    export_run(run, tmp_path / "out2")
    for name in ("sft", "cai"):
        assert load(tmp_path / "out" / name) == load(tmp_path / "out2" / name)


def test_rows_pass_in_batches(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run.discard("label")
    many = [{**PAIRS[0], "id": f"p{n}", "split": "test" if n % 10 == 0 else "train"} for n in range(1000)]
    commit(run, "label", [many[:300], many[300:]], LABELED_PAIR)
    held: list[int] = []

    def counted(rows: list[Row], schema: Any) -> Any:
        held.append(len(rows))
        return to_table(rows, schema)

    monkeypatch.setattr(export_module, "_BATCH", 50)
    monkeypatch.setattr(export_module, "to_table", counted)
    export_run(run, tmp_path / "out")
    assert max(held) <= 50
    found = load(tmp_path / "out" / "preferences")
    assert {split: len(rows) for split, rows in found.items()} == {"train": 900, "test": 100}
    assert Counter(row["id"] for rows in found.values() for row in rows) == Counter(row["id"] for row in many)


def test_a_target_in_use_is_refused_and_nothing_outside_it_is_touched(run: RunDir, tmp_path: Path) -> None:
    before, out, empty, link = snapshot(run.path), tmp_path / "out", tmp_path / "empty", tmp_path / "link"
    for folder in (out, empty):
        folder.mkdir()
    (out / "mine.txt").write_text("mine")
    link.symlink_to(tmp_path / "nowhere")
    for target in (out, out / "mine.txt", run.path, empty, link):
        with pytest.raises(ConfigError, match="a new folder"):
            export_run(run, target)
    assert snapshot(out) == {"mine.txt": b"mine"}
    assert link.is_symlink()
    assert not any(empty.iterdir())
    export_run(run, empty / "new")
    assert {"sft", "preferences", "cai"} == {path.name for path in (empty / "new").iterdir()}
    assert snapshot(run.path) == before


def test_damaged_rows_are_one_message_and_leave_nothing_behind(run: RunDir, tmp_path: Path) -> None:
    next((run.path / "label" / "data").iterdir()).write_bytes(b"PAR1")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match="export again"):
        export_run(run, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_says_what_it_wrote(run: RunDir, tmp_path: Path) -> None:
    arguments = ["export", str(run.path), "--to", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"(sft|preferences|cai): \d train, \d test from \w+", result.output.splitlines()[0])
    again = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert again.exit_code == 2
    assert "a new folder" in again.output
    assert CliRunner().invoke(main, ["export", "nowhere", "--to", "x"]).exit_code == 2


@pytest.mark.parametrize("trainer", ["SFTTrainer", "RewardTrainer", "DPOTrainer"])
def test_trl_trains_on_it(run: RunDir, tmp_path: Path, trainer: str) -> None:
    import datasets
    import trl
    from transformers import AutoTokenizer

    from cai_ray.models import tiny_model

    export_run(run, tmp_path / "out")
    data = datasets.load_dataset(str(tmp_path / "out" / ("sft" if trainer == "SFTTrainer" else "preferences")))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    settings = getattr(trl, trainer.replace("Trainer", "Config"))(
        output_dir=str(tmp_path / "trained"),
        per_device_train_batch_size=2,
        max_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    made = getattr(trl, trainer)(
        model=str(tiny_model()),
        args=settings,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
    )
    texts = [tokenizer.decode(ids) for ids in next(iter(made.get_train_dataloader()))["input_ids"]]
    assert sum(DANGER in text for text in texts) == len(texts)
    assert made.train().global_step == 1
