"""The preference model: what a labeled pair teaches, and its loss. Knows nothing of ranks, steps or Ray.

Shapes: N pairs, T tokens.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cai_ray.algo.preference import expected_calibration_error, preference_loss
from cai_ray.config import PreferenceModelConfig
from cai_ray.errors import DataError
from cai_ray.models.checkpoints import load_scalar_model
from cai_ray.models.documents import Forward, document_scores, pair_scores, shares_prompt
from cai_ray.models.tokenization import Tokenizer, preference_inputs
from cai_ray.records import Row

COLUMNS = ("id", "messages", "source", "split", "response_a", "response_b", "label_prob", "votes")
Batch = Mapping[str, Any]
Score = tuple[float, float]  # of the first and of the second answer


@dataclass(frozen=True)
class Example:
    """One comparison."""

    id: str
    prompt_T: np.ndarray  # int32
    a_T: np.ndarray  # int32: first answer, EOS
    b_T: np.ndarray
    prob: float  # P(A better)
    source: str
    truncated: bool
    weight: float = 1.0  # how often it is trained on in an epoch

    @property
    def tokens(self) -> int:
        """Tokens that are read: the prompt once, and both answers."""
        return len(self.prompt_T) + len(self.a_T) + len(self.b_T)

    units = 1  # what the loss is averaged over: pairs


class PairScores(Forward):
    """Both scores of each pair, from one forward pass in which the prompt is computed once and nothing is padding.

    A model that `shares_prompt` refuses makes two passes over whole sequences, each padded to its longest.
    """

    def forward(self, ids_1T: Tensor, parts: Sequence[tuple[int, int, int]]) -> tuple[Tensor, ...]:
        """(score_a_N, score_b_N) in float32 of what `collate` makes."""
        if shares_prompt(self.hf):
            return pair_scores(self.hf, ids_1T, parts)
        pieces = ids_1T[0].split([n for pair in parts for n in pair])
        scores = []
        for k in (1, 2):
            sequences = [torch.cat(pair) for pair in zip(pieces[::3], pieces[k::3], strict=True)]
            scores.append(document_scores(self.hf, torch.cat(sequences)[None], list(map(len, sequences))))
        return tuple(scores)


def load(folder: Path, dtype: str, seed: int) -> PairScores:
    """The model to train; a language model's folder gets a fresh head, drawn by `seed`."""
    return PairScores(load_scalar_model(folder, dtype, seed=seed))


def examples(row: Row, tokenizer: Tokenizer, config: PreferenceModelConfig) -> list[Example]:
    """The example of a `LabeledPair` row, with the weight of its source in `config.data`.

    Two equal answers give none: their scores are equal whatever the model, so there is nothing to learn. That is no
    fault of the row, for a model may well answer twice alike.

    Raises:
        DataError: the label is no probability, or the chat template refuses the conversation.
    """
    if row["label_prob"] is None or not 0 <= row["label_prob"] <= 1:
        raise DataError(f"label_prob is {row['label_prob']}, expected a probability")
    prompt, answers, cut = preference_inputs(
        tokenizer.prompt(row["messages"]),
        [tokenizer.response(row[name]) for name in ("response_a", "response_b")],
        tokenizer.eos_id,
        config.max_tokens,
    )
    prompt_T, a_T, b_T = (np.array(ids, np.int32) for ids in (prompt, *answers))
    if np.array_equal(a_T, b_T):
        return []
    weights = {source.path: source.weight for source in config.data}
    weight = weights.get("label" if row["votes"] else row["source"], 1.0)
    return [Example(row["id"], prompt_T, a_T, b_T, row["label_prob"], row["source"], cut, weight)]


def collate(batch: Sequence[Example], device: torch.device, config: PreferenceModelConfig) -> Batch:
    """A micro-batch as one row of prompt, first and second answer, pair after pair, and the lengths of the three.

    An empty one becomes a pair of any single tokens, which does not count.
    """
    pairs = [(e.prompt_T, e.a_T, e.b_T) for e in batch] or [np.zeros((3, 1), np.int32)]
    ids_T = torch.from_numpy(np.concatenate([x for pair in pairs for x in pair])).long()
    return {"ids_1T": ids_T[None].to(device), "parts": [tuple(map(len, pair)) for pair in pairs]}


