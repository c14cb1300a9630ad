"""Scores, values and hidden states of transformers' models, without the logits that nobody reads.

Shapes: B documents, N pairs, T tokens, H hidden, V vocabulary. Heads run in float32 whatever the model's dtype.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from cai_ray.errors import DataError
from cai_ray.models.packed import packed_hidden_states

# Their layers pass on what `packed_hidden_states` tells them, and position comes in by the position ids alone.
_FORKING = {"gemma", "gemma2", "gemma3_text", "gpt_neox", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3"}


class Forward(nn.Module):
    """A forward pass around a transformers model; what reads a weight does so inside it, where ZeRO-3 gathers it."""

    def __init__(self, hf: PreTrainedModel):
        super().__init__()
        self.hf = hf


class ScalarHead(nn.Linear):
    """A score from a hidden state, in float32; called as a module, because ZeRO-3 gathers weights at module calls."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores [..., 1] of hidden [..., H]."""
        return F.linear(hidden.float(), self.weight.float())


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


def document_states(
    model: PreTrainedModel, ids_1T: torch.Tensor, lengths: Sequence[int], packed: bool | None = None
) -> torch.Tensor:
    """The last hidden states hidden_TH of documents that stand one after the other in one row, without padding.

    They are those after the final norm, in the model's dtype: the vocabulary projection does not run. Documents are
    read as they stand there (`packed`) or as padded rows, which is slower; None: packed where the family is known to
    keep documents apart.
    """
    if shares_prompt(model) if packed is None else packed:
        return packed_hidden_states(model, ids_1T, [[(n, 0)] for n in lengths])[0]
    ids_BT = pad_sequence(list(ids_1T[0].split(list(lengths))), batch_first=True)
    real_BT = torch.arange(ids_BT.shape[1]) < torch.tensor(lengths)[:, None]
    mask_BT = real_BT.long().to(ids_BT.device)
    return model.base_model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)[0][real_BT]


def document_scores(model: PreTrainedModel, ids_1T: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """One float32 score per document of a row without padding, read at its last token.

    Equals `AutoModelForSequenceClassification`'s logits in float32; `model` is from `load_scalar_model`.
    """
    hidden_TH = document_states(model, ids_1T, lengths)
    return model.get_submodule("score")(hidden_TH[[end - 1 for end in accumulate(lengths)]])[:, 0]


def shares_prompt(model: PreTrainedModel) -> bool:
    """Whether `pair_scores` can be used: a family known to tell its layers where documents fork."""
    return model.config.get_text_config().model_type in _FORKING


def pair_scores(
    model: PreTrainedModel, ids_1T: torch.Tensor, parts: Sequence[tuple[int, int, int]]
) -> tuple[torch.Tensor, ...]:
    """(score_a_N, score_b_N) of two answers to one prompt in float32; the prompt is computed once.

    The second answer goes on from the prompt and does not see the first: both scores are those of `document_scores` on
    the answers apart.

    Args:
        model: from `load_scalar_model`, and `shares_prompt`.
        ids_1T: prompt, first answer, second answer of each pair, without padding.
        parts: tokens of each of the three; an answer has at least 1.
    """
    documents = [((prompt + first, 0), (second, prompt)) for prompt, first, second in parts]
    hidden_1TH = packed_hidden_states(model, ids_1T, documents)
    ends = [(end - 1 - pair[2], end - 1) for pair, end in zip(parts, accumulate(map(sum, parts)), strict=True)]
    return model.get_submodule("score")(hidden_1TH[0, torch.tensor(ends)])[..., 0].unbind(1)
