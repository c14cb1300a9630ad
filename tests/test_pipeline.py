"""Planning: what is done, what has changed, what a change would cost, what may be taken over."""

import importlib
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cai_ray.artifacts import RunDir, StageDir, StageKey, git_state, write_atomic
from cai_ray.config import Config
from cai_ray.config_files import load_config
from cai_ray.errors import CaiError, ConfigError, DataError, ResourceError
from cai_ray.execution import Execution, Request, _doomed, _look, _take_over, preflight, run_pipeline
from cai_ray.pipeline import (
    GENERATING,
    NAMES,
    downstream,
    model_folder,
    model_identity,
    model_spec,
    needed,
    plan,
    stage_key,
    stage_of_path,
    stage_table,
)
from cai_ray.progress import Reporter
from cai_ray.resources import context_tokens


def finish(config: Config, run: RunDir, *names: str) -> None:
    """Commits stages as a run would, with an output that depends on the stage's key."""
    run.path.mkdir(parents=True, exist_ok=True)
    (run.path / "config.yaml").touch()
    for stage in needed(config):
        if stage.name in names:
            out = run.stage(stage.name, config.run.seed)
            key = stage_key(config, stage, run)
            assert key is not None
            out.data.mkdir(parents=True, exist_ok=True)
            write_atomic(out.path / "key.json", json.dumps({"parts": key.parts, "inputs": key.inputs}))
            (out.data / "part.txt").write_text(key.key, "utf-8")
            out.commit(key, {"rows": 1})


def actions(config: Config, run: RunDir) -> dict[str, str]:
    return {s.stage.name: s.action for s in plan(config, run)}


def settle(config: Config, request: Request, run: RunDir) -> None:
    for name in _doomed(config, request, run):
        run.discard(name)


ALL = NAMES


def test_nine_stages_in_the_order_of_the_paper() -> None:
    assert " ".join(ALL) == "prompts revise sft sample_pairs label preference_model ppo evaluate report"
    assert tuple(s.name for s in needed(load_config("tiny"))) == ALL


def test_a_stage_that_nothing_reads_is_left_out() -> None:
    config = load_config(
        "tiny", ("preference_model.data=[starter:helpful_comparisons]", "preference_model.init=pretrained")
    )
    assert {*ALL} - {s.name for s in needed(config)} == {"sample_pairs", "label"}
    config = load_config("tiny", ("ppo.reward=/some/model", "ppo.init=helpful"))
    assert [s.name for s in needed(config)] == ["prompts", "ppo", "evaluate", "report"]


def test_finished_stages_are_done_and_the_next_one_runs(tmp_path: Path) -> None:
    config, run = load_config("tiny"), RunDir(tmp_path)
    assert actions(config, run)["prompts"] == "run"
    finish(config, run, "prompts", "revise")
    assert actions(config, run) == dict.fromkeys(ALL[:2], "done") | {
        "sft": "run",
        "sample_pairs": "wait",
    } | dict.fromkeys(ALL[4:], "wait")
    finish(config, run, *ALL)
    assert set(actions(config, run).values()) == {"done"}


def test_a_change_marks_its_stage_and_names_the_key(tmp_path: Path) -> None:
    config, run = load_config("tiny"), RunDir(tmp_path)
    finish(config, run, *ALL)
    changed = load_config("tiny", ("ppo.kl_coef=0.5",))
    steps = {s.stage.name: s for s in plan(changed, run)}
    assert [n for n, s in steps.items() if s.action == "done"] == list(ALL[:6])
    assert steps["ppo"].action == "changed"
    assert steps["ppo"].differs == ("parts.config.kl_coef: 0.01 -> 0.5",)
    with pytest.raises(ConfigError, match="kl_coef") as caught:
        _doomed(changed, Request(), run)
    assert all(way in str(caught.value) for way in ("--rebuild", "--name", "--reuse"))
    assert run.stage("ppo").manifest() is not None  # refused means untouched


def test_operational_changes_keep_everything(tmp_path: Path) -> None:
    config, run = load_config("tiny"), RunDir(tmp_path)
    finish(config, run, *ALL)
    moved = load_config("tiny", ("cluster.engines=4", "ppo.actor.sharding.ranks=2", "sft.sharding.zero_stage=3"))
    assert set(actions(moved, run).values()) == {"done"}


def test_rebuild_discards_the_change_and_all_that_follows(tmp_path: Path) -> None:
    config, run = load_config("tiny"), RunDir(tmp_path)
    finish(config, run, *ALL)
    changed = load_config("tiny", ("label.few_shots=1",))
    settle(changed, Request(rebuild=True), run)
    assert downstream(changed, "label") == ["label", "preference_model", "ppo", "evaluate", "report"]
    assert [name for name in ALL if run.stage(name).manifest()] == list(ALL[:4])
    settle(changed, Request(start="sft", rebuild=True), run)
    assert [name for name in ALL if run.stage(name).manifest()] == list(ALL[:2])


