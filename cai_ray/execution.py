"""Executes a run: Ray's start and end, the engines that stages share, and each stage's inputs."""

import json
import math
import os
import shutil
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout

from cai_ray import doctor, pipeline
from cai_ray.artifacts import Manifest, RunDir, StageDir, StageKey, existing_run, write_atomic
from cai_ray.cluster import on_every_machine, start_ray
from cai_ray.config import FEEDBACK, Config
from cai_ray.config_files import to_yaml
from cai_ray.constitution import to_yaml as constitution_yaml
from cai_ray.errors import CaiError, ConfigError, ResourceError, StageFailed
from cai_ray.progress import Reporter, quiet_libraries
from cai_ray.resources import check, check_for_gpus, check_here, context_tokens
from cai_ray.tracking import tracked

MIN_FREE_GIB = 2.0


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


def run_pipeline(config: Config, request: Request, reporter: Reporter) -> None:
    """Runs every stage that is not done.

    Raises:
        ConfigError: a change would discard work, or a stage to start from lacks what it reads.
        StageFailed: a stage stopped; what it finished is kept.
    """
    run, chosen = run_dir(config), _chosen(config, request)
    check_disk(run.path)
    with ExitStack() as stack:
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(run.path / ".lock", blocking=False))
        except Timeout:
            fix = "wait for it, stop it, or give this run another --name"
            raise ConfigError(f"another process works on {run.path}", fix) from None
        except OSError as e:
            raise ConfigError(f"{run.path} cannot be written: {e.strerror}", "set run.dir to another folder") from None
        doomed = _doomed(config, request, run)
        if early := [n for n in pipeline.NAMES[: pipeline.NAMES.index(chosen[0].name)] if n in doomed]:
            raise ConfigError(
                f"{', '.join(early)} changed too, and {chosen[0].name} needs what they will make",
                f"--rebuild alone, or --from {early[0]} --rebuild",
            )
        _take_over(config, request, run, reporter, doomed)
        waiting = [s for s in chosen if s.name in doomed or run.stage(s.name).manifest() is None]
        preflight(config, waiting)
        for name in doomed:  # only now: what would stop the run must not cost finished work
            run.discard(name)
        write_atomic(run.path / "config.yaml", to_yaml(config))
        execution = Execution(config, run, reporter, stack, [s.name for s in waiting], request.rebuild)
        for number, stage in enumerate(chosen, 1):
            execution.execute(stage, f"[{number}/{len(chosen)}]")


def preflight(config: Config, stages: list[pipeline.Stage]) -> None:
    """Finds out before anything starts what would stop these stages: models, principles, data, resources.

    Raises:
        ConfigError, DataError, ResourceError: what is missing, and how to mend it.
    """
    from cai_ray.sources import check_source

    if stages:
        check_for_gpus(config, [s.name for s in stages])
    for stage in stages:
        if stage.principles:
            principles = pipeline.constitution_of(stage.principles)
            _ = principles.for_critique() if stage.name == "revise" else principles.for_feedback()
        for source in stage.files:
            check_source(source)
        for name in stage.functions:
            pipeline.function_identity(name)
        for name in stage.models:
            if name not in pipeline.STAGE_MODELS:
                pipeline.model_folder(pipeline.model_spec(config, name))
    check_here(config, [s.name for s in stages])


def _chosen(config: Config, request: Request) -> list[pipeline.Stage]:
    """The stages that --only and --from leave, in order."""
    stages, name = list(pipeline.needed(config)), request.only or request.start
    names = [s.name for s in stages]
    if request.only and request.start:
        raise ConfigError("--only and --from are given both", "give one of them")
    if name and name not in names:
        what = f"{name} is left out: nothing reads it" if name in pipeline.NAMES else f"no stage {name!r}"
        raise ConfigError(what, f"stages are {', '.join(names)}")
    first = names.index(name) if name else 0
    return stages[first : first + 1] if request.only else stages[first:]


def check_disk(path: Path) -> None:
    """Refuses to begin on a disk that is nearly full.

    Raises:
        ResourceError: less than 2 GiB are free where the run will write.
    """
    here = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(here).free / 2**30
    if free < MIN_FREE_GIB:
        raise ResourceError(
            f"{here} has {free:.1f} GiB free, a run needs at least {MIN_FREE_GIB:.0f} GiB",
            "free some space, or put the run elsewhere with run.dir=FOLDER",
        )


def _doomed(config: Config, request: Request, run: RunDir) -> list[str]:
    """What --rebuild discards, the last stage first, so that no finished one is left without what it was made of.

    Raises:
        ConfigError: a change would discard work unasked.
    """
    first = request.start or request.only
    doomed = set(pipeline.downstream(config, first)) if request.rebuild and first else set()
    changed = [s for s in pipeline.plan(config, run, doomed) if s.action == "changed"]
    if changed and not request.rebuild:
        raise pipeline.refuse_change(changed[0], run)
    doomed.update(*(pipeline.downstream(config, step.stage.name) for step in changed))
    return [name for name in reversed(pipeline.NAMES) if name in doomed]


