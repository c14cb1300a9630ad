"""The table of stages: what each reads, and how a run plans, continues and executes them.

Planning imports neither torch nor ray; a stage's module is imported when the stage runs.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from cai_ray.artifacts import RunDir, StageDir, StageKey, canonical_sha256, differences, file_sha256
from cai_ray.config import FEEDBACK, FUNCTION, Config, ModelSpec, Principles, Source
from cai_ray.constitution import Constitution, load_constitution
from cai_ray.errors import ConfigError
from cai_ray.shipped import source_path
from cai_ray.sources import data_files

NAMES = ("prompts", "revise", "sft", "sample_pairs", "label", "preference_model", "ppo", "evaluate", "report")
GENERATING = ("revise", "sample_pairs", "label", "ppo", "evaluate")  # stages that sample from engines
STAGE_MODELS = ("sft", "preference_model", "ppo")  # stages that publish a model
SHIPPED_MODELS = ("embedded", "tiny")  # whatever folders are called so


@dataclass(frozen=True)
class Stage:
    """One line of the table; `stages/NAME.py` holds the function that runs it."""

    name: str
    data: tuple[str, ...] = ()  # stages whose rows it reads
    models: tuple[str, ...] = ()  # models it reads: keys of `models`, stages, or paths
    principles: Principles | None = None  # that it draws from
    files: tuple[Source, ...] = ()
    functions: tuple[str, ...] = ()  # of the user's, as module:function

    @property
    def reads(self) -> tuple[str, ...]:
        """Earlier stages that it needs, for rows or models."""
        return tuple(dict.fromkeys([*self.data, *(m for m in self.models if m in STAGE_MODELS)]))


def feedback_model(c: Config) -> str:
    """The key of the model that labels: the pretrained one unless another is named."""
    return "feedback" if c.models.feedback else "pretrained"


def stage_table(c: Config) -> dict[str, Stage]:
    """The table of stages, by name and in order: what each reads in a run of this configuration.

    The first model is the one that answers or learns, except for `prompts`, where each of them writes, and `evaluate`,
    where all answer but the last one, which scores.
    """
    writers = tuple(dict.fromkeys(g.model for g in c.prompts.generate))
    ppo, data, preference_init = c.ppo, c.preference_model.data, c.preference_model.init
    if preference_init == "auto":
        preference_init = "preference_base" if c.models.preference_base else "sft"
    judge = feedback_model(c) if FEEDBACK in ppo.reward else None
    rewards = [name for name in (*ppo.preference_models, judge, ppo.heldout_reward) if name]
    scorer, *_ = (*ppo.preference_models, ppo.heldout_reward or "preference_model")
    functions = tuple(name for name in ppo.reward if FUNCTION.fullmatch(name))
    judged = c.constitution.feedback if judge else None
    ptx = ("revise",) if ppo.ptx_coef else ()
    labels = ("label",) if any(s.path == "label" for s in data) else ()
    table = (
        Stage("prompts", (), writers, files=(*c.prompts.harmful, *c.prompts.helpful)),
        Stage("revise", ("prompts",), ("helpful",), c.constitution.critique),
        Stage("sft", ("revise",), (c.sft.init,)),
        Stage("sample_pairs", ("prompts",), (c.sample_pairs.model,)),
        Stage("label", ("sample_pairs",), (feedback_model(c),), c.constitution.feedback, (c.label.gold,)),
        Stage("preference_model", labels, (preference_init,), files=tuple(s for s in data if s.path != "label")),
        Stage("ppo", ("prompts", *ptx), (ppo.init, *rewards), judged, functions=functions),
        Stage("evaluate", ("prompts",), (*dict.fromkeys(["helpful", ppo.init, "ppo"]), scorer)),
        Stage("report", ("evaluate",)),
    )
    return {stage.name: stage for stage in table}


def needed(config: Config, last: str = "report") -> tuple[Stage, ...]:
    """The stages that have a part in the last one, itself included, in order; one that nothing reads is left out.

    Raises:
        ConfigError: a stage reads itself or a later one.
    """
    table, wanted = stage_table(config), {last}
    for stage in reversed(table.values()):
        if stage.name in wanted:
            if late := set(stage.reads) & set(NAMES[NAMES.index(stage.name) :]):
                what = f"{stage.name} reads {', '.join(late)}, which is not made before it"
                raise ConfigError(what, "name a model or an earlier stage")
            wanted |= set(stage.reads)
    return tuple(s for s in table.values() if s.name in wanted)


def model_spec(config: Config, name: str) -> ModelSpec:
    """What a model's name stands for: a key of `models`, else a stage, an id or a path.

    Raises:
        ConfigError: the key exists but is not set.
    """
    if name in type(config.models).model_fields:
        spec = getattr(config.models, name)
        if spec is None:
            raise ConfigError(
                f"models.{name} is not set, but a stage reads it", f"set models.{name} to an id or a path"
            )
        return spec
    return ModelSpec(path=name, dtype=config.models.helpful.dtype)


def stage_of_path(path: str) -> StageDir | None:
    """The stage directory behind `run:DIR/stage`; None for every other path.

    Raises:
        ConfigError: that stage is not finished.
    """
    if not path.startswith("run:"):
        return None
    folder = Path(path.removeprefix("run:")).expanduser()
    stage = RunDir(folder.parent).stage(folder.name)
    if stage.manifest() is None:
        raise ConfigError(
            f"{path}: no finished stage there", "give the run's directory and a stage that it has finished"
        )
    return stage


def model_folder(spec: ModelSpec) -> Path:
    """The folder of a model: what `models.resolve_model` finds, for `run:DIR/stage` in that stage's directory."""
    from cai_ray.models import resolve_model

    stage = stage_of_path(spec.path)
    return resolve_model(str(stage.model) if stage else spec.path, spec.revision)


