"""Engines as Ray actors: started when a stage needs them, kept while the next stage's model fits in."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cai_ray.config import Cluster
from cai_ray.errors import CaiError, ResourceError, StageFailed
from cai_ray.generation.actor import EngineActor
from cai_ray.models.checkpoints import architecture
from cai_ray.models.memory import KEEP_MEMORY

EngineHandle = Any  # Ray's handle of an EngineActor
DATA_CPUS = 3  # slots that Ray Data may take beside the engines; each task that moves rows is a process of its own
SHARED_GPU = 0.5  # what Ray counts for an engine that sleeps while others use its GPU
LOG_LINES = 12
PING_S = 60.0
GOODBYE_S = 20.0


@dataclass(frozen=True, eq=False)
class _Live:
    name: str
    handle: EngineHandle
    log_file: Path
    kind: tuple[Any, ...]  # architecture, dtype, placement group, adapters' base: what load_checkpoint cannot change
    max_model_len: int
    place: int  # its bundle of the placement group, if it has one
    info: Any  # reference that is ready once the engine is

    @property
    def ready(self) -> bool:
        """Whether it has started, or failed to."""
        return bool(ray.wait([self.info], timeout=0)[0])


class EnginePool:
    """The engines of a run.

    Args:
        cluster: how many, how large, how long to wait.
        device: cpu or gpu.
        log_dir: folder for one log file per engine.
    """

    def __init__(self, cluster: Cluster, device: str, log_dir: Path):
        self.cluster, self.device, self.log_dir = cluster, device, log_dir
        self._live: list[_Live] = []

    def engines(
        self,
        folder: Path,
        *,
        format: str = "auto",
        dtype: str = "bfloat16",
        max_model_len: int,
        count: int | None = None,
        group: PlacementGroup | None = None,
        lora_rank: int = 0,
        updated: bool = False,
    ) -> list[EngineHandle]:
        """Engines that hold a model, idle, in a stable order.

        Living engines of the same architecture are given the new weights; others are replaced, and so are dead ones.

        Args:
            folder: Hugging Face folder of the model.
            format: prompt format: auto, plain or chat.
            dtype: float32 or bfloat16.
            max_model_len: longest prompt and continuation together, tokens.
            count: how many. When None `cluster.engines` are waited for, and as many others, up to
                `cluster.max_engines`, as Ray finds room for join later.
            group: a bundle for each engine, whose GPU it shares with others; it can sleep then.
            lora_rank: for engines that take adapters over these weights: their largest rank.
            updated: they are about to get weights from a trainer: those that have had some are not given the model's.

        Raises:
            ResourceError: the cluster is too small for them; the message carries the arithmetic.
            StageFailed: one did not start in time or died; the message ends with its last log lines.
        """
        fewest = count or self.cluster.engines
        most = count or self.cluster.max_engines or fewest
        kind, model = (architecture(folder), dtype, group, (folder, lora_rank) if lora_rank else None), (folder, format)
        infos = [(e, _settled(e)) for e in self._live if e.kind == kind and e.max_model_len >= max_model_len]
        fit = {e: info for e, info in infos if info and not info["updating"]}
        kept = list(fit)[:most]
        self._stop([e for e in self._live if e not in kept])
        self._live = kept
        # The engine itself knows what it holds: PPO may have given it other weights since.
        holds = {e: fit[e]["holds"] or (fit[e]["loaded"] if updated else None) for e in self._live}
        stale = [e for e in self._live if holds[e] != model]
        swaps = [(e, e.handle.call.remote("load_checkpoint", *model)) for e in stale]
        missing = max(0, fewest - len(self._live))
        if group is None:  # else their room is reserved
            self._check_room(missing)
        taken = {e.place for e in self._live}
        free = [place for place in range(most) if place not in taken][: most - len(taken)]
        fresh = [self._start(model, kind, max_model_len, most, place) for place in free[:missing]]
        self._live += fresh
        self._await([*swaps, *((e, e.info) for e in fresh)])
        ready = [e.handle for e in self._live]
        # Ray places these when it can; where it cannot, their wait is what tells an autoscaler to add machines.
        self._live += [self._start(model, kind, max_model_len, most, place) for place in free[missing:]]
        return ready

    def joining(self) -> list[EngineHandle]:
        """Engines beyond the fewest that the last call of `engines` asked for, which have not started yet."""
        return [e.handle for e in self._live if not e.ready]

    def release(self) -> None:
        """Stops all engines and frees what they hold, before training on the same devices."""
        self._stop(self._live)
        self._live = []

    def _start(
        self, model: tuple[Path, str], kind: tuple[Any, ...], max_model_len: int, count: int, place: int
    ) -> _Live:
        cluster, gpus, group = self.cluster, self.device == "gpu", kind[2]
        name = f"engine-{uuid4().hex[:8]}"
        log_file = self.log_dir / f"{name}.log"
        # Ray gives a worker one thread. On CPU the phases of a run take turns, so the engines share all cores.
        threads = None if gpus else max(1, (os.cpu_count() or 1) // count)
        options = {
            "cluster": cluster,
            "format": model[1],
            "dtype": kind[1],
            "max_model_len": max_model_len,
            "device": self.device,
            "threads": threads,
            "sleeps": group is not None,
            "lora_rank": kind[3][1] if kind[3] else 0,
        }
        handle = (
            ray.remote(EngineActor)
            .options(
                name=name,
                num_cpus=1,
                num_gpus=(SHARED_GPU if group else cluster.tensor_parallel_size) if gpus else 0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, place) if group else "DEFAULT",
                max_restarts=0,
                max_task_retries=0,
                runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads), **KEEP_MEMORY} if threads else {}},
            )
            .remote(name, log_file, model[0], options)
        )
        return _Live(name, handle, log_file, kind, max_model_len, place, handle.info.remote())

    def _check_room(self, fresh: int) -> None:
        """Refuses more new engines than the cluster can hold beside the living ones."""
        nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
        engines = fresh + len(self._live)
        per_gpus, total_gpus = self.cluster.tensor_parallel_size, sum(n.get("GPU", 0) for n in nodes)
        if self.device == "gpu" and engines > sum(int(n.get("GPU", 0) // per_gpus) for n in nodes):
            raise ResourceError(
                f"{engines} engines of {per_gpus} GPUs need {engines * per_gpus} GPUs, each engine's on one machine; "
                f"the cluster has {total_gpus:g} on {len(nodes)} machines",
                "lower cluster.engines or cluster.tensor_parallel_size, or add machines",
            )
        cpus = sum(n.get("CPU", 0) for n in nodes)
        if engines + DATA_CPUS > cpus:
            raise ResourceError(
                f"{engines} engines take {engines} CPU slots and Ray Data {DATA_CPUS} more; the cluster has {cpus:g}",
                "lower cluster.engines, or start Ray with more logical CPUs (ray start --num-cpus)",
            )

    def _await(self, waiting: list[tuple[_Live, Any]]) -> None:
        deadline = time.monotonic() + self.cluster.start_timeout_s
        for engine, ref in waiting:
            try:
                ray.get(ref, timeout=max(0.0, deadline - time.monotonic()))
            except (GetTimeoutError, RayActorError, RayTaskError) as e:
                self.release()
                if isinstance(e, CaiError):  # such as weights that do not fit
                    raise
                what = "died" if isinstance(e, RayActorError) else "failed"
                if isinstance(e, GetTimeoutError):
                    what = f"did not start within {self.cluster.start_timeout_s:g} s"
                raise StageFailed(
                    f"{engine.name} {what}; the end of {engine.log_file}:\n{log_tail(engine.log_file)}",
                    "mend what the log says; for a slow machine raise cluster.start_timeout_s",
                ) from None

    def _stop(self, engines: list[_Live]) -> None:
        goodbyes: list[Any] = [e.handle.call.remote("shutdown") for e in engines if e.ready]
        if goodbyes:
            ray.wait(goodbyes, num_returns=len(goodbyes), timeout=GOODBYE_S)
        for e in engines:
            ray.kill(e.handle)


def log_tail(log_file: Path) -> str:
    """The last lines of an engine's log, indented."""
    lines = log_file.read_text("utf-8", "replace").splitlines() if log_file.is_file() else ["(no log)"]
    return "\n".join(f"    {line[:300]}" for line in lines[-LOG_LINES:])


def _settled(engine: _Live) -> dict[str, Any] | None:
    """An engine's info once what still ran there has been ended; None when it has not started or does not answer."""
    if not engine.ready:
        return None
    try:
        ray.get(engine.handle.abort.remote(), timeout=PING_S)
        info: Any = ray.get(engine.handle.info.remote(), timeout=PING_S)
        return info
    except (RayActorError, GetTimeoutError):
        return None