def _take_over(config: Config, request: Request, run: RunDir, reporter: Reporter, doomed: Collection[str] = ()) -> None:
    """Takes over, by reference, every stage of --reuse whose key is equal, but for those that are to be discarded."""
    if request.reuse is None:
        return
    other = existing_run(request.reuse.absolute())
    for stage in (s for s in pipeline.needed(config) if s.name not in doomed):
        key, theirs = pipeline.stage_key(config, stage, run), other.stage(stage.name)
        if key is None or run.stage(stage.name).manifest() or stage.name == "report":
            continue
        if (manifest := theirs.manifest()) is None:
            continue
        if manifest.key == key.key:
            run.take_over(stage.name, theirs)
            reporter.say(f"{stage.name}: taken over from {other.path}")
        else:
            differs = "".join(f"\n    {line}" for line in pipeline.differences_of(theirs, key)[:4])
            reporter.say(f"{stage.name}: not taken over from {other.path}, where it differs:{differs}")


def _readable(error: BaseException, stage: str, out: StageDir) -> BaseException:
    """What a person can act on: our own errors as they are, Ray's and the file system's as the stage's failure."""
    from ray.data.exceptions import ExecutionTimeoutError
    from ray.exceptions import RayError

    if isinstance(error, CaiError) or not isinstance(error, RayError | ExecutionTimeoutError | OSError):
        return error
    cause = str(error).strip().splitlines()
    full = any("No space left on device" in line or "Disk quota exceeded" in line for line in cause)
    fix = "free some space" if full else f"see {out.path.parent / 'logs'} and {out.logs}"
    what = "the disk is full" if full else f"{type(error).__name__}: {cause[-1] if cause else ''}"
    return StageFailed(f"{stage} stopped: {what}", f"{fix}; the same command continues")