def test_the_last_stage_is_discarded_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = load_config("tiny"), RunDir(tmp_path)
    finish(config, run, *ALL)
    gone: list[str] = []
    monkeypatch.setattr(RunDir, "discard", lambda self, name: gone.append(name))
    settle(load_config("tiny", ("label.few_shots=1",)), Request(rebuild=True), run)
    assert gone == [*reversed(ALL[4:])]


@pytest.mark.parametrize("finished", [True, False])
def test_a_stage_whose_inputs_come_out_anew_is_neither_done_nor_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    human = load_config("tiny", ("preference_model.data=[starter:helpful_comparisons]",))
    both, run = load_config("tiny"), RunDir(tmp_path)
    finish(human, run, *ALL)
    out = run.stage("preference_model")
    out.checkpoints.mkdir()
    (out.checkpoints / "old").write_text("", "utf-8")
    if not finished:
        out.manifest_path.unlink()
    assert actions(both, run)["preference_model"] == "wait"  # for sample_pairs and label
    finish(both, run, "sample_pairs", "label")
    stage = stage_table(both)["preference_model"]
    began = (out.path / "key.json").read_text("utf-8")

    def train(config: Any, inputs: Any, out: StageDir) -> Any:
        key = stage_key(both, stage, run)
        assert key is not None
        assert not (out.checkpoints / "old").exists()
        out._started -= 100
        out.model.mkdir(exist_ok=True)
        return out.commit(key, {"rows": 2})

    def inputs(self: Any, *_: Any) -> None:  # what needs Ray tells how many GPUs there are
        self._devices = 4

    monkeypatch.setattr(Execution, "_inputs", inputs)
    monkeypatch.setitem(sys.modules, "cai_ray.stages.preference_model", SimpleNamespace(preference_model=train))
    with ExitStack() as stack:
        with pytest.raises(ConfigError, match=r"inputs\.label"):
            Execution(both, run, Reporter(), stack, (), False).execute(stage, "")
        assert (out.path / "key.json").read_text("utf-8") == began
        done = Execution(both, run, Reporter(), stack, (), True).execute(stage, "")
    assert done.metrics["rows"] == 2
    assert done.device_s == pytest.approx(4 * done.wall_s, abs=0.01)
    assert done.wall_s > 100
    assert run.stage("ppo").manifest() is None


@pytest.mark.parametrize("broken", ["reuse", "model"])
def test_a_rebuild_that_cannot_run_discards_nothing(tmp_path: Path, broken: str) -> None:
    config = load_config("tiny", (f"run.dir={tmp_path}",))
    run = RunDir(tmp_path / "tiny")
    finish(config, run, *ALL)
    if broken == "model":
        config = load_config("tiny", (f"run.dir={tmp_path}", "models.pretrained=/no/such/model"))
    reuse = tmp_path / "none" if broken == "reuse" else None
    with pytest.raises(CaiError, match=r"is no run directory|/no/such/model"):
        run_pipeline(config, Request(start="sft", rebuild=True, reuse=reuse), Reporter())
    assert all(run.stage(name).manifest() for name in ALL)


@pytest.mark.parametrize("how", [{"start": "sft"}, {"only": "label"}])
def test_a_rebuild_that_would_need_an_earlier_one_discards_nothing(tmp_path: Path, how: dict[str, str]) -> None:
    run = RunDir(tmp_path / "tiny")
    finish(load_config("tiny", (f"run.dir={tmp_path}",)), run, *ALL)
    changed = load_config("tiny", (f"run.dir={tmp_path}", "revise.rounds=3"))
    with pytest.raises(ConfigError, match="revise") as caught:
        run_pipeline(changed, Request(rebuild=True, **how), Reporter())  # type: ignore[arg-type]
    assert "--from revise --rebuild" in str(caught.value)
    assert all(run.stage(name).manifest() for name in ALL)


def test_a_damaged_stage_can_be_rebuilt(tmp_path: Path) -> None:
    config, run = load_config("tiny"), RunDir(tmp_path)
    finish(config, run, *ALL)
    run.stage("label").manifest_path.write_text("{", "utf-8")
    assert _doomed(config, Request(start="label", rebuild=True), run) == [*reversed(ALL[4:])]


