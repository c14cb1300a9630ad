"""Stage 5: the feedback model says which response is better, as a multiple choice under a drawn principle.

Its log-probabilities of (A) and (B) become the soft label (Bai et al. 2022, section 4.1). Votes are stored raw;
averaging comes first, the clamp last.
"""

import math
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cai_ray.artifacts import Manifest, StageDir
from cai_ray.config import LabelConfig, Sampling
from cai_ray.constitution import Constitution, Principle, draw
from cai_ray.generation.data_plane import map_rows
from cai_ray.records import LABELED_PAIR, Row, derive_seed
from cai_ray.stages.shared import GenerateInputs, ask, check_length, encode, read_rows
from cai_ray.templates import (
    CHOICES,
    FRAMES,
    feedback_prompt,
    feedback_prompt_messages,
    rationale_prompt,
    rationale_prompt_messages,
    verdict_prompt,
    verdict_prompt_messages,
)


def label(config: LabelConfig, inputs: GenerateInputs, out: StageDir) -> Manifest:
    """Writes one `LabeledPair` row per response pair.

    Raises:
        StageFailed: an engine died repeatedly, or more than the permitted share of rows is bad.
    """
    assert inputs.constitution is not None
    program = LabelPair(config, inputs.constitution, out.seed)
    longest = config.max_prompt_tokens + (config.max_rationale_tokens if config.format == "cot" else 0)
    engines = inputs.setup.engines(longest + 8, inputs.settings.engines)
    with out.phase("generate"):
        counts = map_rows(inputs.rows, program, engines, out, settings=inputs.settings)
    done = read_rows(out.data)
    for row in done[:8]:
        out.sample(row)
    return out.commit(inputs.key, {**counts.as_metrics(), **label_statistics(done)})


def label_statistics(rows: list[Row]) -> dict[str, float]:
    """Mean of P(A better), mean entropy (nats), and the shares of near-ties and of 'the longer is better'."""
    if not rows:
        return {}
    probs = [r["label_prob"] for r in rows]
    entropy = [-sum(q * math.log(q) for q in (p, 1 - p) if q > 0) for p in probs]
    longer = [
        (p > 0.5) == (len(r["response_a"]) > len(r["response_b"]))
        for p, r in zip(probs, rows, strict=True)
        if len(r["response_a"]) != len(r["response_b"])
    ]
    return {
        "mean_label": sum(probs) / len(probs),
        "mean_entropy": sum(entropy) / len(probs),
        "near_ties": sum(abs(p - 0.5) < 0.05 for p in probs) / len(probs),
        "prefers_longer": sum(longer) / max(1, len(longer)),
        "prefers_first": sum(p > 0.5 for p in probs) / len(probs),
    }


@dataclass(frozen=True)
class LabelPair:
    """What the engine does with one row: one vote per drawn principle and order."""

    config: LabelConfig
    constitution: Constitution
    seed: int

    @property
    def schema(self) -> pa.Schema:
        """Schema of the rows that come out."""
        return LABELED_PAIR

    async def __call__(self, row: Row, engine: Any) -> Row:
        """The row with its votes and soft label.

        Raises:
            DataError: a question is longer than `max_prompt_tokens`.
        """
        principles = self.constitution.for_feedback()
        votes, flags = [], list(row["flags"])
        for k in range(self.config.principles_per_pair):
            principle = draw(principles, derive_seed(self.seed, row["id"], f"feedback/{k}"))
            for swapped in (False, True) if self.config.swap else (False,):
                votes.append(await self._vote(engine, row, principle, k, swapped))
        prob = sum(v["prob"] for v in votes) / len(votes)  # the mean over both orders is algo.swap_average
        if self.config.clamp:
            low, high = self.config.clamp
            prob = min(max(prob, low), high)
        return {**row, "label_prob": prob, "votes": votes, "seed": self.seed, "flags": flags}

    async def _vote(self, engine: Any, row: Row, principle: Principle, k: int, swapped: bool) -> Row:
        config, language = self.config, self.constitution.language
        a, b = row["response_a"], row["response_b"]
        first, second = (b, a) if swapped else (a, b)
        head = (row["messages"], principle.preference_question or "", first, second)
        plain = engine.tokenizer.format == "plain" or config.format == "plain"
        rationale = ""
        if config.format == "cot":
            shots = self.constitution.cot_few_shots[: config.few_shots]
            opening: Any = (rationale_prompt if plain else rationale_prompt_messages)(*head, shots, language)
            limits = Sampling(
                max_prompt_tokens=config.max_prompt_tokens, max_new_tokens=config.max_rationale_tokens, temperature=1.0
            )
            step, stop = f"rationale/{k}/{int(swapped)}", FRAMES[language].rationale_stops
            done = await ask(engine, opening, row, step, self.seed, limits, stop=stop)
            rationale = done.text
            # A rationale that never reaches a verdict is asked for one all the same: the label is never a guess.
            prompt: Any = (verdict_prompt if plain else verdict_prompt_messages)(opening, rationale, language)
            limit = config.max_prompt_tokens + config.max_rationale_tokens
        else:
            shots = self.constitution.feedback_few_shots[: config.few_shots]
            prompt = (feedback_prompt if plain else feedback_prompt_messages)(*head, shots, language)
            limit = config.max_prompt_tokens
        ids = check_length(encode(engine.tokenizer, prompt), limit)
        logprob_a, logprob_b = await engine.choose(ids, [engine.tokenizer.text(c) for c in CHOICES])
        # choice_probability of algo.preference on two floats; this process holds no tensors of its own.
        prob_first = 1 / (1 + math.exp(min(logprob_b - logprob_a, 700.0)))
        return {
            "principle_id": principle.id,
            "swapped": swapped,
            "logprob_a": logprob_a,
            "logprob_b": logprob_b,
            "prob": 1 - prob_first if swapped else prob_first,
            "rationale": rationale,
        }
