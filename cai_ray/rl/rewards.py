"""What scores responses: preference models in units of their own spread, feedback models, functions of the user's.

Shapes: B sequences, T tokens of all of them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from cai_ray.algo.scores import choice_distribution, expected_score
from cai_ray.constitution import Principle, draw
from cai_ray.errors import ConfigError, DataError
from cai_ray.generation.engine import ChoicePlan, ChoiceRequest, plan_choices
from cai_ray.models.checkpoints import load_causal_lm, load_scalar_model
from cai_ray.models.documents import Forward, document_scores, document_states, lm_head
from cai_ray.models.tokenization import Tokenizer, encode_choices, preference_input
from cai_ray.records import Row, derive_seed
from cai_ray.rl.batches import table
from cai_ray.rl.setup import Judge, Setup
from cai_ray.rl.workers import Worker
from cai_ray.templates import SCORE, SCORES, Messages
from cai_ray.training.deepspeed import model_to_look


class Reward(Worker):
    """Every reward of the run. It alone normalises scores and combines them."""

    def _load(self) -> None:
        setup = self._setup
        self._scorers = [_scorer(reward, setup) for reward in setup.rewards]
        self._heldout = Model(setup.heldout_reward, setup) if setup.heldout_reward else None

    @torch.no_grad()
    def score(self, batch: pa.Table, piece: tuple[int, int | None] = (0, None)) -> tuple[pa.Table, dict[str, float]]:
        """Table (row, score_raw, score), and heldout where a model watches, of a piece: first row and how many.

        Also sums of these columns, and `rows`: their part of means over all pieces.
        """
        config, batch = self._setup.config, batch.slice(*piece)
        plan, _ = self._plan(batch)
        rows = [i for chunk in plan for i in chunk]
        found: dict[str, list[float]] = {"score_raw": [], "score": [], **({"heldout": []} if self._heldout else {})}
        for chunk in plan:
            part = batch.take(chunk or [0])  # for a filler too: the other ranks wait in the same collectives
            raw = torch.tensor([scorer.raw(part)[: len(chunk)] for scorer in self._scorers], dtype=torch.float64)
            own = torch.stack([(x - s.mean) / s.std for s, x in zip(self._scorers, raw, strict=True)])
            found["score_raw"] += raw.mean(0).tolist()
            found["score"] += (own.amin(0) if config.ensemble == "min" else own.mean(0)).tolist()
            if self._heldout:
                watched = self._heldout.raw(part)[: len(chunk)]
                found["heldout"] += [(x - self._heldout.mean) / self._heldout.std for x in watched]
        columns = {name: pa.array(values, pa.float64()) for name, values in found.items()}
        return table(batch, rows, columns), {"rows": len(rows), **{name: sum(found[name]) for name in found}}


class ScoreForward(Forward):
    """A preference model's score of each sequence, read at its last token; nothing is padded."""

    def forward(self, ids_1T: Tensor, documents: Sequence[int]) -> Tensor:
        """scores_B in float32."""
        return document_scores(self.hf, ids_1T, documents)


class Model:
    """A preference model and its scale; without `normalize_scores` the scale is its own."""

    def __init__(self, folder: Path, setup: Setup):
        config = setup.config
        self._device = setup.torch_device
        self._max_tokens = config.max_tokens + 1  # EOS for a truncated response

        def load(dtype: str) -> ScoreForward:
            return ScoreForward(load_scalar_model(folder, dtype))

        self._model: Any = model_to_look(load, config.critic, self._device, config.inference_sharded)
        self._tokenizer = _same_tokens(folder, setup)
        self.mean, self.std = _moments(folder, self._model.hf.config) if config.normalize_scores else (0.0, 1.0)

    def raw(self, part: pa.Table) -> list[float]:
        """Scores of a micro-batch, in the model's own units."""
        tokenizer, inputs = self._tokenizer, []
        for row in part.select(["prompt_ids", "response_ids"]).to_pylist():
            prompt, response = row["prompt_ids"], row["response_ids"]
            if response[-1:] and response[-1] in tokenizer.eos_ids:  # of several, the model has learned one
                response = response[:-1]
            inputs.append(torch.tensor(preference_input(prompt, response, tokenizer.eos_id, self._max_tokens)))
        ids_1T = torch.cat(inputs)[None].to(self._device)
        return self._model(ids_1T, [len(x) for x in inputs]).tolist()