def test_a_begun_stage_counts_as_work(tmp_path: Path) -> None:
    config, run = load_config("tiny"), RunDir(tmp_path)
    finish(config, run, "prompts")
    out = run.stage("revise")
    finish(config, run, "revise")
    out.manifest_path.unlink()
    assert actions(config, run)["revise"] == "continue"
    with pytest.raises(ConfigError, match="revise"):
        _doomed(load_config("tiny", ("revise.rounds=3",)), Request(), run)


def test_reuse_takes_over_equal_stages_by_reference(tmp_path: Path) -> None:
    config, old, new = load_config("tiny"), RunDir(tmp_path / "a"), RunDir(tmp_path / "b")
    finish(config, old, *ALL)
    changed = load_config("tiny", ("ppo.kl_coef=0.1",))
    _take_over(changed, Request(reuse=old.path), new, Reporter())
    assert actions(changed, new) == dict.fromkeys(ALL[:6], "done") | {
        "ppo": "run",
        "evaluate": "wait",
        "report": "wait",
    }
    assert new.stage("sft").path == old.path / "sft"
    new.discard("sft")  # discards the reference, never the other run's work
    assert old.stage("sft").manifest() is not None
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="is no run directory"):
            _take_over(changed, Request(reuse=folder), new, Reporter())
    old.stage("revise").manifest_path.unlink()  # it is redone there: what is written, its own run writes
    with pytest.raises(DataError, match="unfinished"):
        new.stage("revise")


def test_reuse_says_what_differs_where_it_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = RunDir(tmp_path / "a"), RunDir(tmp_path / "b")
    finish(load_config("tiny"), old, *ALL)
    _take_over(load_config("tiny", ("revise.rounds=3",)), Request(reuse=old.path), new, Reporter())
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if "taken over" in line] == [
        f"prompts: taken over from {old.path}",
        f"revise: not taken over from {old.path}, where it differs:",
    ]
    assert "config.rounds: 2 -> 3" in said


@pytest.mark.parametrize("change", ["sft.init=sft", "sft.init=ppo", "sample_pairs.model=preference_model"])
def test_a_stage_that_reads_itself_or_a_later_one_is_refused(change: str) -> None:
    with pytest.raises(ConfigError, match=r"(sft|sample_pairs) reads \w+, which is not made before it"):
        needed(load_config("tiny", (change,)))


def test_a_run_directory_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", "utf-8")
    with pytest.raises(ConfigError, match="cannot be written: Not a directory"):
        run_pipeline(load_config("tiny", (f"run.dir={tmp_path}/file",)), Request(), Reporter())


def test_what_is_rebuilt_is_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("tiny", (f"run.dir={tmp_path}",))
    run, other = RunDir(tmp_path / "tiny"), RunDir(tmp_path / "other")
    for each in (run, other):
        finish(config, each, *ALL)
    found = []
    monkeypatch.setattr("cai_ray.execution.preflight", lambda *_: None)
    monkeypatch.setattr(Execution, "execute", lambda self, stage, _: found.append(run.stage(stage.name).manifest()))
    run_pipeline(config, Request(start="label", rebuild=True, reuse=other.path), Reporter())
    assert found == [None] * len(ALL[4:])


def test_inputs_that_change_change_the_key(tmp_path: Path) -> None:
    data = tmp_path / "p.jsonl"
    data.write_text('{"prompt": "one"}\n', "utf-8")
    config, run = load_config("tiny", (f"prompts.harmful=[{data}]",)), RunDir(tmp_path / "run")
    finish(config, run, "prompts")
    assert actions(config, run)["prompts"] == "done"
    data.write_text('{"prompt": "two"}\n', "utf-8")
    assert actions(config, run)["prompts"] == "changed"


def test_the_prompts_depend_on_the_model_that_writes_some(tmp_path: Path) -> None:
    assert "models" not in written(load_config("tiny"), tmp_path)
    more = ("prompts.generate=[{kind: harmful, n: 2}, {kind: helpful, n: 1}]",)
    assert list(written(load_config("tiny", more), tmp_path)["models"]) == ["pretrained"]
    other = written(load_config("tiny", (*more, "models.pretrained=embedded")), tmp_path)
    assert other["models"] != written(load_config("tiny", more), tmp_path)["models"]


def written(config: Config, path: Path) -> dict[str, Any]:
    key = stage_key(config, stage_table(config)["prompts"], RunDir(path))
    assert key is not None
    return key.parts