def loss(
    module: nn.Module, batch: Sequence[Example], tensors: Batch, config: PreferenceModelConfig, total: int
) -> Tensor:
    """The micro-batch's part of the step's mean soft-label loss; `total` counts the whole step's pairs."""
    score_a, score_b = module(**tensors)
    prob = torch.tensor([e.prob for e in batch] or [0.5], dtype=torch.float32, device=score_a.device)
    weights = torch.full_like(prob, float(bool(batch)))
    return preference_loss(score_a, score_b, prob, config.margin, config.center_coef, weights, total)[0]


def score(module: nn.Module, batch: Sequence[Example], tensors: Batch) -> list[Score]:
    """Each pair's two scores."""
    score_a, score_b = (x.float().cpu().tolist() for x in module(**tensors))
    return list(zip(score_a, score_b, strict=True)) if batch else []


def summary(batch: Sequence[Example], scores: Sequence[Score]) -> dict[str, float]:
    """Held-out metrics. Which answer stands first carries no meaning, so none depends on it.

    - loss: soft-label, without margin and centering; calibration_error: of σ(a - b) over both orders.
    - accuracy, accuracy/SOURCE: pairs in which the better answer (label_prob above 0.5) has the higher score; equal
      scores count half, pairs labelled exactly 0.5 are left out. margin/pQ: quantiles of the better one's lead.
    - label_agreement: 1 - the mean distance of σ(a - b) from the label.
    - length_bias: correlation of score and answer length in tokens, over all answers.
    """
    a, b = torch.tensor(scores, dtype=torch.float64).T
    label = torch.tensor([e.prob for e in batch], dtype=torch.float64)
    prob = torch.sigmoid(a - b)
    lengths = torch.tensor([*(len(e.a_T) for e in batch), *(len(e.b_T) for e in batch)], dtype=torch.float64)
    both_orders = torch.cat((prob, 1 - prob)), torch.cat((label, 1 - label))
    length_bias = torch.corrcoef(torch.stack((torch.cat((a, b)), lengths)))[0, 1]
    out = {
        "eval/loss": float(preference_loss(a, b, label)[0]),
        "eval/calibration_error": float(expected_calibration_error(*both_orders)),
        "eval/label_agreement": 1 - float((prob - label).abs().mean()),
        "eval/length_bias": float(length_bias.nan_to_num()),  # 0 where all lengths or all scores are equal
    }
    leads = _leads(batch, scores)
    if every := [x for xs in leads.values() for x in xs]:
        out |= {f"eval/margin/p{q:02d}": float(np.percentile(every, q)) for q in (5, 25, 50, 75, 95)}
        out["eval/accuracy"] = _accuracy(every)
        out |= {f"eval/accuracy/{source}": _accuracy(xs) for source, xs in sorted(leads.items())}
    return out


def leaks(batch: Sequence[Example], scores: Callable[[Sequence[Example]], list[Score]]) -> dict[str, float]:
    """Accuracy of the same model when it reads the answers without their prompt: what the answers give away alone.

    The opposite, prompts without answers, is 1/2 by construction: both scores are of one and the same input.
    """
    found = scores([replace(e, prompt_T=e.prompt_T[:0]) for e in batch])
    every = [x for xs in _leads(batch, found).values() for x in xs]
    return {"eval/accuracy_response_only": _accuracy(every)} if every else {}


def _leads(batch: Sequence[Example], scores: Sequence[Score]) -> dict[str, list[float]]:
    """By source: the better answer's score minus the other's."""
    out: dict[str, list[float]] = defaultdict(list)
    for e, (a, b) in zip(batch, scores, strict=True):
        if e.prob != 0.5:
            out[e.source].append(a - b if e.prob > 0.5 else b - a)
    return out


def _accuracy(leads: Sequence[float]) -> float:
    return float(np.mean((np.sign(leads) + 1) / 2))
