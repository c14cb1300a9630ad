"""Starts a training run on Ray Train, watches its ranks, and brings back its metrics or its failure.

The driver imports neither torch nor DeepSpeed: Ray Train's own driver runs in a small task, which can be stopped whole
when a rank no longer answers.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from cai_ray.artifacts import StageDir
from cai_ray.errors import CaiError, ResourceError, StageFailed
from cai_ray.training.loop import RUN_NAME, Job, print_to, rank_log, train

MAX_FAILURES = 2  # restarts from the last checkpoint within one call
POLL_S = 0.5

OnProgress = Callable[[float, float | None, str], None]  # epochs done, epochs in all, a few words


def run_training(job: Job, out: StageDir, on_progress: OnProgress | None = None) -> dict[str, float]:
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
        ResourceError: the cluster cannot ever hold the ranks.
        StageFailed: a rank did not answer in time, training diverged, or it failed more often than it is restarted.
        CaiError: rows, model or configuration cannot be used.
    """
    ranks, have = job.config.sharding.ranks, ray.cluster_resources()
    for name, each in job.resources.items():
        if ranks * each > have.get(name, 0):
            raise ResourceError(
                f"training needs {ranks * each} {name}s ({ranks} ranks of {each}), there are {have.get(name, 0):g}",
                "lower sharding.ranks or sharding.cpus_per_rank, or add machines",
            )
    watch, follow = _Watch(job), _Follow(out, job.config.epochs, on_progress)
    running = _fit.remote(job)
    finished = False
    try:
        while not (finished := bool(ray.wait([running], timeout=POLL_S)[0])):
            follow()
            watch()
        outcome = ray.get(running)
    except RayError as error:
        raise StageFailed(_cause(error), f"see {out.logs}/trainer.log; the same command continues") from error
    finally:
        if not finished:  # takes Ray Train's controller and the ranks with it; a task that is done crashes Ray
            ray.cancel(running, force=True)
    follow()
    if isinstance(outcome, CaiError):
        raise outcome
    return outcome


@ray.remote(num_cpus=0, max_retries=0, max_calls=1)
def _fit(job: Job) -> Any:
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

    gpu, ranks = job.device == "gpu", job.config.sharding.ranks
    trainer = Trainer(
        train,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=int(job.step_timeout_s)),
        scaling_config=ScalingConfig(num_workers=ranks, use_gpu=gpu, resources_per_worker=job.resources),
        run_config=RunConfig(
            name=RUN_NAME,
            storage_path=str(job.out / "checkpoints"),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=MAX_FAILURES, controller_failure_limit=1),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        return trainer.fit().return_value
    except TrainingFailedError as error:
        return StageFailed(_cause(error), f"see {job.out}/logs; the same command continues")


def _cause(error: Any) -> str:
    """What ended the run, in one line per rank: the exception's own last line, without its traceback."""
    failures = getattr(error, "worker_failures", None) or {"Ray Train's driver": error}
    lines = []
    for rank, failure in failures.items():
        who = f"rank {rank}" if isinstance(rank, int) else rank
        text = str(failure).strip().splitlines() or [type(failure).__name__]
        lines.append(f"{who}: {text[-1][:300]}")
    return "training failed, after restarts where they could help:\n    " + "\n    ".join(lines)


class _Watch:
    """Notices a rank that gives no sign of life: its log file is neither written nor touched for too long."""

    def __init__(self, job: Job):
        self._logs = [rank_log(StageDir(job.out), rank) for rank in range(job.config.sharding.ranks)]
        self._limits = {False: job.start_timeout_s, True: job.step_timeout_s}
        self._seen = [(_touched(log), time.monotonic(), False) for log in self._logs]  # (change, noticed when, began)

    def __call__(self) -> None:
        """Raises StageFailed naming the ranks that have not answered, and for how long."""
        now, silent = time.monotonic(), []
        for rank, log in enumerate(self._logs):
            change, since, began = self._seen[rank]
            if (touched := _touched(log)) != change:
                self._seen[rank] = (touched, now, True)
            elif now - since > self._limits[began]:
                silent.append((rank, began))
        if silent:
            began = silent[0][1]
            ranks = ", ".join(str(rank) for rank, also in silent if also == began)
            raise StageFailed(
                f"training ranks {ranks} have not {'answered' if began else 'started'} for {self._limits[began]:.0f} s",
                f"see {self._logs[0].parent}; raise cluster.{'step' if began else 'start'}_timeout_s if they "
                "are only slow; the same command continues",
            )


def _touched(log: Path) -> int:
    return log.stat().st_mtime_ns if log.is_file() else 0


class _Follow:
    """Passes on what rank 0 appends to metrics.jsonl: to the trackers and to whoever shows progress.

    Ranks that restart write the file anew and repeat steps, line for line: a line is known by its number.
    """

    def __init__(self, out: StageDir, epochs: float, on_progress: OnProgress | None):
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
            if self._out.on_metrics:
                self._out.on_metrics(self._out.name, step, row)
            if self._on_progress and "train/loss" in row:
                words = f"loss {row['train/loss']:.4f}, {row['perf/tokens_per_s']:.0f} tokens/s"
                self._on_progress(row["train/epoch"], self._epochs, words)
        self._passed = max(self._passed, len(lines))
