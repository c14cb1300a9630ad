"""Starts a training run on Ray Train, watches its ranks, and brings back its metrics or its failure.

The driver imports neither torch nor DeepSpeed: Ray Train's own driver runs in a small task, which can be stopped whole
when a rank no longer answers; and `training.loop`, which needs both, is imported by ranks only.
"""

import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray.exceptions import RayError

from cai_ray.artifacts import Bar, StageDir, print_to
from cai_ray.config import PreferenceModelConfig, SftConfig
from cai_ray.errors import CaiError, StageFailed
from cai_ray.models.memory import KEEP_MEMORY, OUT_OF_MEMORY, RETURN_MEMORY
from cai_ray.models.shapes import find_shape, memory_sum, training_memory
from cai_ray.training.liveness import Watch, own_log, rank_log

Kind = Literal["sft", "preference_model"]
RECORD = "checkpoint_manager_snapshot.json"  # Ray Train's own
RUN_NAME = "train"  # of Ray Train's run in checkpoints/: the same for every attempt, so each finds the last one
MAX_FAILURES = 2  # restarts from the last checkpoint within one call
POLL_S = 0.5


@dataclass(frozen=True)
class Job:
    """All that one training run is told; it travels to every rank."""

    kind: Kind  # sft reads `Revision` rows, preference_model reads `LabeledPair` rows
    config: SftConfig | PreferenceModelConfig
    model: Path  # folder of the model to start from
    format: str  # of prompts: auto | plain | chat
    inputs: tuple[Path, ...]  # folders of parquet rows
    out: Path  # the stage's directory, seen by every rank
    seed: int
    device: str  # cpu | gpu
    max_bad_fraction: float  # more bad rows than this share fail the stage
    start_timeout_s: float
    step_timeout_s: float


def run_training(job: Job, out: StageDir, on_progress: Bar | None = None) -> dict[str, float]:
    """Trains, and leaves the model in `out.path / "model"`; the same call after a crash goes on at the last checkpoint.

    Metrics go to metrics.jsonl (step: optimizer steps before the line's own; held-out lines come before step 0 and
    after the last), the ranks' output to logs/, resume state to checkpoints/, which is of no use once the stage is
    committed.

    Args:
        job: what to train, from what, and how long to wait for it.
        out: the stage's directory, on a file system that every node mounts.
        on_progress: called with (epochs done, epochs in all, a few words).

    Returns:
        Counts, the last held-out metrics, and for a preference model `reward_mean` and `reward_std`.

    Raises:
        StageFailed: a rank did not answer in time, training diverged, or it failed more often than it is restarted.
        CaiError: rows, model or configuration cannot be used.
    """
    nodes = _nodes()
    try:
        return _run(job, out, on_progress)
    except StageFailed as error:
        if lost := sorted(nodes - _nodes()):
            raise StageFailed(f"{error.message}\n    nodes lost meanwhile: {', '.join(lost)}", error.fix) from error
        raise


def _nodes() -> set[str]:
    return {f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})" for node in ray.nodes() if node["Alive"]}


def _run(job: Job, out: StageDir, on_progress: Bar | None) -> dict[str, float]:
    watch = Watch([rank_log(out, r) for r in range(job.config.sharding.ranks)], job.start_timeout_s, job.step_timeout_s)
    follow = _Follow(out, job.config.epochs, on_progress)
    running = _fit.remote(job, MAX_FAILURES)
    try:
        while not ray.wait([running], timeout=POLL_S)[0]:
            follow()
            watch()
        outcome = ray.get(running)
    except RayError as error:
        raise _failed(error, job) from error
    finally:  # takes Ray Train's controller and the ranks with it; a task that is done crashes Ray
        if not ray.wait([running], timeout=0)[0]:
            ray.cancel(running, force=True)
    follow()
    if isinstance(outcome, CaiError):
        raise outcome
    return outcome


