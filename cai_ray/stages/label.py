"""Stage 5: the feedback model says which response is better, as a multiple choice under a drawn principle.

Its log-probabilities of (A) and (B) become the soft label (Bai et al. 2022, section 4.1); RLAIF's two formats (Lee et
al. 2023) ask for a number or for scores instead. Votes are stored raw; averaging comes first, `hard` or `clamp` last.
Before any label the judge is asked about comparisons whose answer is known.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from typing import Any

from cai_ray import templates
from cai_ray.algo.preference import clamp_probability
from cai_ray.algo.rating import ELO_PER_NAT, fit_elo
from cai_ray.algo.scores import choice_distribution, expected_score, probability_higher
from cai_ray.artifacts import Manifest, StageDir
from cai_ray.config import VERDICT_TOKENS, LabelConfig, Sampling
from cai_ray.constitution import Constitution, FeedbackFewShot, Principle, draw, with_balanced_answers, with_questions
from cai_ray.errors import CaiError, StageFailed
from cai_ray.evaluation.judge import gold_statistics, judge_statistics, opinion
from cai_ray.generation.data_plane import map_rows
from cai_ray.generation.engine import choice_logprobs
from cai_ray.models.tokenization import PromptText, encode_choices
from cai_ray.records import LABELED_PAIR, RESPONSE_PAIR, Row, derive_seed, row_id
from cai_ray.sources import read_comparisons
from cai_ray.stages.shared import StageInputs, around, ask, check_length, fit_turns, read_rows, warn_of_few, write_rows

# What builds a question, and what puts a rationale behind it and asks for the choice; other formats ask at once.
_FORMATS: dict[str, tuple[Any, Any]] = {
    "cot": (templates.RATIONALE, templates.VERDICT),
    "rlaif": (templates.RLAIF, templates.RLAIF_VERDICT),
    "score": (templates.SCORE, None),
}
_BETTER = "name a larger or better models.feedback, or ask otherwise (label.format, few_shots, swap), with --rebuild"


def label(config: LabelConfig, inputs: StageInputs, out: StageDir) -> Manifest:
    """Writes one `LabeledPair` row per response pair.

    Raises:
        ConfigError: the constitution's examples cannot be shown.
        StageFailed: the judge failed the gate, an engine died repeatedly, or too many rows are bad.
    """
    assert inputs.constitution is not None
    program = LabelPair(config, inputs.constitution, out.seed)
    metrics: dict[str, float] = {"few_shots": len(program.shots)}
    warn_of_few(out, config.few_shots, len(program.shots))
    setup = replace(inputs.setup, format="chat") if config.format == "chat" else inputs.setup
    engines = setup.engines(config.max_tokens)
    if config.judge_gate != "off":
        with out.phase("gate"):
            metrics |= pass_gate(program, inputs, engines, out)
    with out.phase("generate"):
        counts = map_rows(inputs.rows[0], program, engines, out, settings=inputs.settings)
    done = read_rows(out.data)
    if config.ranking:  # until the manifest is written, the same command gathers the votes again
        done = ranked(config, done)
        write_rows(done, LABELED_PAIR, out.data)
    for row in done[:8]:
        out.sample(row)
    return out.commit(inputs.key, {**counts, **judge_statistics(done), **metrics})


def pass_gate(
    program: "LabelPair", inputs: StageInputs, engines: Callable[[], list[Any]], out: StageDir
) -> dict[str, float]:
    """The judge answers the gold comparisons as it will label; not being above chance is a warning, or the end.

    Returns the metrics `gate/…`. Answers are durable under `gate/`: a resumed stage does not ask again.

    Raises:
        StageFailed: `judge_gate` is stop, and the 95% interval of the accuracy reaches down to a half.
    """
    config, part = program.config, StageDir(out.path / "gate", out.seed)
    comparisons, unread, *_ = read_comparisons(config.gold)
    rows, gold = alternate(comparisons, out.seed)
    work = write_rows(rows, RESPONSE_PAIR, part.path / "inputs")
    # Gold that is too long for this judge is counted, and is no reason to stop.
    counts = map_rows(work, program, engines, part, settings=replace(inputs.settings, max_bad_fraction=1.0))
    answers = read_rows(part.data)
    found = {**judge_statistics(answers), **gold_statistics(answers, gold)}
    if found["accuracy_low"] <= 0.5:
        accuracy = f"{found['accuracy']:.2f}" if "accuracy" in found else "UNKNOWN"
        text = (
            f"THE JUDGE IS NOT ABOVE CHANCE: ON {len(answers)} GOLD COMPARISONS ITS ACCURACY IS {accuracy} "
            f"(95% INTERVAL {found['accuracy_low']:.2f} TO {found['accuracy_high']:.2f})"
        )
        if config.judge_gate == "stop":
            raise StageFailed(text, f"{_BETTER}; label.judge_gate=warn goes on with this judge")
        out.warn(f"{text}. ITS LABELS TEACH LITTLE OR NOTHING: {_BETTER}.")
    return {f"gate/{k}": v for k, v in {**found, "quarantined": counts["quarantined"] + len(unread)}.items()}


def alternate(comparisons: Sequence[Row], seed: int) -> tuple[list[Row], dict[str, float]]:
    """Gold comparisons with the chosen response first in one half, second in the other; and P(A better) by id.

    A judge that only likes a letter is then right in half of them. Asking both orders would show the same for twice
    the price, and its answers would not be the independent ones that the interval assumes.
    """
    order = sorted(comparisons, key=lambda row: derive_seed(seed, row["id"], "gate"))
    rows, gold = [], {}
    for i, row in enumerate(order):
        a, b = (row["response_a"], row["response_b"])[:: 1 if i % 2 else -1]
        rows.append({**row, "response_a": a, "response_b": b})
        gold[row["id"]] = row["label_prob"] if i % 2 else 1 - row["label_prob"]
    return rows, gold


def ranked(config: LabelConfig, rows: Sequence[Row]) -> list[Row]:
    """Labels by one Bradley-Terry ranking of each prompt's responses; votes stay as they are.

    Responses that no chain of comparisons joins cannot be ranked: such a prompt's rows keep their labels and are
    flagged `unranked`.
    """
    by_prompt: dict[str, list[Row]] = {}
    for row in rows:
        by_prompt.setdefault(row_id(row["messages"]), []).append(row)
    out = []
    for pairs in by_prompt.values():
        compared = [(r["response_a"], r["response_b"], opinion(r)) for r in pairs if r["response_a"] != r["response_b"]]
        players = list(dict.fromkeys(text for r in pairs for text in (r["response_a"], r["response_b"])))
        try:
            elo = {text: rating.elo for text, rating in fit_elo(players, compared, players[0], samples=1).items()}
        except CaiError:
            out += [{**r, "flags": [*r["flags"], "unranked"]} for r in pairs]
            continue
        for r in pairs:
            better = 1 / (1 + math.exp((elo[r["response_b"]] - elo[r["response_a"]]) / ELO_PER_NAT))
            out.append({**r, "label_prob": final_label(config, better)})
    return sorted(out, key=lambda r: r["id"])


@dataclass(frozen=True)
class LabelPair:
    """What the engine does with one row: votes by each drawn principle, in each order, by each rationale."""

    config: LabelConfig
    constitution: Constitution
    seed: int

    schema = LABELED_PAIR

    @cached_property
    def shots(self) -> tuple[FeedbackFewShot, ...]:
        """The examples of every prompt of the run: the same for all rows, so that engines compute them once.

        Raises:
            ConfigError: an example lacks a question, and no principle can lend one.
        """
        config, constitution = self.config, self.constitution
        shots = constitution.cot_few_shots if config.reasons else constitution.feedback_few_shots
        if config.format == "score":
            shots = tuple(shot for shot in shots if shot.score_a is not None)
        shots = with_questions(shots[: config.few_shots], constitution.for_feedback(), self.seed)
        # Rationales name the letters, so their examples keep their order.
        return shots if config.reasons else with_balanced_answers(shots, self.seed)

    async def __call__(self, row: Row, engine: Any) -> Row:
        """The row with its votes and label.

        Raises:
            DataError: a question is longer than `max_prompt_tokens`, or the model gives no choice a probability.
        """
        config, principles, votes = self.config, self.constitution.for_feedback(), []
        row = {**row, "flags": list(row["flags"])}
        orders = (False, True) if config.swap else (False,)
        for k in range(config.principles_per_pair):
            principle = draw(principles, derive_seed(self.seed, row["id"], f"feedback/{k}"))
            if config.format == "score":
                votes.append(await self._scores(engine, row, principle))
                continue
            for swapped, sample in product(orders, range(config.samples_per_pair)):
                step = f"rationale/{k}/{int(swapped)}/{sample}"
                votes.append(await self._choice(engine, row, principle, swapped, step))
        prob = sum(v["prob"] for v in votes) / len(votes)  # the mean over both orders is algo.swap_average
        return {**row, "label_prob": final_label(config, prob), "votes": votes, "seed": self.seed}

    async def _choice(self, engine: Any, row: Row, principle: Principle, swapped: bool, step: str) -> Row:
        """A vote by one of two choices."""
        config, language, rlaif = self.config, self.constitution.language, self.config.format == "rlaif"
        first, second = (row["response_a"], row["response_b"])[:: -1 if swapped else 1]
        prompt, conclude = self._question(engine, row, principle, first, second)
        rationale, limit = "", config.max_prompt_tokens
        if config.reasons:
            limits = Sampling(max_prompt_tokens=limit, max_new_tokens=config.max_rationale_tokens, temperature=1.0)
            stop = templates.FRAMES[language].reasoning_stops if rlaif else templates.FRAMES[language].rationale_stops
            rationale = (await ask(engine, prompt, row, step, self.seed, limits, stop=stop)).text
            # A rationale that never reaches a verdict is asked for one all the same: the label is never a guess.
            prompt = conclude(prompt, rationale, language)
            limit += config.max_rationale_tokens + VERDICT_TOKENS
        logprobs = await self._logprobs(engine, prompt, templates.NUMBERS if rlaif else templates.CHOICES, limit)
        prob = choice_distribution(logprobs)[int(swapped)]
        shown = {"swapped": swapped, "logprob_a": logprobs[0], "logprob_b": logprobs[1], "rationale": rationale}
        return {**_vote(principle, prob), **shown}

    async def _scores(self, engine: Any, row: Row, principle: Principle) -> Row:
        """A vote by the scores of each response on its own, taken as independent."""
        limit, distributions = self.config.max_prompt_tokens, []
        for response in (row["response_a"], row["response_b"]):
            prompt, _ = self._question(engine, row, principle, response)
            distributions.append(choice_distribution(await self._logprobs(engine, prompt, templates.SCORES, limit)))
        a, b = distributions
        shown = {"swapped": False, "score_a": expected_score(a), "score_b": expected_score(b), "rationale": ""}
        return {**_vote(principle, probability_higher(a, b)), **shown}

    def _question(self, engine: Any, row: Row, principle: Principle, *responses: str) -> tuple[PromptText, Any]:
        """The question around as much of the conversation as fits, and what concludes it; a shorter one is flagged."""
        config = self.config
        plain = "plain" in (engine.tokenizer.format, config.format)
        forms = _FORMATS.get(config.format, (templates.FEEDBACK, None))
        build, conclude = (form and form.of("plain" if plain else "chat") for form in forms)
        if config.chain_of_thought:
            build = partial(build, think=True)
        prompt = around(build, principle.preference_question, *responses, self.shots, self.constitution.language)
        asked, shortened = fit_turns(engine.tokenizer, prompt, row["messages"], config)
        if shortened and "shortened:question" not in row["flags"]:
            row["flags"].append("shortened:question")
        return asked, conclude

    async def _logprobs(self, engine: Any, prompt: Any, choices: Sequence[str], limit: int) -> list[float]:
        ids = check_length(engine.tokenizer.prompt(prompt), limit)
        return await choice_logprobs(engine, ids, encode_choices(engine.tokenizer, prompt, choices))


def _vote(principle: Principle, prob: float) -> Row:
    """A vote from P(response_a is what the question asks for)."""
    inverted = principle.inverted
    return {"principle_id": principle.id, "inverted": inverted, "prob": 1 - prob if inverted else prob}


def final_label(config: LabelConfig, prob: float) -> float:
    """P(A better), made hard or clamped when the configuration says so."""
    if config.hard:
        return prob if prob == 0.5 else float(prob > 0.5)
    return clamp_probability(prob, *(config.clamp or (0.0, 1.0)))