def model_identity(spec: ModelSpec) -> str:
    """What enters a stage's key: a hash of local files, a run's manifest, or hub id and revision; and the format."""
    stage, folder = stage_of_path(spec.path), Path(spec.path).expanduser()
    if stage:
        manifest = stage.manifest()
        identity = manifest.sha256 if manifest else ""
    elif folder.is_dir() and spec.path not in SHIPPED_MODELS:
        from cai_ray.models.checkpoints import fingerprint

        identity = fingerprint(folder)
    else:
        identity = f"{spec.path}@{spec.revision or 'main'}"
    return identity if spec.format == "auto" else f"{identity} {spec.format}"


def constitution_of(principles: Principles) -> Constitution:
    """The constitution with only the chosen principles."""
    return load_constitution(principles.file).select(principles.only, principles.without)


def file_identity(source: Source) -> str:
    """What enters a stage's key for a data source: sizes and hashes of local files, else its name."""
    path = source_path(source.path)
    if path.is_file():
        return file_sha256(path)
    if path.is_dir():
        return canonical_sha256([[str(p.relative_to(path)), file_sha256(p)] for p in data_files(source.path)])
    return source.path


def function_identity(name: str) -> str:
    """What enters a stage's key for a function of the user's: a hash of its module's file.

    The module is not run, only the packages that it is in.

    Raises:
        ConfigError: there is no such module.
    """
    module = name.partition(":")[0]
    try:
        found = find_spec(module)
    except (ImportError, ValueError):  # of the package that it is in
        found = None
    if found is None:
        raise ConfigError(f"{name}: there is no module {module}", "put it on PYTHONPATH, here and on every node")
    return file_sha256(Path(found.origin)) if found.has_location and found.origin else name


def stage_key(config: Config, stage: Stage, run: RunDir) -> StageKey | None:
    """The stage's key, or None while a stage that it reads is unfinished."""
    inputs: dict[str, str] = {}
    for name in stage.reads:
        manifest = run.stage(name).manifest()
        if manifest is None:
            return None
        inputs[name] = manifest.sha256
    section = getattr(config, stage.name, None)  # the report has no section
    parts: dict[str, Any] = {"config": section.identity() if section else {}, "seed": config.run.seed}
    models = {m: model_identity(model_spec(config, m)) for m in stage.models if m not in STAGE_MODELS}
    if models:
        parts["models"] = models
    if stage.principles:
        parts["principles"] = constitution_of(stage.principles).sha256
    if stage.files:
        parts["files"] = {s.path: file_identity(s) for s in stage.files}
    if stage.functions:
        parts["functions"] = {name: function_identity(name) for name in stage.functions}
    return StageKey(config=section.model_dump(mode="json") if section else {}, parts=parts, inputs=inputs)


def differences_of(out: StageDir, key: StageKey) -> list[str]:
    """What a stage was begun with in `out`, other than `key`, a line each."""
    return differences(json.loads((out.path / "key.json").read_text("utf-8")), key.begun)


@dataclass(frozen=True)
class Step:
    """What a run will do about one stage."""

    stage: Stage
    action: Literal["done", "run", "continue", "changed", "wait"]  # wait: an earlier stage comes first
    differs: tuple[str, ...] = ()  # where the key is another than that with which the stage was begun
    key: StageKey | None = None  # None while it waits


def next_step(config: Config, stage: Stage, run: RunDir) -> Step:
    """What is to be done about a stage as its inputs are now."""
    key = stage_key(config, stage, run)
    if key is None:
        return Step(stage, "wait")
    out = run.stage(stage.name)
    if not (out.path / "key.json").is_file():
        return Step(stage, "run", key=key)
    if differs := differences_of(out, key):
        return Step(stage, "changed", tuple(differs), key)
    return Step(stage, "done" if out.manifest() else "continue", key=key)


def plan(config: Config, run: RunDir, doomed: Collection[str] = ()) -> list[Step]:
    """What is done, what is to run, and what has changed since it ran; `doomed` stages count as if they were gone."""
    steps: list[Step] = []
    stale: set[str] = set()
    for stage in needed(config):
        waits = stage.name in doomed or stale & set(stage.reads)  # what is doomed may be too damaged to be read
        steps.append(Step(stage, "wait") if waits else next_step(config, stage, run))
        if steps[-1].action != "done":
            stale.add(stage.name)
    return steps


def downstream(config: Config, first: str) -> list[str]:
    """`first` and every stage that reads it, directly or not, in order."""
    hit = [first]
    for stage in needed(config):
        if stage.name != first and set(stage.reads) & set(hit):
            hit.append(stage.name)
    return hit


def refuse_change(step: Step, run: RunDir) -> ConfigError:
    """The error for a change that would discard work, with the keys that differ and three ways on."""
    return ConfigError(
        f"{step.stage.name} in {run.path} was begun with another configuration or other inputs:\n"
        + "\n".join(f"    {d}" for d in step.differs[:12]),
        "choose one: --rebuild (redo it here and all that follows), --name NEW (a new run directory), "
        f"or --name NEW --reuse {run.path} (a new run that takes over every stage that is equal)",
    )
