"""What scores responses: preference models, each in units of its own spread, and functions of the user's.

Shapes: B sequences.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from cai_ray.errors import ConfigError, DataError
from cai_ray.models.checkpoints import load_scalar_model
from cai_ray.models.tokenization import Tokenizer, preference_input
from cai_ray.rl.forward import ScoreForward
from cai_ray.rl.setup import Answer, Setup, info, table, timed


class Reward:
    """Every reward of the run. It alone normalises scores and combines them."""

    def __init__(self, role: str, rank: int, ranks: int, setup: Setup):
        self._least = setup.config.ensemble == "min"
        self._scorers = [Model(r, setup) if isinstance(r, Path) else Function(r) for r in setup.rewards]
        self._heldout = Model(setup.heldout_reward, setup) if setup.heldout_reward else None

    info = info

    @timed
    @torch.inference_mode()
    def score(self, batch: pa.Table, plan: list[list[int]]) -> Answer:
        """Table (row, score_raw, score), and heldout where a model watches."""
        rows = [i for chunk in plan for i in chunk]
        found: dict[str, list[float]] = {"score_raw": [], "score": [], **({"heldout": []} if self._heldout else {})}
        for chunk in filter(None, plan):
            part = batch.take(chunk)
            raw = torch.tensor([scorer.raw(part) for scorer in self._scorers], dtype=torch.float64)
            own = torch.stack([(x - s.mean) / s.std for s, x in zip(self._scorers, raw, strict=True)])
            found["score_raw"] += raw.mean(0).tolist()
            found["score"] += (own.amin(0) if self._least else own.mean(0)).tolist()
            if self._heldout:
                found["heldout"] += [(x - self._heldout.mean) / self._heldout.std for x in self._heldout.raw(part)]
        columns = {name: pa.array(values, pa.float64()) for name, values in found.items()}
        return table(rows, columns), {}


class Model:
    """A preference model and its scale; without `normalize_scores` the scale is its own."""

    def __init__(self, folder: Path, setup: Setup):
        config = setup.config
        self._device = setup.torch_device
        self._max_tokens = config.max_prompt_tokens + config.max_new_tokens + 1  # EOS for a truncated response
        model: Any = load_scalar_model(folder, config.critic.sharding.dtype)
        self._model = ScoreForward(model).to(self._device).eval()
        self._eos = _same_tokens(folder, setup).eos_id
        self.mean, self.std = _moments(folder, model.config) if config.normalize_scores else (0.0, 1.0)

    def raw(self, part: pa.Table) -> list[float]:
        """Scores of a micro-batch, in the model's own units."""
        inputs = [
            torch.tensor(preference_input(r["prompt_ids"], r["response_ids"], self._eos, self._max_tokens)[0])
            for r in part.select(["prompt_ids", "response_ids"]).to_pylist()
        ]
        ids_1T = torch.cat(inputs)[None].to(self._device)
        return self._model(ids_1T, [len(x) for x in inputs]).tolist()


class Function:
    """A function of the user's: called with lists of prompts (the last user turns) and responses; gives scores."""

    mean, std = 0.0, 1.0

    def __init__(self, name: str):
        module, _, function = name.partition(":")
        try:
            self._function: Callable[[list[str], list[str]], Sequence[float]] = getattr(
                importlib.import_module(module), function
            )
        except (ImportError, AttributeError) as error:
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


def _same_tokens(folder: Path, setup: Setup) -> Tokenizer:
    policy, reward = Tokenizer.load(setup.policy, setup.format), Tokenizer.load(folder)
    if policy.hf.get_vocab() != reward.hf.get_vocab():
        raise DataError(
            f"the policy {setup.policy} and the preference model {folder} have different vocabularies",
            "train the preference model from a model of the policy's family: it reads the policy's tokens",
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
