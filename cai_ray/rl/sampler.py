"""The controller's side of the rollout engines: asking for a step's responses, new weights, engines that die.

A step's responses are asked for in pieces, and what only looks at them (reward and reference) takes them piece by piece
too: where roles work side by side, while others still arrive.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from uuid import uuid4

import ray

from cai_ray.artifacts import StageDir
from cai_ray.errors import StageFailed
from cai_ray.records import Row
from cai_ray.rl.groups import Call, EngineDied, Group, WorkerDied, engine_calls, wait
from cai_ray.rl.rollouts import RollOut, keep_rollouts, requests
from cai_ray.rl.setup import Setup
from cai_ray.rl.timeline import Timeline

TRIES = 3  # of a step's rollouts or of a sync, where engines die
PIECE = 32  # most responses in a piece
LOOKS = {"score": ("reward", "score"), "reference": ("reference", "logprobs")}  # phase -> role and method
log = logging.getLogger(__name__)


class Sampler:
    """Rolls steps out, at most one ahead of the training.

    Args:
        setup: configuration and time limits.
        steps: each step's prompts.
        out: keeps the rollouts, beside the checkpoints.
        groups: the actor, source of the weights; reward and reference.
        engines: the rollout engines; they have yet to get the actor's weights.
        get_engines: gives them again, dead ones replaced.

    Attributes:
        timeline: when engines, and whoever else adds to it, worked.
        version: updates behind the actor's weights, and so the step that they are for; whoever trains them counts.
    """

    def __init__(
        self,
        setup: Setup,
        steps: list[list[Row]],
        out: StageDir,
        groups: dict[str, Group],
        engines: list[Any],
        get_engines: Callable[[], list[Any]],
    ):
        self._setup, self._steps, self._out, self._groups = setup, steps, out, groups
        self._get_engines, self._limit = get_engines, setup.cluster.step_timeout_s
        self._engines, self._fresh = engines, True  # fresh: the actor does not know them yet
        size, ranks = setup.config.rollout_batch_size, setup.config.inference_ranks
        each = min(PIECE, -(-size // max(ranks, len(self._engines))))
        self._pieces = [(first, min(each, size - first)) for first in range(0, size, each)]  # first row, how many
        self._asked: dict[int, list[Call]] = {}  # by step: what the engines work on
        self._early: dict[tuple[int, str], list[Call]] = {}  # by step and phase: who waits for that
        self._ready: dict[int, tuple[Any, dict[str, Any]]] = {}  # by step: what is on disk and not yet taken
        self._program: Any = ray.put(RollOut(setup.config))
        self._keep: Any = ray.remote(num_cpus=0, num_returns=2)(keep_rollouts)
        # Each folder's name is new: a network file system may go on showing a node what lay under a known one.
        self._name = f"adapter-{uuid4().hex[:8]}"
        self.timeline, self.version = Timeline(out.path / "timeline.json"), 0

    def calls(self, method: str, *args: Any) -> list[Call]:
        """Calls a method of every engine."""
        return engine_calls(self._engines, method, *args)

    def sync(self) -> None:
        """Sends the actor's weights to idle engines, which then hold `version`.

        Raises:
            EngineDied: one is gone; after `replace` the same call can be made again.
            WorkerDied: one is gone, and the actor's ranks with it.
        """
        what = f"weight sync before step {self.version}"
        self._rest("wake", what, "weights")
        # One rank has all the weights, but under ZeRO-3; engines that share GPUs are served by the rank beside each.
        everyone = self._setup.colocated or self._setup.config.actor.sharding.zero_stage == 3
        senders = self._groups["actor"].workers[: None if everyone else 1]
        engines, folder = self._engines if self._fresh else None, self._out.checkpoints / f"{self._name}-{self.version}"
        calls = Group("actor", senders).submit("sync", self.version, engines, folder)
        try:
            answers = wait(calls, self._limit, what)
        except EngineDied as e:
            if self._setup.colocated and len(senders) > 1:  # the other ranks stand in the transfer's own collectives
                raise WorkerDied(e.message, e.fix) from e
            raise
        self._rest("wake", what, "kv_cache")
        for call, answer in zip(calls, answers, strict=True):
            self.timeline.add(call.who, "sync", self.version, answer["span"])
        self._fresh = False

    def _rest(self, method: str, what: str, *args: Any) -> None:
        """Engines that share the workers' GPUs `sleep` or `wake`."""
        if self._setup.colocated:
            wait(self.calls("call", method, *args), self._limit, what)

    def replace(self, error: EngineDied) -> None:
        """Starts engines for those that are gone; the pool ends what the others still do for nobody."""
        log.warning("%s; starting it again", error.message)
        self._engines, self._fresh = self._get_engines(), True

    def begin(self, step: int) -> None:
        """Asks for a step's responses, from the weights that the actor has now; `finish` waits for them."""
        with suppress(EngineDied):  # `finish` finds out and asks again
            self._ask(step)

    def _ask(self, step: int) -> None:
        if step in self._asked or step in self._ready:
            return
        calls = []
        if not self._path(step).is_file():
            if self._fresh:
                self.sync()
            # Given once: serialised with every call it was a quarter of the controller's own work.
            asked = ray.put(requests(self._steps[step], self._setup.config, self._setup.seed, step))
            pieces = [(piece,) for piece in self._pieces]
            calls = engine_calls(self._engines, "run", self._program, asked, each=pieces, fetch=False)
            if self._setup.side_by_side and not self._setup.colocated:  # else the engines have the room
                for phase in LOOKS:
                    self._early[step, phase] = self._look(phase, [(call.done,) for call in calls])
        self._asked[step] = calls

    def finish(self, step: int) -> None:
        """Waits until a step's responses are on disk; engines that die are replaced and asked again."""
        for _ in range(TRIES):
            try:
                with self._out.phase("rollout"):
                    self._ask(step)
                    if step not in self._ready:
                        self._ready[step] = self._collect(step)
                return
            except EngineDied as e:
                self._asked.pop(step, None)
                self._early = {key: calls for key, calls in self._early.items() if key[0] != step}
                self.replace(e)
        raise StageFailed(f"rollout of step {step}: engines died {TRIES} times", "see the engines' logs")

    def take(self, step: int) -> tuple[Any, dict[str, Any]]:
        """The reference of a step's rollouts, and what is seen of them (`keep_rollouts`)."""
        self.finish(step)
        self._rest("sleep", f"rest after the rollout of step {step}")
        return self._ready.pop(step)

    def look(self, phase: str, step: int, rollouts: Any) -> list[Call]:
        """Calls of the workers that a phase of `LOOKS` takes, over what `take` gave; some may have answered already."""
        early = self._early.pop((step, phase), None)
        return early or self._look(phase, [(rollouts, piece) for piece in self._pieces])

    def _look(self, phase: str, each: list[tuple]) -> list[Call]:
        role, method = LOOKS[phase]
        group, sharded = self._groups[role], self._setup.config.inference_sharded
        return group.submit(method, each=[own for own in each for _ in (group.workers if sharded else [None])])

    def _path(self, step: int) -> Any:
        return self._out.checkpoints / f"rollouts-{step}.parquet"

    def _collect(self, step: int) -> tuple[Any, dict[str, Any]]:
        size, what, calls = self._setup.config.rollout_batch_size, f"rollout of step {step}", self._asked[step]
        wait(calls, self._limit, what)
        rollouts, done = self._keep.remote(self._path(step), size, *[call.done for call in calls])
        (seen,) = wait([Call("an engine", done, lost=EngineDied)], self._limit, what)
        oldest = step - self._setup.config.staleness
        if not all(oldest <= version <= step for version in seen["versions"]):
            raise StageFailed(
                f"{what}: responses come from the weights of steps {seen['versions']}, the oldest allowed is {oldest}",
                f"remove {self._path(step)}",
            )
        del self._asked[step]
        for call, span in zip(calls, seen["spans"], strict=True):
            self.timeline.add(call.who, "rollout", step, span)
        if seen["spans"]:  # else they were on disk already
            begun, ended = (list(times) for times in zip(*seen["spans"], strict=True))
            seen["seconds"] = max(ended) - min(begun)
        return rollouts, seen
