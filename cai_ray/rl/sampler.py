"""The controller's side of the rollout engines: asking for a step's responses, new weights, engines that die.

A step's responses are asked for in pieces, and what only looks at them (reward and reference) takes them piece by piece
too: where roles work side by side, while others still arrive.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray

from cai_ray.artifacts import StageDir
from cai_ray.errors import StageFailed
from cai_ray.records import Row
from cai_ray.rl.groups import Call, EngineDied, Group, Timeline, WorkerDied, wait
from cai_ray.rl.rollouts import RollOut, requests
from cai_ray.rl.setup import Setup
from cai_ray.rl.weight_sync import check_sync, gap_limit, mean_gap

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
        engines: those that work now.
        gap_limit: how far their log-probs may be from the actor's, nats a token on average.
        timeline: when engines, and whoever else adds to it, worked.
        version: updates behind the actor's weights, and so the step that they are for; whoever trains them counts.
    """

    def __init__(
        self,
        setup: Setup,
        steps: list[list[Row]],
        out: StageDir,
        groups: dict[str, Group],
        engines: Group,
        get_engines: Callable[[], Group],
    ):
        self._setup, self._steps, self._out, self._groups = setup, steps, out, groups
        self._get_engines, self._limit = get_engines, setup.cluster.step_timeout_s
        self.engines, self._fresh = engines, True  # fresh: the actor does not know them yet
        size, ranks = setup.config.rollout_batch_size, setup.config.inference_ranks
        each = min(PIECE, -(-size // max(ranks, len(engines.workers))))
        self._pieces = [(first, min(each, size - first)) for first in range(0, size, each)]  # first row, how many
        # By step and phase: what the engines work on, and those of LOOKS that wait for it.
        self._begun: dict[tuple[int, str], list[Call]] = {}
        self._program: Any = ray.put(RollOut(setup.config))
        # Each folder's name is new: a network file system may go on showing a node what lay under a known one.
        self._name = f"adapter-{uuid4().hex[:8]}"
        self.timeline, self.version, self.gap_limit = Timeline(out.path / "timeline.json"), 0, gap_limit(setup)

    def send_weights(self, experience: Any) -> float:
        """Sends the weights after a step and probes them on its batch, with other engines where some die.

        Returns how far the step has moved the actor (`check_sync`).

        Raises:
            StageFailed: engines and actor do not compute the same.
        """

        def attempt() -> float:
            with self._out.phase("sync"):
                self.sync()
            with self._out.phase("probe"):
                return self._probe(experience)

        return self._with_engines(f"weight sync after step {self.version - 1}", attempt)

    def _with_engines(self, what: str, attempt: Callable[[], Any]) -> Any:
        """Tries again where engines die; the pool replaces them, and ends what the others still do for nobody."""
        for _ in range(TRIES):
            try:
                return attempt()
            except EngineDied as error:
                log.warning("%s; starting it again", error.message)
                self.engines, self._fresh = self._get_engines(), True
                self._begun = {}
        raise StageFailed(f"{what}: engines died {TRIES} times", "see the engines' logs")

    def _senders(self, everyone: bool = False) -> Group:
        """The actor's ranks that have the weights to give: one has them all, but under ZeRO-3."""
        actor = self._groups["actor"]
        return actor if everyone or self._setup.config.actor.sharding.zero_stage == 3 else actor.first

    def _probe(self, experience: Any) -> float:
        """Compares engines and actor on a few of the step's responses; returns how far the update moved them."""
        step, what = self.version - 1, f"probe after step {self.version - 1}"
        # In turn: on a CPU both at once take more than twice as long, spinning for cores that the other one has.
        actor, *_ = wait(self._senders().submit("probe", experience), self._limit, what)
        # Engines want room for one more token, which the longest response has used up: its last token is left out.
        ids = [row[: self._setup.config.max_tokens - 1] for row in actor["ids"]]
        for engine in wait(self.engines.submit("prompt_logprobs", ids, actor["starts"]), self._limit, what):
            check_sync(mean_gap(actor["logprobs"], engine), actor["shift"], self.gap_limit, step)
        return actor["shift"]

    def sync(self) -> None:
        """Sends the actor's weights to idle engines, which then hold `version`.

        Raises:
            EngineDied: one is gone; with others in its place the same call can be made again.
            WorkerDied: one is gone, and the actor's ranks with it.
        """
        what = f"weight sync before step {self.version}"
        if self._fresh:  # one that has just started holds all that it may, where the transfer needs room
            self._rest("sleep", what)
        self._rest("wake", what, "weights")
        senders = self._senders(self._setup.colocated)  # engines that share GPUs are served by the rank beside each
        engines, folder = self.engines if self._fresh else None, self._out.checkpoints / f"{self._name}-{self.version}"
        calls = senders.submit("sync", self.version, engines, folder)
        try:
            answers = wait(calls, self._limit, what)
        except EngineDied as e:
            if self._setup.colocated and len(calls) > 1:  # the other ranks stand in the transfer's own collectives
                raise WorkerDied(e.message, e.fix) from e
            raise
        self._rest("wake", what, "kv_cache")
        self.timeline.add("sync", self.version, calls, answers)
        self._fresh = False

    def _rest(self, method: str, what: str, *args: Any) -> None:
        """Engines that share the workers' GPUs `sleep` or `wake`."""
        if self._setup.colocated:
            wait(self.engines.submit(method, *args), self._limit, what)

    def _ask(self, step: int, prompts: Sequence[Row]) -> list[Call]:
        """Asks the engines for a response to each prompt and sample, from the weights that the actor has now."""
        if self._fresh:
            self.sync()
        # Given once: serialised with every call it was a quarter of the controller's own work.
        asked = ray.put(requests(prompts, self._setup.config, self._setup.seed, step))
        return self.engines.submit("run", self._program, asked, each=[(piece,) for piece in self._pieces])

    def begin(self, step: int) -> None:
        """Asks for a step's responses, where they are not on disk; `take` waits for them."""
        if (step, "rollout") in self._begun:
            return
        calls = [] if self._path(step).is_file() else self._ask(step, self._steps[step])
        if calls and self._setup.side_by_side and not self._setup.colocated:  # else the engines have the room
            for phase in LOOKS:
                self._begun[step, phase] = self._look(phase, [(call.payload,) for call in calls])
        self._begun[step, "rollout"] = calls

    def take(self, step: int) -> tuple[Any, dict[str, Any]]:
        """The reference of a step's rollouts, once they are on disk, and what is seen of them (`keep_rollouts`).

        Engines that die are replaced and asked again.
        """
        return self._with_engines(f"rollout of step {step}", partial(self._collect, step))

    def _collect(self, step: int) -> tuple[Any, dict[str, Any]]:
        size, what, path = self._setup.config.rollout_batch_size, f"rollout of step {step}", self._path(step)
        with self._out.phase("rollout"):
            self.begin(step)
            calls = self._begun.pop((step, "rollout"))
            answers = wait(calls, self._limit, what)
            (kept,) = self._groups["actor"].first.submit("keep", path, size, *[call.payload for call in calls])
            (seen,) = wait([kept], self._limit, what)
            oldest, versions = step - self._setup.config.staleness, seen["versions"]
            if not all(oldest <= version <= step for version in versions):
                raise StageFailed(
                    f"{what}: responses come from the weights of steps {versions}, the oldest allowed is {oldest}",
                    f"remove {path}",
                )
            self.timeline.add("rollout", step, calls, answers)
            if calls:  # else they were on disk already
                begun, ended = zip(*(answer["span"] for answer in answers), strict=True)
                seen["seconds"] = max(ended) - min(begun)
            self._rest("sleep", f"rest after the {what}")
        return kept.payload, seen

    def evaluate(self, held: Sequence[Row]) -> dict[str, float]:
        """Mean scores of the policy's answers to held-out prompts, the same prompts and seeds each time."""
        step = self.version - 1
        what = f"evaluation after step {step}"

        def attempt() -> list[Call]:
            calls = self._ask(-1, held)
            self.timeline.add("evaluate", step, calls, wait(calls, self._limit, what))
            return calls

        calls = self._with_engines(what, attempt)
        if self._setup.colocated:  # the rewards need the room, and the next step brings the weights again
            self._rest("sleep", what)
            self._fresh = True
        looks = self._look("score", [(call.payload,) for call in calls])
        found = wait(looks, self._limit, what)
        self.timeline.add("evaluate", step, looks, found)
        rows = sum(answer["rows"] for answer in found)
        names = {"score": "eval/score", "score_raw": "eval/score_raw", "heldout": "eval/heldout_score"}
        return {names[n]: sum(a[n] for a in found) / rows for n in names if n in found[0]}

    def look(self, phase: str, step: int, rollouts: Any) -> list[Call]:
        """Calls of the workers that a phase of `LOOKS` takes, over what `take` gave; some may have answered already."""
        early = self._begun.pop((step, phase), None)
        return early or self._look(phase, [(rollouts, piece) for piece in self._pieces])

    def _look(self, phase: str, each: list[tuple]) -> list[Call]:
        role, method = LOOKS[phase]
        group, sharded = self._groups[role], self._setup.config.inference_sharded
        return group.submit(method, each=[own for own in each for _ in (group.workers if sharded else [None])])

    def _path(self, step: int) -> Path:
        return self._out.checkpoints / f"rollouts-{step}.parquet"
