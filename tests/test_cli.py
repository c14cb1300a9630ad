"""The command line: one readable message with the fix, the right exit code, and nothing harmed."""

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from cai_ray import doctor
from cai_ray.cli import main
from cai_ray.config_files import load_config

HUMAN = ("preference_model.data=[starter:helpful_comparisons]", "preference_model.init=pretrained")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # shipped configs go by name from any folder


def test_help_has_two_examples_everywhere() -> None:
    names = ("run", "plan", "config show", "constitution import", "constitution check", "export")
    for words in (name.split() for name in (*names, "report", "chat", "critique", "doctor")):
        text = call(*words, "--help").output
        assert text.split("Examples:")[1].count("cai-ray ") >= 2, words
    assert "neighbour's wifi" in call("critique", "--help").output
    assert "邻居" in call("critique", "--help").output


def test_config_show_prints_the_resolved_configuration() -> None:
    output = call("config", "show", "tiny", "ppo.kl_coef=0.25").output
    assert "  # Weight of the KL penalty to the reference.\n  kl_coef: 0.25\n" in output
    assert "gae_lambda: 0.95" in output
    assert yaml.safe_load(output) == load_config("tiny", ("ppo.kl_coef=0.25",)).model_dump(mode="json")


def test_a_run_for_gpus_is_refused_before_it_downloads_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "local_gpus", list)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    result = call("run", "7b_8xgpu")
    assert result.exit_code == 2
    assert "cluster.device is gpu, and this machine has none" in result.output


