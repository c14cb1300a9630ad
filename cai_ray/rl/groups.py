"""Ray actor groups: placement that is checked before it is asked for, waits that name who did not answer, a timeline.

The timeline is a Chrome trace of when each worker did what: open it in chrome://tracing or Perfetto.
"""

import json
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import SystemRandom
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cai_ray.errors import CaiError, ResourceError, StageFailed
from cai_ray.generation.pool import SHARED_GPU

CPU_SHARE = 0.1  # logical CPUs of a worker: roles take turns, threads are set apart from this
RETRIES = 3  # of a call to a stateless worker that dies; Ray starts it again as often as it takes
PORTS = range(20_000, 32_000)  # above those of Ray's workers, below those of outgoing connections
SETTLE_S = 10.0  # until Ray has told of a process's end, and counts as free what it held


class WorkerDied(StageFailed):
    """A process that holds training state is gone; its group starts again from the last checkpoint."""


class EngineDied(StageFailed):
    """A rollout engine is gone; another takes its place and is given the actor's weights."""


@dataclass(frozen=True)
class Call:
    """An answer that is awaited: `done` carries scalars (or the error), `payload` stays where it is."""

    who: str  # role and rank
    done: Any
    payload: Any = None
    lost: type[StageFailed] = WorkerDied  # what to raise when the process is gone


def wait(calls: Sequence[Call], timeout_s: float, what: str) -> list[Any]:
    """What `done` of each call holds, in order.

    Raises:
        StageFailed: not all answered in time; the message names who did not.
        WorkerDied, EngineDied: a process is gone.
        CaiError: what a worker raised.
    """
    asked = [call.done for call in calls]
    with suppress(RayError):  # all in one look; who failed or did not answer is found below
        return ray.get(asked, timeout=timeout_s)
    ready = set(ray.wait(asked, num_returns=len(asked), timeout=SETTLE_S, fetch_local=False)[0])
    errors = [error for call in calls if call.done in ready and (error := _error(call, what))]
    if errors:  # a death before what its peers say of it: their collectives end with errors of their own
        raise min(errors, key=lambda e: not isinstance(e, WorkerDied | EngineDied))
    if silent := ", ".join(call.who for call in calls if call.done not in ready):
        raise StageFailed(
            f"{what}: no answer within {timeout_s:g} s from {silent}",
            "see whether that process works or hangs (ray stack); cluster.step_timeout_s sets the limit",
        )
    return ray.get(asked, timeout=SETTLE_S)  # the last came just now


def _error(call: Call, what: str) -> CaiError | None:
    """What to raise for an answer that is there, if it is an error."""
    try:
        ray.get(call.done, timeout=SETTLE_S)
    except RayTaskError as e:  # first: where the cause is a lost process, Ray raises a class that is both
        if isinstance(e.cause, RayActorError):
            return call.lost(f"{what}: {call.who} lost a process that it reads from")
        if isinstance(e.cause, CaiError):
            return e.cause
        return StageFailed(f"{what}: {call.who} failed with {type(e.cause).__name__}: {e.cause}")
    except RayActorError as e:
        if e.actor_init_failed:
            # Of an error of ours its message and how to mend it; of another one all that Ray tells.
            return StageFailed(f"{what}: {call.who} could not start: {str(e).rpartition('cai_ray.errors.')[2]}")
        return call.lost(f"{what}: {call.who} is gone", "see its log, and the machine's memory")
    except RayError as e:
        return StageFailed(f"{what}: {call.who} failed: {type(e).__name__}", "see Ray's logs")
    return None


class Timeline:
    """Appends spans to a trace file; a run that goes on appends to what is there.

    The file is a JSON array without its closing bracket, which the trace format leaves out on purpose: whoever reads
    it sees all that was written before a crash.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            path.write_text("[\n", "utf-8")
        self._file = path.open("a", 1, "utf-8")  # a write a line; opening it for each of hundreds of spans is slow

    def add(self, what: str, step: int, calls: Sequence[Call], answers: Sequence[Any]) -> None:
        """Each of `calls` was busy with `what` in its answer's `span`, two times in seconds since the epoch."""
        for call, answer in zip(calls, answers, strict=True):
            role, _, rank = call.who.partition(" ")
            begun, ended = answer["span"]
            times = {"ts": round(begun * 1e6), "dur": round((ended - begun) * 1e6)}  # microseconds
            event = {"name": what, "ph": "X", "pid": role, "tid": int(rank), **times, "args": {"step": step}}
            self._file.write(json.dumps(event) + ",\n")