class Feedback:
    """A language model that rates each response from 1 to 10 under a drawn principle (Lee et al. 2023, section 2.2.2).

    The score is the expected one, from -1 to 1; a principle that asks for the worse answer turns the sign. The draw is
    seeded by prompt and step: the responses that are compared with each other answer to one principle.
    """

    mean, std = 0.0, 1.0

    def __init__(self, judge: Judge, setup: Setup):
        self._tokenizer = Tokenizer.load(judge.model, judge.format)
        self._device, self._seed = setup.torch_device, setup.seed
        learner = setup.config.critic
        self._model: Any = model_to_look(partial(load_causal_lm, judge.model), learner, self._device, sharded=False)
        self._principles, self._language = judge.constitution.for_feedback(), judge.constitution.language
        self._budget = learner.sharding.microbatch_tokens

    def raw(self, part: pa.Table) -> list[float]:
        """Scores of a micro-batch."""
        rows = part.select(["prompt_id", "step", "messages", "response"]).to_pylist()
        seeds = [derive_seed(self._seed, row["prompt_id"], f"ppo/reward/{row['step']}") for row in rows]
        drawn = [draw(self._principles, own) for own in seeds]
        plans = [self._plan(row, principle) for row, principle in zip(rows, drawn, strict=True)]
        found = self._answers([request for plan in plans for request in plan.requests])
        scores = []
        for plan, principle in zip(plans, drawn, strict=True):
            score = expected_score(choice_distribution(plan.scores([next(found) for _ in plan.requests])))
            scores.append(-score if principle.inverted else score)
        return scores

    def _plan(self, row: Row, principle: Principle) -> ChoicePlan:
        build = SCORE.of(self._tokenizer.format)
        prompt = build(row["messages"], principle.preference_question, row["response"], (), self._language)
        return plan_choices(self._tokenizer.prompt(prompt), encode_choices(self._tokenizer, prompt, SCORES))

    def _answers(self, requests: Sequence[ChoiceRequest]) -> Iterator[dict[int, float]]:
        """What each request asks for, {token: nats}, a few requests at a time."""
        left = list(requests)
        while left:
            sizes = list(accumulate(len(request.prompt_ids) for request in left))
            some = left[: max(1, sum(size <= self._budget for size in sizes))]
            left = left[len(some) :]
            lengths = [len(request.prompt_ids) for request in some]
            ids_1T = torch.tensor([[i for request in some for i in request.prompt_ids]], device=self._device)
            hidden_TH = document_states(self._model, ids_1T, lengths)
            hidden_NH, weight_VH = lm_head(self._model, hidden_TH[[end - 1 for end in accumulate(lengths)]])
            logprobs_NV = torch.log_softmax((hidden_NH @ weight_VH.T).float(), -1)
            for request, row in zip(some, logprobs_NV, strict=True):
                yield dict(zip(request.token_ids, row[list(request.token_ids)].tolist(), strict=True))


class Function:
    """A function of the user's: called with lists of prompts (the last user turns) and responses; gives scores."""

    mean, std = 0.0, 1.0

    def __init__(self, name: str):
        try:
            self._function: Callable[[list[str], list[str]], Sequence[float]] = resolve_name(name)
        except (ImportError, AttributeError, ValueError) as error:  # ValueError: no name that Python could import
            raise ConfigError(
                f"ppo.reward {name} cannot be imported: {error}",
                "give module:function, with the module on PYTHONPATH of every node",
            ) from None
        self._name = name

    def raw(self, part: pa.Table) -> list[float]:
        """The function's scores of a micro-batch.

        Raises:
            DataError: it gives too few or too many, or one that is no finite number.
        """
        scores = [float(x) for x in self._function(part["prompt"].to_pylist(), part["response"].to_pylist())]
        if len(scores) != len(part) or not all(map(math.isfinite, scores)):
            raise DataError(
                f"ppo.reward {self._name} gave {len(scores)} scores for {len(part)} responses, "
                f"{sum(not math.isfinite(x) for x in scores)} of them not finite",
                "it has to give one finite number for each response",
            )
        return scores


def _scorer(reward: Path | Judge | str, setup: Setup) -> "Model | Feedback | Function":
    if isinstance(reward, Path):
        return Model(reward, setup)
    return Feedback(reward, setup) if isinstance(reward, Judge) else Function(reward)


def _same_tokens(folder: Path, setup: Setup) -> Tokenizer:
    policy, reward = Tokenizer.load(setup.policy, setup.format), Tokenizer.load(folder)
    probe: Messages = [{"role": "user", "content": "probe"}]
    if policy.hf.get_vocab() != reward.hf.get_vocab():
        raise DataError(
            f"the policy {setup.policy} and the preference model {folder} have different vocabularies",
            "train the preference model from a model of the policy's family: it reads the policy's tokens",
        )
    if (policy.prompt(probe), policy.eos_id) != (reward.prompt(probe), reward.eos_id):
        raise DataError(
            f"the policy {setup.policy} ({policy.format}) and the preference model {folder} ({reward.format}) write "
            "one conversation in different tokens",
            "train the preference model from the SL model, or set models.preference_base.format to the policy's",
        )
    return policy


def _moments(folder: Path, config: Any) -> tuple[float, float]:
    mean, std = (getattr(config, name, None) for name in ("reward_mean", "reward_std"))
    if mean is None or not std:
        raise DataError(
            f"the preference model {folder} stores reward_mean {mean} and reward_std {std}",
            "train it with cai-ray, add both to its config.json, or set ppo.normalize_scores=false",
        )
    return mean, std
