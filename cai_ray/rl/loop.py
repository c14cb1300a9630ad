"""PPO's controller: a loop that moves references, never tensors.

A batch is what an actor's method returned; it goes from worker to worker through Ray's object store. Only
scalars, ids, a few samples and the probe's few sequences come here.
"""

import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from statistics import fmean
from typing import Any

import pyarrow as pa
import ray

from cai_ray.algo.kl import AdaptiveKL, FixedKL
from cai_ray.artifacts import Bar, Show, StageDir
from cai_ray.errors import StageFailed
from cai_ray.models.memory import KEEP_MEMORY
from cai_ray.models.tokenization import Tokenizer
from cai_ray.records import Row, derive_seed
from cai_ray.rl.checkpoints import commit_checkpoint, go_back, last_checkpoint
from cai_ray.rl.groups import RETRIES, Call, EngineDied, Group, Placement, WorkerDied, placed, wait
from cai_ray.rl.guards import Guards, RollBack
from cai_ray.rl.rewards import Reward
from cai_ray.rl.rollouts import prompts_of_steps
from cai_ray.rl.sampler import LOOKS, Sampler
from cai_ray.rl.setup import Setup
from cai_ray.rl.weight_sync import check_gap
from cai_ray.rl.workers import Actor, Critic, Reference
from cai_ray.training.batches import step_rows

CLASSES: dict[str, type] = {"actor": Actor, "critic": Critic, "reward": Reward, "reference": Reference}
TRAINER_RESTARTS = 2  # times that lost workers are started again from the same checkpoint
ROLL_BACKS = 3  # times that the run goes back because of its KL; kl_coef doubles each time
log = logging.getLogger(__name__)


