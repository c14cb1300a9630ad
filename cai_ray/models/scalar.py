"""Scores, values and hidden states of transformers' models, without the logits that nobody reads.

Shapes: B sequences, T tokens, H hidden, V vocabulary. Heads run in float32 whatever the model's dtype.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from cai_ray.errors import DataError


class ScalarHead(nn.Linear):
    """A score from a hidden state, in float32; called as a module, because ZeRO-3 gathers weights at module calls."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores [..., 1] of hidden [..., H]."""
        return F.linear(hidden.float(), self.weight.float())


def hidden_states(model: PreTrainedModel, ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor) -> torch.Tensor:
    """The last hidden states, after the final norm, in the model's dtype: the vocabulary projection does not run.

    Args:
        model: a causal or a scalar model.
        ids_BT: token ids, padded left or right.
        attention_mask_BT: True or 1 where a token is real; positions are counted over real tokens.

    Returns:
        hidden_BTH; undefined at padding.
    """
    mask = attention_mask_BT.long()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return model.base_model(input_ids=ids_BT, attention_mask=mask, position_ids=positions, use_cache=False)[0]


def lm_head(model: PreTrainedModel, hidden_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two factors of the logits: exactly `hidden @ weight.T`, for log-probs without the logits themselves.

    A bias, such as Phi's, is a last column of the weight that meets a one in each hidden state.

    Raises:
        DataError: the model does more than that: soft-capped or scaled logits.
    """
    head: Any = model.get_output_embeddings()
    config = model.config.get_text_config()
    scales = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    if found := [name for name in scales if getattr(config, name, 1) not in (None, 1)]:
        raise DataError(
            f"{type(model).__name__} computes its logits by more than one matrix product: {found}",
            "train a model with a plain output layer, such as Llama, Qwen or Mistral",
        )
    if getattr(head, "bias", None) is None:
        return hidden_NH, head.weight
    ones_N1 = hidden_NH.new_ones(len(hidden_NH), 1)
    return torch.cat([hidden_NH, ones_N1], 1), torch.cat([head.weight, head.bias[:, None]], 1)


def scores_at_end(model: PreTrainedModel, ids_BT: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """One float32 score per sequence, read at its last real token.

    Equals `AutoModelForSequenceClassification`'s logits in float32.

    Args:
        model: from `load_scalar_model`.
        ids_BT: token ids, padded on the right.
        lengths_B: real tokens of each row, at least 1.
    """
    columns_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    last_BT = columns_T == lengths_B[:, None] - 1
    return values_at(model, ids_BT, columns_T < lengths_B[:, None], last_BT)[last_BT]


def values_at(
    model: PreTrainedModel, ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor, positions_BT: torch.Tensor
) -> torch.Tensor:
    """Float32 values_BT at the chosen positions, 0 elsewhere.

    Args:
        model: from `load_scalar_model`.
        ids_BT: token ids, padded left or right.
        attention_mask_BT: True or 1 where a token is real.
        positions_BT: bool, True where a value is wanted.
    """
    chosen_NH = hidden_states(model, ids_BT, attention_mask_BT)[positions_BT]
    values_BT = torch.zeros(ids_BT.shape, dtype=torch.float32, device=ids_BT.device)
    return values_BT.masked_scatter(positions_BT, model.get_submodule("score")(chosen_NH))