@ray.remote(num_cpus=0, max_retries=0, max_calls=1)
def _fit(job: Job, max_failures: int) -> Any:
    """Ray Train's driver, in a process of its own: what `train` returns, or a StageFailed."""
    print_to(job.out / "logs" / "trainer.log")
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(job.start_timeout_s)
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "1"  # also how long a checkpoint or the end may go unnoticed
    # A process less: preempted ranks are restarted all the same.
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2.api.config import LoggingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    class Trainer(TorchTrainer):
        """Without the process that would remove our placement group: Ray does so by itself when the controller ends."""

        def _create_default_callbacks(self):  # no annotations: Ray pickles this class with the names it uses only
            return [c for c in super()._create_default_callbacks() if not isinstance(c, PlacementGroupCleanerCallback)]

    record = job.out / "checkpoints" / RUN_NAME / RECORD
    try:
        json.loads(record.read_text("utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # Ray Train, cut off while it wrote it, could not read it again
        record.unlink(missing_ok=True)
    gpu, sharding = job.device == "gpu", job.config.sharding
    memory = {} if gpu else RETURN_MEMORY if sharding.zero_stage == 3 else KEEP_MEMORY
    own = {"CPU": sharding.cpus_per_rank} | ({"GPU": 1} if gpu else {})  # of a rank: the CPUs are its threads too
    trainer = Trainer(
        _rank,
        train_loop_config={"job": job},
        # Longer than the driver waits: it names the rank, torch would only say that another one did not come.
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=int(1.5 * job.step_timeout_s)),
        scaling_config=ScalingConfig(num_workers=sharding.ranks, use_gpu=gpu, resources_per_worker=own),
        run_config=RunConfig(
            name=RUN_NAME,
            storage_path=str(job.out / "checkpoints"),
            checkpoint_config=CheckpointConfig(
                num_to_keep=job.config.keep_checkpoints,
                checkpoint_score_attribute="eval/loss" if job.config.keep_checkpoints > 1 else None,
                checkpoint_score_order="min",
            ),
            # Ray Train's own `print` would write each line twice into a rank's log.
            worker_runtime_env={"env_vars": {**memory, "RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}},
            failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=1),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        return trainer.fit().return_value
    except TrainingFailedError as error:
        return _failed(error, job)


def _rank(told: dict[str, Job]) -> dict[str, float] | CaiError:
    """Ray Train's function: opens this rank's log, and what comes after stands there, from the first import on.

    A CaiError is returned, not raised: it has the same cause on every rank, so trying again would only repeat it.
    """
    import ray.train

    job, context = told["job"], ray.train.get_context()
    rank = context.get_world_rank()
    pulse = own_log(rank_log(StageDir(job.out), rank), job.step_timeout_s)
    print(f"rank {rank} of {context.get_world_size()}: process {os.getpid()} on {platform.node()}", flush=True)
    from cai_ray.training.loop import train

    try:
        return train(job, pulse)
    except CaiError as error:
        return error


def _failed(error: Any, job: Job) -> StageFailed:
    """What ended the run, in one line per rank: the exception's own last line; for want of memory, the arithmetic."""
    failures = getattr(error, "worker_failures", None) or {"Ray Train's driver": error}
    lines, fix = [], f"see {job.out}/logs; the same command continues"
    for rank, failure in failures.items():
        who = f"rank {rank}" if isinstance(rank, int) else rank
        text = str(failure).strip().splitlines() or [type(failure).__name__]
        lines.append(f"{who}: {text[-1][:300]}")
    if any(OUT_OF_MEMORY.search(str(failure)) for failure in failures.values()):
        sharding = job.config.sharding
        parts, host = training_memory(find_shape(str(job.model)), sharding, job.device, job.config.lora)
        lines.append(f"memory of a rank: {memory_sum(parts)} = {sum(total / n for _, total, n in parts):.1f} GiB")
        lines += [f"and in host memory {memory_sum(host)} GiB"] if host else []
        fix = (
            f"lower sharding.microbatch_tokens (it is {sharding.microbatch_tokens}), set "
            f"sharding.gradient_checkpointing=true (it is {str(sharding.gradient_checkpointing).lower()}), or raise "
            f"sharding.zero_stage (it is {sharding.zero_stage}) with more ranks or offload_optimizer; the same command "
            "continues"
        )
    return StageFailed("training failed, after restarts where they could help:\n    " + "\n    ".join(lines), fix)


class _Follow:
    """Passes on what rank 0 appends to metrics.jsonl: to the trackers and to whoever shows progress.

    Ranks that restart write the file anew and repeat steps, line for line: a line is known by its number.
    """

    def __init__(self, out: StageDir, epochs: float, on_progress: Bar | None):
        self._out, self._epochs, self._on_progress = out, epochs, on_progress
        self._passed = len(self._lines())  # by an earlier attempt

    def _lines(self) -> list[str]:
        path = self._out.path / "metrics.jsonl"
        return path.read_text("utf-8").split("\n")[:-1] if path.is_file() else []  # a line without an end waits

    def __call__(self) -> None:
        """Passes on the lines that are new."""
        lines = self._lines()
        for line in lines[self._passed :]:
            row = json.loads(line)
            step, _ = row.pop("step"), row.pop("time")
            self._out.on_metrics(step, row)
            if self._on_progress and "train/loss" in row:
                words = f"loss {row['train/loss']:.4f}, {row['perf/tokens_per_s']:.0f} tokens/s"
                self._on_progress(row["train/epoch"], self._epochs, words)
        self._passed = max(self._passed, len(lines))