def test_ppo_reads_its_rewards_and_what_it_mixes_in() -> None:
    def stage(name: str, *overrides: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        found = stage_table(load_config("tiny", overrides))[name]
        return found.data, found.models

    assert stage("ppo") == (("prompts",), ("sft", "preference_model"))
    assert stage("ppo", "ppo.ptx_coef=0.1")[0] == ("prompts", "revise")
    several = "ppo.reward=[run:other/preference_model, /models/pm]"
    assert stage("ppo", several, "ppo.heldout_reward=/models/third")[1] == (
        *("sft", "run:other/preference_model", "/models/pm", "/models/third"),
    )
    assert stage("evaluate", several)[1][-1] == "run:other/preference_model"
    alone = ("ppo.reward=my.module:score", "ppo.critic_init=policy")
    assert stage("ppo", *alone)[1] == ("sft",)
    assert stage("evaluate", *alone)[1][-1] == "preference_model"
    judged = ("ppo.reward=feedback_model", "ppo.critic_init=policy")
    assert stage("ppo", *judged)[1] == ("sft", "pretrained")
    config = load_config("tiny", judged)
    assert stage_table(config)["ppo"].principles is config.constitution.feedback
    assert stage_table(load_config("tiny"))["ppo"].principles is None


def test_a_stage_is_given_what_its_line_of_the_table_names(tmp_path: Path) -> None:
    config = load_config(
        "tiny",
        ("ppo={reward: [preference_model, feedback_model], heldout_reward: tiny, ptx_coef: 0.1}", "label.format=chat"),
    )
    run = RunDir(tmp_path)
    with ExitStack() as stack:
        execution = Execution(config, run, Reporter(), stack, (), False)
        execution.__dict__ |= {"device": "cpu", "pool": SimpleNamespace(joining=tuple)}  # else they start Ray
        given = {n: execution._inputs(s, StageKey({}, {}, {})) for n, s in stage_table(config).items()}
    assert given.pop("report") == StageKey({}, {}, {})
    assert {name: [folder.parent.name for folder in inputs.rows] for name, inputs in given.items()} == {
        **{"prompts": [], "revise": ["prompts"], "sft": ["revise"], "sample_pairs": ["prompts"]},
        **{"label": ["sample_pairs"], "preference_model": ["label"], "ppo": ["prompts", "revise"]},
        "evaluate": ["prompts"],
    }
    assert {name: [*inputs.models] for name, inputs in given.items()} == {
        **{"prompts": [], "revise": ["helpful"], "sft": ["pretrained"], "sample_pairs": ["sft"]},
        **{"label": ["pretrained"], "preference_model": ["sft"]},
        "ppo": ["sft", "preference_model", "pretrained", "tiny", "feedback_model"],
        "evaluate": ["helpful", "sft", "ppo", "preference_model"],
    }
    assert given["ppo"].models["feedback_model"] is given["ppo"].models["pretrained"]
    assert given["evaluate"].setup is given["evaluate"].models["helpful"]
    assert given["sample_pairs"].setup.model == run.path / "sft" / "model"
    assert {n for n, inputs in given.items() if inputs.constitution} == {"revise", "label", "ppo"}
    # The run's longest sequence: an engine that holds it serves every stage.
    assert {m.run_tokens for inputs in given.values() for m in inputs.models.values()} == {longest(config)}


def longest(config: Config) -> int:
    return max(context_tokens(config, stage) for stage in ("prompts", *GENERATING))


def test_models_by_key_run_and_path(tmp_path: Path) -> None:
    config, run = load_config("tiny"), RunDir(tmp_path)
    assert model_spec(config, "helpful").path == "tiny"
    assert model_spec(config, "some/model").path == "some/model"
    with pytest.raises(ConfigError, match=r"models\.feedback"):
        model_spec(config, "feedback")
    with pytest.raises(ConfigError, match="no finished stage"):
        stage_of_path(f"run:{tmp_path}/sft")
    finish(config, run, *ALL)
    spec = model_spec(config, f"run:{tmp_path}/sft")
    manifest = run.stage("sft").manifest()
    assert manifest is not None
    assert model_identity(spec) == manifest.sha256
    with pytest.raises(DataError, match=f"{tmp_path}/label/model.* is neither a folder"):
        model_folder(model_spec(config, f"run:{tmp_path}/label"))  # before anything starts


def test_a_model_s_format_counts_wherever_it_lies(tmp_path: Path) -> None:
    from cai_ray.config import ModelSpec

    finish(load_config("tiny"), RunDir(tmp_path / "run"), "prompts", "revise", "sft")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}", "utf-8")
    (tmp_path / "folder" / "model.safetensors").write_bytes(b"")
    for path in ("some/model", str(tmp_path / "folder"), f"run:{tmp_path}/run/sft"):
        auto, plain = (model_identity(ModelSpec(path=path, format=f)) for f in ("auto", "plain"))
        assert (plain, auto.endswith("plain")) == (f"{auto} plain", False)