def test_plan_lists_the_stages() -> None:
    result = call("plan", "tiny")
    assert result.exit_code == 0, result.output
    assert "  sft rank: weights" in result.output  # the memory's arithmetic
    for stage in ("prompts", "revise", "sft", "sample_pairs", "label", "preference_model", "ppo", "evaluate", "report"):
        assert stage in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "tiny", "ppo.kl_coeff=1"], "did you mean 'kl_coef'"),
        (["run", "no_such_config"], "neither a file nor one of"),
        (["run", "tiny", "prompts.harmful=[gone.jsonl]"], "no data at 'gone.jsonl'"),
        (["run", "tiny", "models.helpful=/no/such/model"], "/no/such/model"),
        (["run", "tiny", "constitution.critique=gone.yaml"], "gone.yaml"),
        (["run", "tiny", "constitution.critique.only=[no-such-tag]"], "no-such-tag"),
        (["run", "tiny", "constitution.critique.only=[]"], "select at least one"),
        (["run", "tiny", "--only", "no_such_stage"], "stages are prompts"),
        (["run", "tiny", "cluster.kv_cache_gib=100000"], "GiB"),
        (["run", "tiny", "--reuse", "nowhere"], "nowhere is no run directory"),
        (["run", "tiny", *HUMAN, "--from", "label"], "label is left out: nothing reads it"),
        (["run", "tiny", *HUMAN, "--only", "label"], "label is left out"),
        (["run", "tiny", "--only", "label", "--from", "label"], "--only and --from are given both"),
        (["report", "nowhere"], "nowhere is no run directory"),
        (["chat", "/no/such/model"], "/no/such/model"),
        (["plan", "tiny", "revise.rounds=zero"], "revise.rounds"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_input_gives_one_message_and_exit_code_2(arguments: list[str], words: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert words in result.output
    assert "Traceback" not in result.output
    assert "continue with" not in result.output  # the same command would fail again
    assert not list(Path("runs").rglob("manifest.json"))


def test_an_empty_constitution_is_refused() -> None:
    Path("empty.yaml").write_text("name: empty\nversion: 1\nprinciples: []\n", "utf-8")
    result = call("run", "tiny", "constitution.critique=empty.yaml")
    assert result.exit_code == 2
    assert "principle" in result.output


def test_the_published_constitution_is_imported_and_checked(test_data: Path) -> None:
    from cai_ray.constitution import import_published, load_constitution

    result = call("constitution", "import", str(test_data / "cai_paper"), "new/published.yaml")
    assert result.exit_code == 0, result.output
    sha = import_published(test_data / "cai_paper").sha256
    assert load_constitution("new/published.yaml").sha256 == sha
    assert "16 critique pairs, 16 questions; few-shots: 5 critique, 5 feedback, 6 chain of thought" in result.output
    assert sha in result.output
    written = Path("new/published.yaml").read_bytes()
    refused = call("constitution", "import", str(test_data / "cai_paper"), "new/published.yaml")
    assert (refused.exit_code, Path("new/published.yaml").read_bytes()) == (2, written)
    assert "--force" in refused.output
    Path("new/published.yaml").write_text("old", "utf-8")
    assert call("constitution", "import", str(test_data / "cai_paper"), "new/published.yaml", "--force").exit_code == 0
    assert Path("new/published.yaml").read_bytes() == written
    checked = call("constitution", "check", "new/published.yaml")
    assert checked.exit_code == 0, checked.output
    assert "harmful15" in checked.output
    assert "error" not in checked.output


def test_checking_a_constitution_names_everything_and_shows_it() -> None:
    clean = call("constitution", "check", "default")
    assert clean.exit_code == 0, clean.output
    assert "self-harm" in clean.output
    assert "critique pair + question" in clean.output
    Path("mine.yaml").write_text(
        "name: mine\nversion: 1\nprinciples:\n"
        "  - {id: a, tags: ['[red]x'], weight: 2.5, preference_question: 'Which is worse? Options:', inverted: true}\n"
        "  - {id: a, preference_question: 'Which is more toxic? Options:'}\n"
        "  - {id: b, preference_question: 'Which is better?'}\n",
        "utf-8",
    )
    result = call("constitution", "check", "mine.yaml")
    assert result.exit_code == 2
    assert result.output.count("error: ") == 3
    assert "[red]x" in result.output
    assert "question, inverted" in result.output
    assert "mine 1 (en): 0 critique pairs, 3 questions" in result.output
    assert call("constitution", "check", "gone.yaml").exit_code == 2
    assert call("constitution", "import", "gone", "x.yaml").exit_code == 2


def test_the_next_commands_repeat_what_was_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cai_ray.console.run_pipeline", lambda *_: None)
    Path("R/z").mkdir(parents=True)
    assert call("run", "tiny", "run.dir=R", "label.gold={path: x y}", "--name", "z").exit_code == 0
    said = call("run", "tiny", "run.dir=R", "label.gold={path: x y}", "--name", "z").output
    again = "cai-ray run tiny run.dir=R 'label.gold={path: x y}' ppo.kl_coef=0.1 --name z-b --reuse R/z"
    assert again in said.replace("\n", " ")


def test_a_failed_stage_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from cai_ray.errors import StageFailed

    def fail(*_: object) -> None:
        raise StageFailed("sft stopped")

    monkeypatch.setattr("cai_ray.console.run_and_summarize", fail)
    for words, kept in ((["--rebuild", "--name", "a", "b"], True), (["--only", "sft", "--rebuild"], False)):
        monkeypatch.setattr("sys.argv", ["cai-ray", "run", "my config", *words])
        result = call("run", "tiny")
        assert result.exit_code == 3
        assert "error: sft stopped" in result.output
        assert "cai-ray run 'my config' --" in result.output
        assert ("--rebuild" in result.output) is kept  # with a stage it would be redone once more


@pytest.mark.parametrize("name", ["7", "2025-06-01", "1e5", "on"])
def test_a_run_may_be_named_by_a_number_or_a_date(name: str) -> None:
    assert f"runs/{name}," in call("plan", "tiny", "--name", name).output


def test_a_full_disk_is_found_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 2**20, 2**20))
    result = call("run", "tiny")
    assert result.exit_code == 2
    assert "GiB free" in result.output
    assert "run.dir" in result.output


@pytest.mark.parametrize(("arguments", "limit_s"), [("--help", 0.5), ("constitution check default", 2.0)])
def test_light_commands_are_quick(arguments: str, limit_s: float) -> None:
    import resource
    import subprocess
    import sys

    times, command = [], [sys.executable, "-m", "cai_ray.cli", *arguments.split()]
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True, timeout=120, cwd=Path(__file__).parent.parent)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)  # not its wait for a core
    assert min(times) < limit_s
