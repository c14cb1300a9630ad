"""What models say of one sequence at a time, by transformers alone: no packing, no padding, no code of ours."""

from collections.abc import Sequence
from typing import Any

import torch


def values_of(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """float32 values_T of a scalar model after each token; the last is the sequence's score."""
    hidden_TH = model.base_model(torch.tensor([list(ids)]), use_cache=False)[0][0]
    return hidden_TH.float() @ model.score.weight[0].float()
