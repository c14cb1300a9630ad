"""PPO's controller: a synchronous on-policy loop that moves references, never tensors.

A batch is what a task or an actor's method returned; it goes from worker to worker through Ray's object store. Only
scalars, lengths, a few samples and the probe's few sequences come here.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import ray

from cai_ray.algo.kl import FixedKL
from cai_ray.artifacts import StageDir, write_atomic
from cai_ray.errors import StageFailed
from cai_ray.models.tokenization import Tokenizer
from cai_ray.records import Row, derive_seed
from cai_ray.rl.batches import Plan
from cai_ray.rl.checkpoints import commit_checkpoint, last_checkpoint
from cai_ray.rl.groups import Call, EngineDied, Group, WorkerDied, engine_calls, wait
from cai_ray.rl.roles import started
from cai_ray.rl.rollouts import RollOut, keep_rollouts, make_experience, prompts_of_steps, requests
from cai_ray.rl.weight_sync import GAP_LIMITS, check_gap, mean_gap
from cai_ray.rl.workers import Setup
from cai_ray.training.batches import layout, step_rows

TRAINER_RESTARTS = 2  # times that a lost actor or critic is started again from the last checkpoint
ROLLOUT_TRIES = 3
log = logging.getLogger(__name__)

Bar = Callable[[float, float | None, str], None]


def run_ppo(
    setup: Setup,
    prompts: Sequence[Row],
    get_engines: Callable[[], list[Any]],
    out: StageDir,
    progress: Callable[[], AbstractContextManager[Bar]],
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Trains the policy against the preference model; continues from the last whole checkpoint in `out`.

    Args:
        setup: configuration, models, and where they run.
        prompts: `Prompt` rows to train on, harmful and helpful.
        get_engines: gives handles of `EngineActor`s that hold the policy, dead ones replaced; they hold it again at the
            end.
        out: gets metrics, samples, checkpoints, snapshots and the model.
        progress: opens a progress bar, which is told (steps done, steps, a few words).

    Returns the last step's metrics with counts, and role -> [{pid, node}] of each worker.

    Raises:
        ResourceError: the cluster cannot hold the workers.
        DataError: no prompt fits, or the preference model does not suit the policy.
        StageFailed: a worker did not answer, engine and actor disagree, or the gradient is not finite.
    """
    config = setup.config
    steps, too_long = prompts_of_steps(prompts, config, setup.seed, Tokenizer.load(setup.policy, setup.format))
    out.path.mkdir(parents=True, exist_ok=True)
    write_atomic(out.quarantine_path, "".join(json.dumps(row) + "\n" for row in too_long))
    for attempt in range(TRAINER_RESTARTS + 1):
        try:
            engines = get_engines()
            with started(setup) as groups, progress() as bar:
                metrics, workers = _Controller(setup, groups, engines, get_engines, steps, out, bar).run()
            break
        except (WorkerDied, EngineDied) as e:
            if attempt == TRAINER_RESTARTS:
                raise
            log.warning("%s; starting again from the last checkpoint", e.message)
    counts = {"prompts_used": len({row["id"] for step in steps for row in step}), "quarantined": len(too_long)}
    return {**metrics, "steps": config.steps, **counts}, workers


# ---- the loop -------------------------------------------------------------------------------------------------------


