"""The preference model: what a labeled pair teaches, and its loss. Knows nothing of ranks, steps or Ray.

Shapes: N pairs, B = 2N sequences (all first answers, then all second ones), T tokens.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cai_ray.algo.preference import expected_calibration_error, preference_loss
from cai_ray.config import PreferenceModelConfig
from cai_ray.errors import DataError
from cai_ray.models.checkpoints import load_scalar_model
from cai_ray.models.scalar import scores_at_end
from cai_ray.models.tokenization import Tokenizer, preference_input
from cai_ray.records import Row

COLUMNS = ("id", "messages", "source", "split", "response_a", "response_b", "label_prob")
Batch = Mapping[str, Tensor]
Score = tuple[float, float]  # of the first and of the second answer


@dataclass(frozen=True)
class Example:
    """One comparison."""

    id: str
    a_T: np.ndarray  # int32: prompt, first answer, EOS
    b_T: np.ndarray
    prob: float  # P(A better)
    source: str
    truncated: bool

    @property
    def tokens(self) -> int:
        """Tokens that are read."""
        return len(self.a_T) + len(self.b_T)

    @property
    def length(self) -> int:
        """Tokens that the pair takes in a micro-batch where it is the longest: two padded sequences."""
        return 2 * max(len(self.a_T), len(self.b_T))

    units = 1  # what the loss is averaged over: pairs
    weight = 1.0  # each is trained on once in an epoch


class EndScores(nn.Module):
    """One float32 score per sequence, read at its last token; also the forward pass of PPO's reward worker."""

    def __init__(self, hf: Any):
        super().__init__()
        self.hf = hf

    def forward(self, ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """scores_B of right-padded sequences."""
        return scores_at_end(self.hf, ids_BT, lengths_B)


def load(folder: Path, dtype: str, seed: int) -> EndScores:
    """The model to train; a language model's folder gets a fresh head, drawn by `seed`."""
    return EndScores(load_scalar_model(folder, dtype, seed=seed))


def examples(row: Row, tokenizer: Tokenizer, config: PreferenceModelConfig) -> list[Example]:
    """The one example of a `LabeledPair` row.

    Raises:
        DataError: the row has no label, or the chat template refuses the conversation.
    """
    if row["label_prob"] is None or not 0 <= row["label_prob"] <= 1:
        raise DataError(f"label_prob is {row['label_prob']}, expected a probability")
    prompt = tokenizer.prompt(row["messages"])
    (a, a_cut), (b, b_cut) = (
        preference_input(prompt, tokenizer.response(row[name]), tokenizer.eos_id, config.max_tokens)
        for name in ("response_a", "response_b")
    )
    a_T, b_T = np.array(a, np.int32), np.array(b, np.int32)
    return [Example(row["id"], a_T, b_T, row["label_prob"], row["source"], a_cut or b_cut)]


def collate(batch: Sequence[Example], pad_id: int, device: torch.device, config: PreferenceModelConfig) -> Batch:
    """Right-padded tensors of a micro-batch; an empty one becomes a pair of single padding tokens."""
    answers = [*(e.a_T for e in batch), *(e.b_T for e in batch)] or [np.full(1, pad_id)] * 2
    rows = [torch.from_numpy(ids_T) for ids_T in answers]
    ids_BT = pad_sequence(rows, batch_first=True, padding_value=pad_id).long()
    return {"ids_BT": ids_BT.to(device), "lengths_B": torch.tensor([len(row) for row in rows], device=device)}


def loss(
    module: nn.Module, batch: Sequence[Example], tensors: Batch, config: PreferenceModelConfig, total: int
) -> Tensor:
    """The micro-batch's part of the step's mean soft-label loss; `total` counts the whole step's pairs."""
    score_a, score_b = module(**tensors).chunk(2)
    prob = torch.tensor([e.prob for e in batch] or [0.5], dtype=torch.float32, device=score_a.device)
    weights = torch.full_like(prob, float(bool(batch)))
    return preference_loss(score_a, score_b, prob, center_coef=config.center_coef, weights=weights, total=total)[0]


def score(module: nn.Module, batch: Sequence[Example], tensors: Batch) -> list[Score]:
    """Each pair's two scores."""
    score_a, score_b = module(**tensors).float().cpu().chunk(2)
    return list(zip(score_a.tolist(), score_b.tolist(), strict=True)) if batch else []


def summary(batch: Sequence[Example], scores: Sequence[Score]) -> dict[str, float]:
    """Held-out loss, calibration error, and accuracy against `label_prob > 0.5`, in all and by source.

    Pairs labelled exactly 0.5 have no better side and are left out of the accuracy.
    """
    a, b = torch.tensor(scores, dtype=torch.float64).T
    label = torch.tensor([e.prob for e in batch], dtype=torch.float64)
    by_source: dict[str, list[float]] = defaultdict(list)
    for e, right in zip(batch, ((a > b) == (label > 0.5)).tolist(), strict=True):
        if e.prob != 0.5:
            by_source[e.source].append(float(right))
    out = {
        "eval/loss": float(preference_loss(a, b, label)[0]),
        "eval/calibration_error": float(expected_calibration_error(torch.sigmoid(a - b), label)),
    }
    if by_source:
        out["eval/accuracy"] = float(np.mean([x for xs in by_source.values() for x in xs]))
        out |= {f"eval/accuracy/{source}": float(np.mean(xs)) for source, xs in sorted(by_source.items())}
    return out
