"""Executes a run: Ray's start and end, the engines that stages share, and each stage's inputs."""

import fcntl
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from cai_ray.artifacts import Manifest, RunDir, StageDir, StageKey, write_atomic
from cai_ray.cluster import start_ray
from cai_ray.config import Config, Principles, to_yaml
from cai_ray.errors import CaiError, ConfigError, ResourceError, StageFailed
from cai_ray.pipeline import (
    NAMES,
    STAGE_MODELS,
    Stage,
    constitution_of,
    downstream,
    evaluated,
    feedback_model,
    model_spec,
    needed,
    plan,
    preference_init,
    refuse_change,
    stage_key,
    stage_of_path,
    started_key,
)
from cai_ray.progress import Reporter, quiet_libraries
from cai_ray.resources import check_here, context_tokens
from cai_ray.tracking import StageTracker

MIN_FREE_GIB = 2.0
GENERATING = ("revise", "sample_pairs", "label", "ppo", "evaluate")


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    only: str | None = None
    start: str | None = None
    rebuild: bool = False
    reuse: Path | None = None


def run_dir(config: Config) -> RunDir:
    """The directory of this run."""
    return RunDir((Path(config.run.dir).expanduser() / config.run.name).absolute())


def run_pipeline(config: Config, request: Request, reporter: Reporter) -> RunDir:
    """Runs every stage that is not done.

    Raises:
        ConfigError: a change would discard work, or a stage to start from lacks what it reads.
        StageFailed: a stage stopped; what it finished is kept.
    """
    run = run_dir(config)
    for name in (request.only, request.start):
        if name and name not in NAMES:
            raise ConfigError(f"no stage {name!r}", f"stages are {', '.join(NAMES)}")
    check_disk(run.path)
    run.path.mkdir(parents=True, exist_ok=True)
    with _locked(run):
        _settle_changes(config, request, run)
        _take_over(config, request, run, reporter)
        chosen = [s for s in needed(config) if request.only in (None, s.name)]
        if request.start:
            chosen = chosen[[s.name for s in chosen].index(request.start) :]
        preflight(config, [s for s in chosen if run.stage(s.name).manifest() is None])
        write_atomic(run.path / "config.yaml", to_yaml(config))
        with Execution(config, run, reporter) as execution:
            for number, stage in enumerate(chosen, 1):
                execution.execute(stage, f"[{number}/{len(chosen)}]")
    return run


def preflight(config: Config, stages: list[Stage]) -> None:
    """Finds out before anything starts what would stop these stages: models, principles, data, resources.

    Raises:
        ConfigError, DataError, ResourceError: what is missing, and how to mend it.
    """
    from cai_ray.models import resolve_model
    from cai_ray.sources import check_source

    for stage in stages:
        if stage.principles:
            principles = constitution_of(getattr(config.constitution, stage.principles))
            _ = principles.for_critique() if stage.principles == "critique" else principles.for_feedback()
        for source in stage.files(config):
            check_source(source)
        for name in stage.models(config):
            spec = None if name in STAGE_MODELS else model_spec(config, name)
            if spec and stage_of_path(spec.path) is None:
                resolve_model(spec.path, spec.revision)
    check_here(config)


def check_disk(path: Path) -> None:
    """Refuses to begin on a disk that is nearly full.

    Raises:
        ResourceError: less than 2 GiB are free where the run will write.
    """
    here = path.absolute()
    while not here.exists():
        here = here.parent
    free = shutil.disk_usage(here).free / 2**30
    if free < MIN_FREE_GIB:
        raise ResourceError(
            f"{here} has {free:.1f} GiB free, a run needs at least {MIN_FREE_GIB:.0f} GiB",
            "free some space, or put the run elsewhere with run.dir=FOLDER",
        )


@contextmanager
def _locked(run: RunDir) -> Iterator[None]:
    with (run.path / ".lock").open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process works on {run.path}", "wait for it, stop it, or give this run another --name"
            ) from None
        yield


def _settle_changes(config: Config, request: Request, run: RunDir) -> None:
    """Discards what --rebuild says; refuses a change that would discard work unasked."""
    first = request.start or request.only
    if request.rebuild and first:
        for name in downstream(config, first):
            run.discard(name)
    changed = [s for s in plan(config, run) if s.action == "changed"]
    if changed and not request.rebuild:
        raise refuse_change(changed[0], run)
    for step in changed:
        for name in downstream(config, step.stage.name):
            run.discard(name)