def _look(paths: list[Path]) -> tuple[list[Path], float, list[float]]:
    """On a machine of the cluster: those of `paths` that it does not see, its memory and its GPUs', GiB."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides GPUs from a task that asks for none
    unseen = [path for path in paths if not path.exists()]
    return unseen, doctor.host_memory_gib(), [gpu.gib for gpu in doctor.local_gpus()]


def _tidy(out: StageDir) -> None:
    """Removes what only weighs once a stage is finished: resume state, and what somebody who was killed half wrote."""
    for spent in [*out.path.rglob("checkpoints"), *out.path.rglob(".*/")]:
        shutil.rmtree(spent, ignore_errors=True)


class Execution:
    """A run in progress: Ray and the engines, which end with `stack`, and each stage's inputs."""

    def __init__(
        self, config: Config, run: RunDir, reporter: Reporter, stack: ExitStack, waiting: Collection[str], rebuild: bool
    ):
        self.config, self.run, self.reporter, self._stack = config, run, reporter, stack
        self._devices = 1  # GPUs of the cluster, once it is known
        self._waiting, self._rebuild = waiting, rebuild  # stages that are to run; whether changed ones are discarded

    # ---- Ray and the engines ------------------------------------------------------------------------------------

    @cached_property
    def device(self) -> str:
        """`cpu` or `gpu`; starts or joins Ray."""
        import ray.data

        quiet_libraries()
        start_ray(self.config.cluster.joined)
        ray.data.DataContext.get_current().execution_no_progress_timeout_s = self.config.cluster.step_timeout_s
        self._stack.callback(ray.shutdown)
        there = ray.cluster_resources()
        self._devices = int(there.get("GPU", 0)) or 1
        device = self.config.cluster.device
        device = ("gpu" if there.get("GPU", 0) > 0 else "cpu") if device == "auto" else device
        # `preflight` knew this machine only, not the cluster that was joined.
        host, gpu = self._machines() if self.config.cluster.joined else (math.inf, math.inf)
        check(self.config, device, host, there.get("CPU", 0), there.get("GPU", 0), gpu, self._waiting)
        return device

    def _machines(self) -> tuple[float, float]:
        """Memory of all machines together, and the most that a GPU has, GiB.

        Raises:
            ResourceError: one does not see the run's directory or a model's folder.
        """
        token, config = self.run.path / f".seen-{uuid4().hex}", self.config
        names = {m for s in pipeline.needed(config) if s.name in self._waiting for m in s.models}
        specs = [pipeline.model_spec(config, m) for m in sorted(names - {*pipeline.STAGE_MODELS})]
        token.touch()
        try:
            paths = [token, *map(pipeline.model_folder, specs)]
            found = on_every_machine(_look, paths, timeout_s=config.cluster.start_timeout_s)
        finally:
            token.unlink()
        for name, (unseen, *_) in found.items():
            if unseen:
                what = self.run.path if unseen[0] == token else unseen[0]
                raise ResourceError(
                    f"{name} cannot see {what}",
                    "put runs (run.dir) and models (their folders, HF_HOME) on storage that all machines share",
                )
        gpus = [gib for _, _, own in found.values() for gib in own]
        return sum(memory for _, memory, _ in found.values()), max(gpus, default=math.inf)

    @cached_property
    def pool(self) -> Any:
        """The engines, which outlive stages."""
        from cai_ray.generation.pool import EnginePool

        pool = EnginePool(self.config.cluster, self.device, self.run.path / "logs")
        self._stack.callback(pool.release)
        return pool

    def execute(self, stage: pipeline.Stage, number: str) -> Manifest:
        """Runs one stage unless it is done.

        Raises:
            ConfigError: a stage that it reads is unfinished, or it was begun with other inputs.
            StageFailed: it stopped.
        """
        config, step = self.config, pipeline.next_step(self.config, stage, self.run)
        key = step.key
        if key is None:
            missing = [n for n in stage.reads if self.run.stage(n).manifest() is None]
            raise ConfigError(
                f"{stage.name} reads {', '.join(missing)}, which is unfinished", "run without --only or --from"
            )
        if step.differs:  # an earlier stage came out anew since this one was begun
            if not self._rebuild:
                raise pipeline.refuse_change(step, self.run)
            for name in reversed(pipeline.downstream(config, stage.name)):
                self.run.discard(name)
        out = self.run.stage(stage.name, config.run.seed)
        if done := out.manifest():
            self.reporter.say(f"{number} {stage.name}: done before, skipped")
            if out.path.parent == self.run.path:  # not another run's, from which it was taken over
                _tidy(out)
            return done
        again = " (continues)" if step.action == "continue" else ""
        self.reporter.say(f"{number} {stage.name}{again}", style="bold")
        out.path.mkdir(parents=True, exist_ok=True)
        write_atomic(out.path / "key.json", json.dumps(key.begun, indent=1, default=str))
        start = time.monotonic()
        out.on_warning = lambda text: self.reporter.say(f"    {text}", style="bold red")
        if stage.name in pipeline.STAGE_MODELS:
            from cai_ray.report.cards import model_card

            out.card = lambda metrics: model_card(self.run, stage.name, key, metrics)
        try:
            with tracked(config, out, self.run.path):
                function = getattr(import_module(f"cai_ray.stages.{stage.name}"), stage.name)
                inputs = self._inputs(stage, key)
                if stage.principles:  # rows name its principles, and its file may change
                    write_atomic(out.constitution, constitution_yaml(inputs.constitution))
                out.devices = self._devices
                manifest: Manifest = function(getattr(config, stage.name, None), inputs, out)
        except BaseException as e:
            raise _readable(e, stage.name, out) from e
        _tidy(out)
        shown = [f"{k} {v:.4g}" for k, v in manifest.metrics.items() if isinstance(v, int | float)]
        self.reporter.say(f"    {stage.name} took {time.monotonic() - start:.0f} s: {', '.join(shown[:8])}")
        return manifest

    def _inputs(self, stage: pipeline.Stage, key: StageKey) -> Any:
        """What a stage's function is given besides its section: what its line of the table names."""
        config, name = self.config, stage.name
        if name == "report":
            return key
        device = self.device  # Ray must run
        from cai_ray.generation.data_plane import MapSettings
        from cai_ray.stages.shared import EngineSetup, StageInputs

        longest = max(context_tokens(config, sampling) for sampling in ("prompts", *pipeline.GENERATING))
        models = {}
        for model in stage.models:
            spec = pipeline.model_spec(config, model)
            folder = self.run.stage(model).model if model in pipeline.STAGE_MODELS else pipeline.model_folder(spec)
            models[model] = EngineSetup(self.pool, folder, spec.format, spec.dtype, run_tokens=longest)
        if name == "ppo" and FEEDBACK in config.ppo.reward:  # as `ppo.reward` calls it
            models[FEEDBACK] = models[pipeline.feedback_model(config)]
        unit = {"sft": "epochs", "preference_model": "epochs", "ppo": "steps"}.get(name, "rows")
        return StageInputs(
            key=key,
            rows=tuple(self.run.stage(read).data for read in stage.data),
            models=models,
            settings=MapSettings(
                joining=self.pool.joining,
                rows_per_block=config.cluster.rows_per_block,
                max_bad_fraction=config.run.max_bad_fraction,
                timeout_s=config.cluster.step_timeout_s,
                progress=lambda: self.reporter.bar(name, unit),
            ),
            cluster=config.cluster,
            device=device,
            threads=config.preference_model.sharding.cpus_per_rank,
            constitution=pipeline.constitution_of(stage.principles) if stage.principles else None,
        )