def run_ppo(
    setup: Setup,
    prompts: Sequence[Row],
    get_engines: Callable[..., list[Any]],
    out: StageDir,
    progress: Show,
    sl_rows: pa.Table | None = None,
    max_bad_fraction: float = 1.0,
    held: Sequence[Row] = (),
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Trains the policy against its rewards; continues from the last whole checkpoint in `out`.

    Args:
        setup: configuration, models, and where they run.
        prompts: `Prompt` rows to train on, harmful and helpful.
        get_engines: gives handles of `EngineActor`s that hold the policy, dead ones replaced; where engines and workers
            share GPUs, it is called with the placement group.
        out: gets metrics, samples, the timeline, checkpoints, snapshots and the model.
        progress: opens a progress bar, which is told (steps done, steps, a few words).
        sl_rows: what `ppo.ptx_coef` mixes in: id, prompt_ids, response_ids.
        max_bad_fraction: more prompts than this share that are too long fail the stage.
        held: prompts that are not trained on, for `ppo.evaluate_every`; those that are too long are left out.

    Returns the last step's metrics with counts, and role -> [{pid, node}] of each worker.

    Raises:
        ResourceError: the cluster cannot hold the workers.
        DataError: no prompt fits, or a preference model does not suit the policy.
        StageFailed: a worker did not answer, engine and actor disagree, a number is not finite, or KL is over its
            limit.
    """
    config = setup.config
    tokenizer = Tokenizer.load(setup.policy, setup.format)
    steps, too_long, looked_at = prompts_of_steps(prompts, config, setup.seed, tokenizer)
    if config.evaluate_every:
        (held,), unused, looked = prompts_of_steps(held, config.model_copy(update={"steps": 1}), setup.seed, tokenizer)
        too_long, looked_at = too_long + unused, looked_at + looked
    out.checkpoints.mkdir(parents=True, exist_ok=True)
    out.quarantine(too_long, looked_at, max_bad_fraction)
    failures: Counter[int] = Counter()  # by the step that the last checkpoint continues from
    roll_backs = 0
    if not setup.colocated:
        get_engines()  # before the workers, who on few GPUs share what the engines leave
    ranks = {role: learner.sharding.ranks for role, learner in config.learners.items()}
    ranks |= dict.fromkeys(("reward", "reference"), config.inference_ranks)
    room = placed(ranks, setup.device, setup.cluster.start_timeout_s, setup.colocated)
    with room as placement:  # kept over restarts: Ray frees what it held only after a while
        where = [placement.group] if setup.colocated else []

        def rollout_engines() -> Group:
            return Group("rollout", get_engines(*where), EngineDied)

        while True:
            try:
                engines = rollout_engines()
                if setup.colocated:  # until the workers have loaded what they need
                    wait(engines.submit("sleep"), setup.cluster.step_timeout_s, "the rollout engines' rest")
                with started(setup, placement) as groups, progress() as bar:
                    sampler = Sampler(setup, steps, out, groups, engines, rollout_engines)
                    metrics, workers = _Controller(setup, groups, sampler, out, bar, sl_rows, held).run()
                break
            except RollBack as e:
                if (roll_backs := roll_backs + 1) > ROLL_BACKS:
                    raise
                if not go_back(out.checkpoints, e.step):
                    raise StageFailed(f"{e.message}; no checkpoint from before it is left", e.fix) from e
                out.warn(f"PPO, {e.message}; back to the checkpoint before, with twice the kl_coef.")
            except (WorkerDied, EngineDied) as e:
                found = last_checkpoint(out.checkpoints)
                failures[found[1]["step"] if found else 0] += 1
                if max(failures.values()) > TRAINER_RESTARTS:
                    raise
                log.warning("%s; starting again from the last checkpoint", e.message)
    counts = {"prompts_used": len({row["id"] for step in steps for row in step}), "quarantined": len(too_long)}
    return {**metrics, "steps": config.steps, **counts}, workers


@contextmanager
def started(setup: Setup, placement: Placement) -> Iterator[dict[str, Group]]:
    """The groups of the roles that have room, by name, models loaded; they end with the block.

    Raises:
        StageFailed: one did not start within `cluster.start_timeout_s` seconds.
    """
    timeout_s, memory = setup.cluster.start_timeout_s, {} if setup.device == "gpu" else KEEP_MEMORY
    groups: dict[str, Group] = {}
    try:
        for role in placement.ranks:
            threads = str(setup.learner(role).sharding.cpus_per_rank)
            env = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", **memory}
            groups[role] = placement.start(role, CLASSES[role], env, 0 if setup.joined(role) else RETRIES, setup)
        ready: list[Call] = []
        for role, group in groups.items():
            if setup.joined(role):
                # Of all, so that all have started: how long they may wait for each other is not how long a start takes.
                (where, *_) = wait(group.submit("address"), timeout_s, f"start of the {role}")
                ready += group.submit("join", where["address"], where["port"])
            else:
                ready += group.submit("info")
        wait(ready, timeout_s, "start of PPO's workers")
        yield groups
    finally:
        for group in groups.values():
            group.kill()


# ---- the loop -------------------------------------------------------------------------------------------------------


@dataclass
class _Controller:
    """One attempt at the whole loop, with the groups that it has."""

    setup: Setup
    groups: dict[str, Group]
    sampler: Sampler
    out: StageDir
    bar: Bar
    sl_rows: pa.Table | None
    held: Sequence[Row]

    def __post_init__(self) -> None:
        config, self.limit = self.setup.config, self.setup.cluster.step_timeout_s
        self.config, self.learners = config, list(config.learners)
        self.kl: FixedKL = FixedKL(config.kl_coef)
        if config.kl_target:
            self.kl = AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)
        self.sl_ref = None if self.sl_rows is None else ray.put(self.sl_rows)

    def run(self) -> tuple[dict[str, float], dict[str, list[dict[str, Any]]]]:
        """Runs every step that no checkpoint covers and exports the policy; the last metrics, and who worked.

        Raises:
            RollBack: the policy has gone too far.
        """
        workers, metrics = self._workers(), self._train(self._resume())
        with self.out.phase("export"):
            written = self.groups["actor"].submit("export", self.out.model, self.out.path / "adapter")
            wait(written, self.limit, "export of the policy")
        return metrics, workers

    def _train(self, first: int) -> dict[str, float]:
        config, metrics, taken = self.config, {}, None
        guards, sl_batches = Guards(config, self.out.path / "metrics.jsonl"), self._sl_batches(first)
        self.out.warnings += [text for text in guards.earlier if text not in self.out.warnings]
        self.begun, self.before = time.monotonic(), dict(self.out.phases)
        for step in range(first, config.steps):
            # 1. Roll out on the engines, which hold the actor's weights; kept on disk before anything else happens.
            # With staleness the next step's rollouts begin here, and this step trains meanwhile.
            rollouts, seen = taken or self.sampler.take(step)
            ahead = config.staleness and step + 1 < config.steps
            if ahead:
                self.sampler.begin(step + 1)
            ids = seen["ids"]

            # 2., 3. Score, reference log-probs, old log-probs, values. With a single optimizer step of a single
            # micro-batch the update goes on from these forward passes; else it computes them again.
            learners = self.learners[step < config.critic_warmup_steps :]
            shuffle = derive_seed(self.setup.seed, f"step {step}", "ppo/minibatches")
            updates = [rows for _, rows in step_rows(ids, shuffle, config.ppo_epochs, config.minibatch_size)]
            forwards = {phase: partial(self.sampler.look, phase, step, rollouts) for phase in LOOKS}
            for role in (r for r in self.learners if r == "critic" or config.old_logprobs == "trainer"):
                method, keep = "values" if role == "critic" else "logprobs", role in learners and len(updates) == 1
                forwards[method] = partial(self.groups[role].submit, method, rollouts, keep)
            parts = self._phases(step, forwards)

            # 4., 5., 6. Shape rewards, estimate advantages, whiten them: in one place, which has the whole batch.
            payloads = [call.payload for calls, _ in parts.values() for call in calls]
            how = ("experience", config, self.kl.coef, rollouts, *payloads)
            shape = {"advantages": partial(self.groups["actor"].first.submit, *how)}
            ((shapes,), (shaped,)) = self._phases(step, shape)["advantages"]
            experience, metrics = shapes.payload, shaped["metrics"]
            for alarm in guards.check(step, metrics):
                self.out.warn(alarm)
            if seen["versions"] == [step]:  # an older policy's rollouts differ for a better reason
                check_gap(metrics["rollout/logprob_gap"], self.sampler.gap_limit, f"in the rollouts of step {step}")

            # 7. Update actor and critic, minibatch by minibatch.
            calls, plan = {}, ray.put(updates)  # given once, not with the call of every rank
            for role in learners:
                mixed = (list(islice(sl_batches, len(updates))), self.sl_ref) if role == "actor" else ()
                how = ("update", experience, plan, self.kl.coef, *mixed)
                calls[f"update_{role}"] = partial(self.groups[role].submit, *how)
            stats = self._phases(step, calls)
            self.sampler.version = step + 1
            if "actor" in learners:  # while only the critic learns there is no KL to go by
                self.kl.update(metrics["objective/kl"], len(ids))

            # 8. Send the new weights to the engines, and see that both sides compute the same with them.
            taken = self.sampler.take(step + 1) if ahead else None
            metrics["policy/logprob_shift"] = self.sampler.send_weights(experience)

            # 9. Evaluate, log, checkpoint (whose time shows in the next step's line).
            if config.evaluate_every and (step + 1) % config.evaluate_every == 0:
                with self.out.phase("evaluate"):
                    metrics |= self.sampler.evaluate(self.held)
            for role, name in (("actor", "policy"), ("critic", "value")):
                metrics |= _learning(name, stats[f"update_{role}"][1]) if role in learners else {}
            self._log(step, metrics, shaped["samples"], seen)
            self._snapshot(step + 1, metrics)
            if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
                self._checkpoint(step + 1)
        return metrics

    # ---- what the steps are made of ---------------------------------------------------------------------------------

    def _phases(
        self, step: int, calls: Mapping[str, Callable[[], list[Call]]]
    ) -> dict[str, tuple[list[Call], list[Any]]]:
        """Submits the calls of every phase, all at once where roles work side by side, and awaits the answers."""
        begun = {phase: submit() for phase, submit in calls.items()} if self.setup.side_by_side else {}
        out = {}
        for phase, submit in calls.items():
            with self.out.phase(phase):
                sent = begun.get(phase) or submit()
                out[phase] = sent, wait(sent, self.limit, phase)
            self.sampler.timeline.add(phase, step, *out[phase])
        return out

    def _sl_batches(self, first: int) -> Iterator[list[int]]:
        """The SL rows of each of the actor's optimizer steps from step `first` on, in an order of their own."""
        if self.sl_rows is not None:
            config, seed = self.config, derive_seed(self.setup.seed, "sl rows", "ppo")
            each, ids = self.setup.updates, self.sl_rows["id"].to_pylist()
            start = each * max(0, first - config.critic_warmup_steps)
            for _, batch in step_rows(ids, seed, each * config.steps, config.minibatch_size, start):
                yield batch

    def _workers(self) -> dict[str, list[dict[str, Any]]]:
        groups = {**self.groups, "rollout": self.sampler.engines}
        found = {role: wait(group.submit("info"), self.limit, f"the {role}'s start") for role, group in groups.items()}
        return {role: [{k: info[k] for k in ("pid", "node")} for info in infos] for role, infos in found.items()}

    def _resume(self) -> int:
        """Loads the last whole checkpoint, clears what came after it, and brings the engines to the same weights."""
        step = 0
        if found := last_checkpoint(self.out.checkpoints):
            folder, state = found
            loads = [c for role in self.learners for c in self.groups[role].submit("load", folder / role)]
            wait(loads, self.limit, f"loading {folder.name}")
            step = state["step"]
            self.kl.coef = state["kl_coef"]
        elif self.config.on_kl_limit == "roll_back":
            self._checkpoint(0)  # what there is to go back to before the first other one
        self.out.forget_from(step)
        self.sampler.version = step
        self.sampler.sync()
        return step

    def _snapshot(self, step: int, metrics: Mapping[str, float]) -> None:
        """The policy after `step` steps, where it is due.

        It comes before a checkpoint: whoever dies meanwhile comes back to a step before it and writes it once more.
        """
        if self.config.snapshots and step < self.config.steps and step % self.config.snapshots == 0:
            with self.out.phase("snapshot"):
                target = self.out.path / "snapshots" / f"step-{step}"
                wait(self.groups["actor"].submit("export", target), self.limit, f"snapshot {target.name}")
                self.out.write_card(target, {"steps": step, **metrics})

    def _checkpoint(self, step: int) -> None:
        """A checkpoint from which step `step` continues."""
        with self.out.phase("checkpoint"):
            folder = self.out.checkpoints / f"step-{step}"
            shutil.rmtree(folder, ignore_errors=True)
            saves = [c for role in self.learners for c in self.groups[role].submit("save", folder / role)]
            wait(saves, self.limit, f"checkpoint {folder.name}")
            keep = 2 if self.config.on_kl_limit == "roll_back" else 1
            commit_checkpoint(folder, {"step": step, "kl_coef": self.kl.coef}, keep)

    def _log(self, step: int, metrics: dict[str, float], samples: list[Row], seen: dict[str, Any]) -> None:
        wall, tokens, before = time.monotonic() - self.begun, seen["tokens"], self.before
        self.begun, self.before = time.monotonic(), dict(self.out.phases)
        times = {phase: seconds - before.get(phase, 0.0) for phase, seconds in self.before.items()}
        metrics |= {f"time/{phase}": seconds for phase, seconds in times.items() if seconds}
        metrics |= {"time/step": wall, "perf/tokens_per_s": tokens / wall}
        if "seconds" in seen:
            metrics["rollout/tokens_per_s"] = seen["response_tokens"] / seen["seconds"]
        for row in samples:
            self.out.sample({"step": step, **row})
        self.out.metrics(step, metrics)
        score, kl = metrics["objective/score"], metrics["objective/kl"]
        self.bar(step + 1, self.config.steps, f"score {score:.2f}, KL {kl:.3f}, {tokens / wall:.0f} tokens/s")


def _learning(name: str, ranks: list[dict[str, Any]]) -> dict[str, float]:
    """Metrics of an update: sums over ranks; the norm and the rate are the same on all."""
    sums: dict[str, float] = {f"{name}/{key}": sum(rank["sums"][key] for rank in ranks) for key in ranks[0]["sums"]}
    perf = {"perf/mfu": fmean(rank["mfu"] for rank in ranks)} if name == "policy" and "mfu" in ranks[0] else {}
    return sums | perf | {f"{name}/{key}": ranks[0][key] for key in ("grad_norm", "lr")}
