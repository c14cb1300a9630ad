"""Starts a training run on Ray Train, watches its ranks, and brings back its metrics or its failure.

The driver imports neither torch nor DeepSpeed: Ray Train's own driver runs in a small task, which can be stopped whole
when a rank no longer answers.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from cai_ray.artifacts import StageDir
from cai_ray.config import Cluster, PreferenceModelConfig, SftConfig
from cai_ray.errors import ResourceError, StageFailed
from cai_ray.training.loop import Job, Kind, rank_log, storage, train

MAX_FAILURES = 2  # restarts from the last checkpoint within one call
POLL_S = 0.5

OnProgress = Callable[[float, float | None, str], None]  # epochs done, epochs in all, a few words


def run_training(
    kind: Kind,
    config: SftConfig | PreferenceModelConfig,
    inputs: Sequence[Path],
    out: StageDir,
    cluster: Cluster,
    device: str,
    *,
    model: Path,
    format: str = "auto",
    max_bad_fraction: float = 0.01,
    on_progress: OnProgress | None = None,
) -> dict[str, float]:
    """Trains, and leaves the model in `out.path / "model"`; the same call after a crash goes on at the last checkpoint.

    Metrics go to metrics.jsonl (step: optimizer steps before the line's own; held-out lines come before step 0 and
    after the last), the ranks' output to logs/, resume state to checkpoints/, which is of no use once the stage is
    committed.

    Args:
        kind: `sft` reads `Revision` rows, `preference_model` reads `LabeledPair` rows.
        config: the stage's section.
        inputs: folders of parquet rows.
        out: the stage's directory, on a file system that every node mounts.
        cluster: time limits.
        device: `cpu` or `gpu`.
        model: folder of the model to start from.
        format: prompt format: `auto`, `plain` or `chat`.
        max_bad_fraction: more bad rows than this share fail the stage.
        on_progress: called with (epochs done, epochs in all, a few words).

    Returns:
        Counts, the last held-out metrics, and for a preference model `reward_mean` and `reward_std`.

    Raises:
        ResourceError: the cluster cannot ever hold the ranks.
        StageFailed: a rank did not answer in time, training diverged, or it failed more often than it is restarted.
        CaiError: rows, model or configuration cannot be used.
    """
    _check_resources(config.sharding.ranks, config.sharding.cpus_per_rank, device)
    job = Job(
        kind=kind,
        config=config,
        model=Path(model).resolve(),
        format=format,
        inputs=tuple(Path(p).resolve() for p in inputs),
        out=out.path.resolve(),
        seed=out.seed,
        device="gpu" if device == "gpu" else "cpu",
        max_bad_fraction=max_bad_fraction,
        start_timeout_s=cluster.start_timeout_s,
        step_timeout_s=cluster.step_timeout_s,
    )
    watch, follow = _Watch(job), _Follow(out, config.epochs, on_progress)
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
    if outcome["error"]:
        raise outcome["error"]
    return outcome["metrics"]


def _check_resources(ranks: int, cpus: int, device: str) -> None:
    need = {"CPU": ranks * cpus, "GPU": ranks if device == "gpu" else 0}
    have = ray.cluster_resources()
    for name, amount in need.items():
        if amount > have.get(name, 0):
            each = f"{cpus} CPUs each" if name == "CPU" else "one GPU each"
            raise ResourceError(
                f"training needs {amount} {name}s ({ranks} ranks, {each}), the cluster has {have.get(name, 0):.0f}",
                "lower sharding.ranks or sharding.cpus_per_rank, or add machines",
            )


@ray.remote(num_cpus=0, max_retries=0, max_calls=1)
def _fit(job: Job) -> dict[str, Any]:
    """Ray Train's driver, in a process of its own."""
    log = os.open(job.out / "logs" / "trainer.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(job.start_timeout_s)
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "1"  # also how long a checkpoint or the end may go unnoticed
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = (
        "0"  # a process less; preempted ranks are restarted all the same
    )
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2.api.config import LoggingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    class Trainer(TorchTrainer):
        """Without the process that would remove our placement group: Ray does so by itself when the controller ends."""

        def _create_default_callbacks(self):  # no annotations: Ray pickles this class with the names it uses only
            return [c for c in super()._create_default_callbacks() if not isinstance(c, PlacementGroupCleanerCallback)]

    gpu, sharding = job.device == "gpu", job.config.sharding
    path, name = storage(job.out)
    resources = {"CPU": sharding.cpus_per_rank} | ({"GPU": 1} if gpu else {})  # also sets a CPU rank's OpenMP threads
    trainer = Trainer(
        train,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=int(job.step_timeout_s)),
        scaling_config=ScalingConfig(num_workers=sharding.ranks, use_gpu=gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name=name,
            storage_path=str(path),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=MAX_FAILURES, controller_failure_limit=1),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        outcome: Any = trainer.fit().return_value
    except TrainingFailedError as error:
        return {"error": StageFailed(_cause(error), f"see {job.out}/logs; the same command continues")}
    return {"error": None, **outcome}


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
        out = StageDir(job.out)
        self._logs = [rank_log(out, rank) for rank in range(job.config.sharding.ranks)]
        self._limits = {False: job.start_timeout_s, True: job.step_timeout_s}
        self._seen = [(self._touched(p), time.monotonic(), False) for p in self._logs]  # (change, noticed when, began)

    @staticmethod
    def _touched(path: Path) -> int:
        return path.stat().st_mtime_ns if path.is_file() else 0

    def __call__(self) -> None:
        """Raises StageFailed naming the ranks that have not answered, and for how long."""
        now = time.monotonic()
        silent: dict[bool, list[str]] = {False: [], True: []}
        for rank, path in enumerate(self._logs):
            change, since, began = self._seen[rank]
            if (touched := self._touched(path)) != change:
                self._seen[rank] = (touched, now, True)
            elif now - since > self._limits[began]:
                silent[began].append(str(rank))
        for began, ranks in silent.items():
            if ranks:
                what = "have not answered" if began else "have not started"
                raise StageFailed(
                    f"training ranks {', '.join(ranks)} {what} for {self._limits[began]:.0f} s",
                    f"see {self._logs[0].parent}; raise cluster.{'step' if began else 'start'}_timeout_s if they "
                    "are only slow; the same command continues",
                )


class _Follow:
    """Passes on what rank 0 appends to metrics.jsonl: to the trackers and to whoever shows progress."""

    def __init__(self, out: StageDir, epochs: float, on_progress: OnProgress | None):
        self._out, self._epochs, self._on_progress = out, epochs, on_progress
        self._path = out.path / "metrics.jsonl"
        self._inode, self._offset = 0, 0
        lines = self._path.read_text("utf-8").split("\n")[:-1] if self._path.is_file() else []
        self._last = max((json.loads(line)["step"] for line in lines), default=-1)  # passed on by an earlier attempt

    def __call__(self) -> None:
        """Reads whole new lines; after a restart of the ranks, only steps that were not passed on before."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            inode, floor = os.fstat(file.fileno()).st_ino, -1
            if inode != self._inode:  # written anew without the steps that come again
                self._inode, self._offset, floor = inode, 0, self._last
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                row = json.loads(line)
                step = row.pop("step")
                row.pop("time", None)
                if step > floor:
                    self._pass_on(step, row)

    def _pass_on(self, step: int, row: dict[str, float]) -> None:
        self._last = step
        if self._out.on_metrics:
            self._out.on_metrics(self._out.name, step, row)
        if self._on_progress and "train/loss" in row:
            words = f"loss {row['train/loss']:.4f}, {row['perf/tokens_per_s']:.0f} tokens/s"
            self._on_progress(row["train/epoch"], self._epochs, words)