def _take_over(config: Config, request: Request, run: RunDir, reporter: Reporter) -> None:
    """Takes over, by reference, every stage of --reuse whose key is equal."""
    if request.reuse is None:
        return
    other = RunDir(request.reuse.absolute())
    if not other.path.is_dir():
        raise ConfigError(f"--reuse {request.reuse}: no such run directory")
    for stage in needed(config):
        key, theirs = stage_key(config, stage, run), other.stage(stage.name)
        if key is None or run.stage(stage.name).manifest() or stage.name == "report":
            continue
        manifest = theirs.manifest()
        if manifest and manifest.key == key.key:
            run.take_over(stage.name, theirs)
            reporter.say(f"{stage.name}: taken over from {other.path}")


def _readable(error: BaseException, stage: str, out: StageDir) -> BaseException:
    """What a person can act on: our own errors as they are, Ray's and the file system's as the stage's failure."""
    from ray.exceptions import RayError

    if isinstance(error, CaiError) or not isinstance(error, RayError | OSError):
        return error
    cause = str(error).strip().splitlines()
    full = any("No space left on device" in line or "Disk quota exceeded" in line for line in cause)
    fix = "free some space" if full else f"see {out.path.parent / 'logs'} and {out.logs}"
    what = "the disk is full" if full else f"{type(error).__name__}: {cause[-1] if cause else ''}"
    return StageFailed(f"{stage} stopped: {what}", f"{fix}; the same command continues")