@dataclass
class _Controller:
    """One attempt at the whole loop, with the groups that it has."""

    setup: Setup
    groups: dict[str, Group]
    engines: list[Any]
    get_engines: Callable[[], list[Any]]
    steps: list[list[Row]]
    out: StageDir
    bar: Bar

    def __post_init__(self) -> None:
        self.config, self.limit = self.setup.config, self.setup.cluster.step_timeout_s
        self.gap_limit = max(GAP_LIMITS[self.setup.engine_dtype], GAP_LIMITS[self.config.actor.sharding.dtype])
        self.kl = FixedKL(self.config.kl_coef)
        self.keep: Any = ray.remote(num_cpus=0, num_returns=2)(keep_rollouts)
        self.shape: Any = ray.remote(num_cpus=0, num_returns=2)(make_experience)

    def run(self) -> tuple[dict[str, float], dict[str, list[dict[str, Any]]]]:
        """Runs every step that no checkpoint covers and exports the policy; the last metrics, and who worked."""
        config, out, metrics = self.config, self.out, {}
        workers = self._workers()
        first = self._resume()
        self.begun, self.before = time.monotonic(), dict(out.phases)
        for step in range(first, config.steps):
            # 1. Roll out on the engines, which hold the actor's weights; kept on disk before anything else happens.
            rollouts, seen = self._roll_out(step)
            lengths, ids = seen["lengths"], seen["ids"]

            # 2., 3. Score, reference log-probs, old log-probs, values. With a single optimizer step of a single
            # micro-batch the update goes on from these forward passes; else it computes them again.
            shuffle = derive_seed(self.setup.seed, f"step {step}", "ppo/minibatches")
            updates = [rows for _, rows in step_rows(ids, shuffle, config.ppo_epochs, config.minibatch_size)]
            plans = {role: [self._split(role, rows, lengths) for rows in updates] for role in ("actor", "critic")}
            whole = {role: self._split(role, range(len(ids)), lengths) for role in self.groups}
            keep = {role: len(updates) == 1 and len(whole[role][0]) == 1 for role in plans}
            parts = self._phases(
                {
                    "score": ("reward", "score", rollouts, [(plan,) for plan in whole["reward"]]),
                    "reference": ("reference", "logprobs", rollouts, [(plan,) for plan in whole["reference"]]),
                    "logprobs": ("actor", "logprobs", rollouts, [(plan, keep["actor"]) for plan in whole["actor"]]),
                    "values": ("critic", "values", rollouts, [(plan, keep["critic"]) for plan in whole["critic"]]),
                }
            )

            # 4., 5., 6. Shape rewards, estimate advantages, whiten them over the whole batch: one task, which has it.
            with self.out.phase("advantages"):
                payloads = [call.payload for calls, _ in parts.values() for call in calls]
                experience, done = self.shape.remote(config, self.kl.coef, rollouts, *payloads)
                (shaped,) = wait([Call("the advantage task", done)], self.limit, f"advantages of step {step}")
            metrics = shaped["metrics"]
            check_gap(metrics["rollout/logprob_gap"], self.gap_limit, f"in the rollouts of step {step}")

            # 7. Update actor and critic, minibatch by minibatch.
            totals = [sum(seen["responses"][row] for row in rows) for rows in updates]
            stats = self._phases(
                {
                    f"update_{role}": (role, "update", experience, [(own, totals) for own in zip(*plan, strict=True)])
                    for role, plan in plans.items()
                }
            )
            self.kl.update(metrics["objective/kl"], len(ids))

            # 8. Send the new weights to the engines, and see that both sides compute the same with them.
            with self.out.phase("sync"):
                self._sync(step + 1)
                metrics["policy/logprob_shift"] = self._probe(experience, seen["probe"], step)

            # 9. Log, checkpoint (whose time shows in the next step's line).
            metrics |= _learning("policy", stats["update_actor"][1]) | _learning("value", stats["update_critic"][1])
            self._log(step, metrics, shaped["samples"], seen)
            self._keep(step + 1)
        with out.phase("export"):
            wait(self.groups["actor"].submit("export", out.model), self.limit, "export of the policy")
            self._ask_engines("load_checkpoint", self.setup.policy, self.setup.format)
        return metrics, workers

    # ---- what the steps are made of ---------------------------------------------------------------------------------

    def _phases(
        self, calls: Mapping[str, tuple[str, str, Any, list[tuple]]]
    ) -> dict[str, tuple[list[Call], list[Any]]]:
        """Submits phase -> (role, method, batch, the rest for each rank) and awaits the answers.

        On GPUs roles work side by side, on CPU they take turns and each has all cores.
        """

        def submit(phase: str) -> list[Call]:
            role, method, batch, each = calls[phase]
            return self.groups[role].submit(method, batch, each=each)

        begun = {phase: submit(phase) for phase in calls} if self.setup.device == "gpu" else {}
        out = {}
        for phase in calls:
            with self.out.phase(phase):
                sent = begun.get(phase) or submit(phase)
                out[phase] = sent, wait(sent, self.limit, phase)
        return out

    def _split(self, role: str, rows: Sequence[int], lengths: Sequence[int]) -> list[Plan]:
        sharding = (self.config.actor if role in ("actor", "reference") else self.config.critic).sharding
        return layout(sorted(rows), lengths, len(self.groups[role].workers), sharding.microbatch_tokens)

    def _ask_engines(self, method: str, *args: Any) -> list[Any]:
        return wait(engine_calls(self.engines, method, *args), self.limit, f"rollout engines ({method})")

    def _workers(self) -> dict[str, list[dict[str, Any]]]:
        found = {r: wait(g.submit("info"), self.limit, f"the {r}'s start") for r, g in self.groups.items()}
        return found | {"rollout": [{k: info[k] for k in ("pid", "node")} for info in self._ask_engines("info")]}

    def _resume(self) -> int:
        """Loads the last whole checkpoint, clears what came after it, and brings the engines to the same weights."""
        step, found = 0, last_checkpoint(self.out.checkpoints)
        if found:
            folder, state = found
            loads = [c for role in ("actor", "critic") for c in self.groups[role].submit("load", folder / role)]
            wait(loads, self.limit, f"loading {folder.name}")
            self.kl.load_state_dict(state["kl"])
            step = state["step"]
        self.out.forget_from(step)
        self._sync(step, fresh=True)
        return step

    def _roll_out(self, step: int) -> tuple[Any, dict[str, Any]]:
        """The step's rollouts, and what is seen of them; dead engines are replaced."""
        for attempt in range(1, ROLLOUT_TRIES + 1):
            try:
                with self.out.phase("rollout"):
                    return self._sample(step)
            except EngineDied as e:
                log.warning("%s; starting it again (%d of %d)", e.message, attempt, ROLLOUT_TRIES)
                self.engines = self.get_engines()
        raise StageFailed(f"rollout of step {step}: engines died {ROLLOUT_TRIES} times", "see the engines' logs")

    def _sample(self, step: int) -> tuple[Any, dict[str, Any]]:
        """The rollouts on disk, or fresh ones from engines that hold this step's weights."""
        size, path = self.config.rollout_batch_size, self.out.checkpoints / f"rollouts-{step}.parquet"
        calls, what = [], f"rollout of step {step}"
        if not path.is_file():
            if {info["version"] for info in self._ask_engines("info")} != {step}:
                self._sync(step, fresh=True)
            asked, share = requests(self.steps[step], self.config, self.setup.seed, step), -(-size // len(self.engines))
            parts = [(asked.slice(i * share, share),) for i in range(len(self.engines))]
            calls = engine_calls(self.engines, "run", RollOut(self.config), each=parts, fetch=False)
        wait(calls, self.limit, what)
        rollouts, done = self.keep.remote(path, size, *[call.done for call in calls])
        (seen,) = wait([Call("an engine", done, lost=EngineDied)], self.limit, what)
        if seen["versions"] != [step]:
            raise StageFailed(f"{what}: responses come from the weights of steps {seen['versions']}", f"remove {path}")
        return rollouts, seen

    def _sync(self, version: int, fresh: bool = False) -> None:
        calls = self.groups["actor"].submit("sync", self.engines, version, fresh)
        wait(calls, self.limit, f"weight sync before step {version}")

    def _probe(self, experience: Any, probe: list[tuple[list[int], list[int]]], step: int) -> float:
        """Compares engines and actor on a few of the step's responses; returns how far the update moved them."""
        # Engines want room for one more token, which the longest response has used up: its last token is left out.
        room = self.config.max_prompt_tokens + self.config.max_new_tokens - 1
        ids, starts = [(p + r)[:room] for p, r in probe], [len(p) for p, _ in probe]
        calls = self.groups["actor"].submit("probe", experience, list(range(len(probe))))
        calls += engine_calls(self.engines, "prompt_logprobs", ids, starts)
        actor, *others = wait(calls, self.limit, f"probe after step {step}")
        for engine in others[len(self.groups["actor"].workers) - 1 :]:
            check_gap(mean_gap(actor["logprobs"], engine), self.gap_limit, f"after the weight sync of step {step}")
        return actor["shift"]

    def _keep(self, step: int) -> None:
        """A checkpoint from which step `step` continues, and a snapshot, where they are due."""
        config, actor = self.config, self.groups["actor"]
        if step < config.steps and step % config.checkpoint_every == 0:
            with self.out.phase("checkpoint"):
                folder = self.out.checkpoints / f"step-{step}"
                shutil.rmtree(folder, ignore_errors=True)
                saves = [c for role in ("actor", "critic") for c in self.groups[role].submit("save", folder / role)]
                wait(saves, self.limit, f"checkpoint {folder.name}")
                commit_checkpoint(folder, {"step": step, "kl": self.kl.state_dict()})
        if config.snapshots and step < config.steps and step % config.snapshots == 0:
            with self.out.phase("snapshot"):
                target = self.out.path / "snapshots" / f"step-{step}"
                wait(actor.submit("export", target), self.limit, f"snapshot {target.name}")

    def _log(self, step: int, metrics: dict[str, float], samples: list[Row], seen: dict[str, Any]) -> None:
        wall, tokens, before = time.monotonic() - self.begun, sum(seen["lengths"]), self.before
        self.begun, self.before = time.monotonic(), dict(self.out.phases)
        times = {phase: seconds - before.get(phase, 0.0) for phase, seconds in self.before.items()}
        metrics |= {f"time/{phase}": seconds for phase, seconds in times.items() if seconds}
        metrics |= {"time/step": wall, "perf/tokens_per_s": tokens / wall}
        metrics["rollout/tokens_per_s"] = sum(seen["responses"]) / times["rollout"]
        self.out.metrics(step, metrics)
        for row in samples:
            self.out.sample({"step": step, **row})
        score, kl = metrics["objective/score"], metrics["objective/kl"]
        self.bar(step + 1, self.config.steps, f"score {score:.2f}, KL {kl:.3f}, {tokens / wall:.0f} tokens/s")


def _learning(name: str, ranks: list[dict[str, Any]]) -> dict[str, float]:
    """Metrics of an update: sums over ranks; the norm and the rate are the same on all."""
    sums: dict[str, float] = {f"{name}/{key}": sum(rank["sums"][key] for rank in ranks) for key in ranks[0]["sums"]}
    return sums | {f"{name}/{key}": ranks[0][key] for key in ("grad_norm", "lr")}