@dataclass(frozen=True)
class Group:
    """The workers of one role: `workers.Worker`s, or the rollout engines."""

    role: str
    workers: list[Any]
    lost: type[StageFailed] = WorkerDied  # what to raise when one of them is gone

    @property
    def first(self) -> "Group":
        """Its rank 0 alone."""
        return Group(self.role, self.workers[:1], self.lost)

    def submit(self, method: str, *args: Any, each: Sequence[tuple] | None = None) -> list[Call]:
        """Calls `method(*args)` on every worker, or `method(*args, *own)` for each `own`, dealt out in turn.

        The payloads stay in Ray's object store.
        """
        calls = []
        for i, own in enumerate(each or [()] * len(self.workers)):
            rank = i % len(self.workers)
            call = self.workers[rank].call.options(num_returns=2, name=f"{self.role.capitalize()}.{method}")
            payload, done = call.remote(method, *args, *own)
            calls.append(Call(f"{self.role} {rank}", done, payload, self.lost))
        return calls

    def kill(self) -> None:
        """Ends every worker."""
        for worker in self.workers:
            ray.kill(worker)


@dataclass(frozen=True)
class Placement:
    """Where each role's ranks go: bundles of a placement group, and the GPUs (or a share of one) of each worker."""

    group: PlacementGroup
    ranks: Mapping[str, int]  # of each role
    first: Mapping[str, int]  # role -> the bundle of its rank 0
    cpus: float
    gpus: float

    def start(self, role: str, cls: type, env: Mapping[str, str], retries: int, *args: Any) -> Group:
        """Starts `cls(role, rank, ranks, *args)` for every rank; `retries` is 0 for workers that hold state."""
        ranks = self.ranks[role]
        workers = [
            ray.remote(cls)
            .options(
                num_cpus=self.cpus,
                num_gpus=self.gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, self.first[role] + rank),
                runtime_env={"env_vars": dict(env)},
                max_restarts=-1 if retries else 0,
                max_task_retries=retries,
            )
            .remote(role, rank, ranks, *args)
            for rank in range(ranks)
        ]
        return Group(role, workers)


def free_address() -> tuple[str, int]:
    """This node's address and a port that is free now.

    The system would offer one that an outgoing connection may have taken before it is used; these it gives to none.
    """
    for port in SystemRandom().sample(PORTS, 100):
        with suppress(OSError), socket.socket() as s:
            s.bind(("", port))
            return ray.util.get_node_ip_address(), port
    raise StageFailed(f"no port from {PORTS[0]} to {PORTS[-1]} is free", "end what listens there")


def _free(kind: str, wanted: float) -> float:
    """How much of a resource is free; an earlier stage's engines may have ended just now."""
    deadline, wanted = time.monotonic() + SETTLE_S, min(wanted, ray.cluster_resources().get(kind, 0.0))
    while (have := ray.available_resources().get(kind, 0.0)) + 1e-6 < wanted and time.monotonic() < deadline:
        time.sleep(0.2)
    return have


@contextmanager
def placed(ranks: Mapping[str, int], device: str, timeout_s: float, colocated: bool = False) -> Iterator[Placement]:
    """Reserves room for `ranks` workers of each role, until the block ends.

    On GPUs each worker has one of its own; where there are too few, rank i of every role shares GPU i. `colocated`
    roles always do, and each bundle has room for an engine.

    Raises:
        ResourceError: the cluster has too little free, with the arithmetic; or it does not give it in time.
    """
    total, together = sum(ranks.values()), max(ranks.values())
    wanted = " + ".join(f"{role} {n}" for role, n in ranks.items())
    kind, own = ("GPU", {"GPU": 1.0, "CPU": 1.0}) if device == "gpu" else ("CPU", {"CPU": CPU_SHARE})
    have = _free(kind, (together if colocated else total) * own[kind])
    shared = colocated or (device == "gpu" and have < total)
    bundle = {**own, "CPU": own["CPU"] + colocated}
    bundles = [bundle] * (together if shared else total)
    need = len(bundles) * bundle[kind]
    if have + 1e-6 < need:
        raise ResourceError(
            f"PPO's workers ({wanted}) need {need:g} {kind}s {'with' if colocated else 'beside'} the engines, "
            f"{have:g} are free" + (f"; apart they would need {total}" if shared else ""),
            "lower ppo.engines, the ranks of ppo.actor and ppo.critic or ppo.inference_ranks, or join a larger cluster",
        )
    group = placement_group(bundles, strategy="PACK")
    try:
        if not group.wait(timeout_s):
            raise ResourceError(
                f"Ray did not place PPO's workers ({wanted}) in {timeout_s:g} s", "`ray status` says what is free"
            )
        starts = [0] * len(ranks) if shared else accumulate(ranks.values(), initial=0)
        first = dict(zip(ranks, starts, strict=False))
        share, gpu = len(ranks) if shared else 1, own.get("GPU", 0.0) * (1 - SHARED_GPU if colocated else 1)
        yield Placement(group, ranks, first, own["CPU"] / share, gpu / share)
    finally:
        remove_placement_group(group)