class Execution:
    """A run in progress: Ray, the engines, and each stage's inputs."""

    def __init__(self, config: Config, run: RunDir, reporter: Reporter):
        self.config, self.run, self.reporter = config, run, reporter
        self._started_ray = False

    def __enter__(self) -> "Execution":
        return self

    def __exit__(self, *exc: object) -> None:
        if "pool" in self.__dict__:
            self.pool.close()
        if self._started_ray:
            import ray

            ray.shutdown()

    # ---- Ray and the engines ------------------------------------------------------------------------------------

    @cached_property
    def device(self) -> str:
        """`cpu` or `gpu`; starts or joins Ray."""
        import ray

        wanted = self.config.cluster.device
        quiet_libraries()
        start_ray(self.config)
        self._started_ray = True
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        if wanted == "gpu" and not has_gpus:
            raise ResourceError(
                "cluster.device is gpu, but Ray sees no GPU", "use cluster.device=cpu, or join a cluster that has GPUs"
            )
        return wanted if wanted != "auto" else ("gpu" if has_gpus else "cpu")

    @cached_property
    def pool(self) -> Any:
        """The engines, which outlive stages."""
        from cai_ray.generation.pool import EnginePool

        logs = self.run.path / "logs"
        logs.mkdir(exist_ok=True)
        return EnginePool(self.config.cluster, self.device, logs)

    def execute(self, stage: Stage, number: str) -> Manifest:
        """Runs one stage unless it is done.

        Raises:
            ConfigError: a stage that it reads is unfinished.
            StageFailed: it stopped.
        """
        config, out = self.config, self.run.stage(stage.name, self.config.run.seed)
        key = stage_key(config, stage, self.run)
        if key is None:
            missing = [n for n in stage.reads(config) if self.run.stage(n).manifest() is None]
            raise ConfigError(
                f"{stage.name} reads {', '.join(missing)}, which is unfinished", "run without --only or --from"
            )
        done = out.manifest()
        if done:
            self.reporter.say(f"{number} {stage.name}: done before, skipped")
            return done
        again = " (continues)" if started_key(out) else ""
        self.reporter.say(f"{number} {stage.name}{again}", style="bold")
        out.path.mkdir(parents=True, exist_ok=True)
        write_atomic(
            out.path / "key.json", json.dumps({"parts": key.parts, "inputs": key.inputs}, indent=1, default=str)
        )
        start, tracker = time.monotonic(), StageTracker(config, out, self.run.path)
        out.on_metrics = tracker.log
        out.on_warning = lambda text: self.reporter.say(f"    {text}", style="bold red")
        try:
            function = getattr(import_module(f"cai_ray.stages.{stage.name}"), stage.name)
            manifest: Manifest = function(getattr(config, stage.name, None), self._inputs(stage.name, key), out)
        except BaseException as e:
            tracker.finish(None)
            raise _readable(e, stage.name, out) from e
        tracker.finish(manifest)
        shutil.rmtree(out.path / "checkpoints", ignore_errors=True)  # resume state of a finished stage: only weight
        shown = [f"{k} {v:.4g}" for k, v in manifest.metrics.items() if isinstance(v, int | float)]
        self.reporter.say(f"    {stage.name} took {time.monotonic() - start:.0f} s: {', '.join(shown[:8])}")
        return manifest

    def _map_settings(self, what: str) -> Any:
        from cai_ray.generation.data_plane import MapSettings

        cluster = self.config.cluster
        return MapSettings(
            engines=(cluster.engines, cluster.max_engines or cluster.engines),
            joining=self.pool.joining,
            rows_per_block=cluster.rows_per_block,
            max_bad_fraction=self.config.run.max_bad_fraction,
            timeout_s=cluster.step_timeout_s,
            progress=lambda: self.reporter.bar(what, "rows"),
        )

    def _model(self, name: str) -> Path:
        """The folder of a model: a stage's output, or what a key of `models` names."""
        if name in STAGE_MODELS:
            return self.run.stage(name).model
        from cai_ray.models import resolve_model

        spec = model_spec(self.config, name)
        stage = stage_of_path(spec.path)
        return stage.model if stage else resolve_model(spec.path, spec.revision)

    def _setup(self, name: str, format: str | None = None) -> Any:
        from cai_ray.stages.shared import EngineSetup

        spec = None if name in STAGE_MODELS else model_spec(self.config, name)
        return EngineSetup(
            pool=self.pool,
            model=self._model(name),
            format=format or (spec.format if spec else "auto"),
            dtype=(spec or self.config.models.helpful).dtype,
            run_tokens=max(context_tokens(self.config, s) for s in GENERATING),
        )

    def _generate(self, key: StageKey, what: str, rows: str, setup: Any, principles: Principles | None = None) -> Any:
        """What a generating stage reads."""
        from cai_ray.stages.shared import GenerateInputs

        constitution = constitution_of(principles) if principles else None
        return GenerateInputs(key, self.run.stage(rows).data, setup, self._map_settings(what), constitution)

    def _train(self, key: StageKey, what: str, rows: str | None, model: str) -> Any:
        """What a training stage reads; engines leave the GPUs that it is about to take."""
        from cai_ray.stages.shared import TrainInputs

        if self.device == "gpu":
            self.pool.release()
        return TrainInputs(
            key=key,
            rows=(self.run.stage(rows).data,) if rows else (),
            model=self._model(model),
            format="auto" if model in STAGE_MODELS else model_spec(self.config, model).format,
            max_bad_fraction=self.config.run.max_bad_fraction,
            cluster=self.config.cluster,
            device=self.device,
            progress=lambda: self.reporter.bar(what, "epochs"),
        )

    def _inputs(self, stage: str, key: StageKey) -> Any:
        """What a stage's function is given besides its section of the configuration."""
        config = self.config
        module = import_module(f"cai_ray.stages.{stage}")
        match stage:
            case "prompts":
                _ = self.device  # Ray must run
                writers = {g.model: self._setup(g.model) for g in config.prompts.generate}
                return module.PromptsInputs(key, self._map_settings(stage), writers)
            case "revise":
                return self._generate(key, stage, "prompts", self._setup("helpful"), config.constitution.critique)
            case "sft":
                return self._train(key, stage, "revise", config.sft.init)
            case "sample_pairs":
                return self._generate(key, stage, "prompts", self._setup(config.sample_pairs.model))
            case "label":
                setup = self._setup(feedback_model(config), "chat" if config.label.format == "chat" else None)
                return self._generate(key, stage, "sample_pairs", setup, config.constitution.feedback)
            case "preference_model":
                labels = any(s.path == "label" for s in config.preference_model.data)
                return self._train(key, stage, "label" if labels else None, preference_init(config))
            case "ppo":
                return module.PPOInputs(
                    key=key,
                    prompts=self.run.stage("prompts").data,
                    setup=self._setup(config.ppo.init),
                    reward=self._model(config.ppo.reward),
                    cluster=config.cluster,
                    device=self.device,
                    progress=lambda: self.reporter.bar(stage, "steps"),
                )
            case "evaluate":
                return module.EvaluateInputs(
                    key=key,
                    prompts=self.run.stage("prompts").data,
                    models={name: self._setup(name) for name in evaluated(config)},
                    reward=self._model(config.ppo.reward),
                    settings=self._map_settings(stage),
                    threads=config.preference_model.sharding.cpus_per_rank,
                    gpu=self.device == "gpu",
                )
        return module.ReportInputs(key, self.run)
