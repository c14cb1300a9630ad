"""Signs that a run goes wrong: what ends it, what rolls it back, and what it warns of."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean

from cai_ray.config import PPOConfig
from cai_ray.errors import StageFailed

WINDOW = 5  # steps that are averaged
REPETITIVE, LONGER, MOVED = 0.5, 2.0, 0.1  # share of responses; times as long; spreads of a preference model's scores


class RollBack(StageFailed):
    """KL went over its limit at `step`; the run goes on from an earlier checkpoint with a larger coefficient."""

    step: int


class Guards:
    """Looks at each step's metrics; those of earlier processes have raised the alarms `earlier`."""

    def __init__(self, config: PPOConfig, metrics: Path):
        self._config, self._raised, self._seen = config, set[str](), list[Mapping[str, float]]()
        lines = metrics.read_text("utf-8").splitlines() if metrics.is_file() else []
        self.earlier = [text for row in map(json.loads, lines) for text in self._note(row["step"], row)]

    def check(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Alarms that were not raised before, as sentences.

        Raises:
            StageFailed: a metric is not finite.
            RollBack, StageFailed: the step's KL is above `kl_limit`; which of them, `on_kl_limit` says.
        """
        if bad := sorted(name for name, value in metrics.items() if not math.isfinite(value)):
            raise StageFailed(
                f"step {step}: {', '.join(bad)} not finite",
                "its rollouts are kept in checkpoints/; look for extreme scores, or lower the learning rates",
            )
        kl, limit = metrics["objective/kl"], self._config.kl_limit
        if limit is not None and kl > limit:
            found = (RollBack if self._config.on_kl_limit == "roll_back" else StageFailed)(
                f"step {step}: the policy is {kl:.3g} nats a response from the reference, ppo.kl_limit is {limit:g}",
                "raise ppo.kl_coef or lower ppo.actor.optim.lr, with --rebuild",
            )
            if isinstance(found, RollBack):
                found.step = step
            raise found
        return self._note(step, metrics)

    def _note(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        self._seen.append(metrics)
        found = {name: text for name, text in self._alarms() if name not in self._raised}
        self._raised |= set(found)
        return [f"PPO, step {step}: {text}" for text in found.values()]

    def _alarms(self) -> Iterator[tuple[str, str]]:
        first, last = self._seen[:WINDOW], self._seen[-WINDOW:]

        def mean(name: str, steps: list[Mapping[str, float]]) -> float:
            return fmean(step[name] for step in steps)

        if (share := mean("rollout/repetitive", last)) > REPETITIVE:
            yield "repetition", f"{share:.0%} of the responses repeat themselves: the policy collapses."
        before, now = (mean("rollout/length", steps) for steps in (first, last))
        if len(self._seen) >= 2 * WINDOW and now > LONGER * before:
            yield "length", f"responses have {now:.0f} tokens, at first {before:.0f}: length is being rewarded."
        if len(self._seen) >= 2 * WINDOW and "objective/heldout_score" in self._seen[0]:
            before = self._seen[-2 * WINDOW : -WINDOW]
            score, heldout = (mean(n, last) - mean(n, before) for n in ("objective/score", "objective/heldout_score"))
            if score > MOVED and heldout < -MOVED:
                yield "exploit", f"the score rose by {score:.2f} while the held-out model's fell by {-heldout:.2f}."