def test_a_folder_that_is_called_as_a_shipped_model_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = model_identity(model_spec(load_config("tiny"), "helpful"))
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_identity(model_spec(load_config("tiny"), "helpful")) == key


def test_a_joined_cluster_that_is_too_small_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = load_config("tiny", ("sft.sharding.ranks=8", "sft.sharding.cpus_per_rank=5")), RunDir(tmp_path)
    monkeypatch.setattr("cai_ray.execution.start_ray", lambda address: None)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 32.0})
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    machines: dict[str, Any] = {"node-1": ([], 0.5, []), "node-2": ([], 64.0, [])}
    monkeypatch.setattr("cai_ray.execution.on_every_machine", lambda *_, **__: machines)
    with ExitStack() as stack:
        with pytest.raises(ResourceError, match="sft needs 41 CPUs, there are 32"):
            _ = Execution(config, run, Reporter(), stack, ["sft"], False).device
        assert Execution(config, run, Reporter(), stack, ["label"], False).device == "cpu"
        machines["node-2"] = ([], 0.5, [])
        with pytest.raises(ResourceError, match=r"label needs .* GiB of memory, there are 1"):
            _ = Execution(config, run, Reporter(), stack, ["label"], False).device
        asked: list[Path] = []

        def look(function: Any, paths: list[Path], **_: Any) -> dict[str, Any]:
            asked[:] = paths
            return {"node-1": ([], 64.0, []), "node-2": ([paths[place]], 64.0, [])}

        monkeypatch.setattr("cai_ray.execution.on_every_machine", look)
        model = model_folder(model_spec(config, "pretrained"))
        for place in (0, 1):
            with pytest.raises(ResourceError, match=f"node-2 cannot see {(tmp_path, model)[place]}"):
                _ = Execution(config, run, Reporter(), stack, ["label", "sft"], False).device
        assert asked[1:] == [model]  # both read it, and it is looked for once
    assert not list(tmp_path.glob(".seen-*"))


def test_a_machine_says_what_it_does_not_see(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    unseen, memory, _ = _look([tmp_path / "there", tmp_path / "gone"])
    assert (unseen, memory > 0) == ([tmp_path / "gone"], True)


def test_a_function_that_scores_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    chosen = ("ppo.reward=my_scores:score", "ppo.critic_init=policy")
    config, run = load_config("tiny", chosen), RunDir(tmp_path / "run")
    with pytest.raises(ConfigError, match="no module my_scores"):
        preflight(config, [stage_table(config)["ppo"]])
    (tmp_path / "my_scores.py").write_text("raise SystemExit  # nobody runs it to plan", "utf-8")
    importlib.invalidate_caches()
    finish(config, run, *ALL[: ALL.index("ppo") + 1])
    assert actions(config, run)["ppo"] == "done"
    (tmp_path / "my_scores.py").write_text("def score(prompts, responses): return [0.0] * len(prompts)", "utf-8")
    assert actions(config, run)["ppo"] == "changed"


def test_what_a_killed_run_left_beside_a_finished_stage_goes_at_the_next_start(tmp_path: Path) -> None:
    config, run, other = load_config("tiny"), RunDir(tmp_path / "run"), RunDir(tmp_path / "other")
    for of in (run, other):
        finish(config, of, "prompts")
        (of.stage("prompts").checkpoints / "step-1").mkdir(parents=True)
    stage = stage_table(config)["prompts"]
    with ExitStack() as stack:
        Execution(config, run, Reporter(), stack, (), False).execute(stage, "")
        assert not run.stage("prompts").checkpoints.exists()
        run.discard("prompts")
        run.take_over("prompts", other.stage("prompts"))
        Execution(config, run, Reporter(), stack, (), False).execute(stage, "")
    assert other.stage("prompts").checkpoints.is_dir()  # another run's, which may be at work


def test_a_model_that_watches_scores_where_no_reward_is_a_model() -> None:
    overrides = ("ppo.reward=feedback_model", "ppo.critic_init=policy", "ppo.heldout_reward=tiny")
    stages = [stage.name for stage in needed(load_config("tiny", overrides))]
    assert stages == ["prompts", "revise", "sft", "ppo", "evaluate", "report"]


def test_a_machine_without_git_keeps_its_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_state() == {}


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"schema_version": 1}'])
def test_a_damaged_manifest_says_what_to_do(tmp_path: Path, content: str) -> None:
    out = StageDir(tmp_path / "sft")
    out.path.mkdir()
    out.manifest_path.write_text("{", "utf-8")
    with pytest.raises(DataError, match="damaged"):
        out.manifest()
