"""Documents through transformers' models: hidden states and scores, without padding and without logits.

Several documents stand in one row of tokens, and no token sees another document. transformers' own masks keep documents
apart where position ids begin anew and there is no attention mask, but then all tokens of the row are compared and most
results thrown away. Here each layer attends document by document through transformers' attention interface, so that a
row costs what its documents cost alone; no other kernel is needed.

Shapes: B documents, N pairs, T tokens of all documents, H hidden, V vocabulary. Heads run in float32 whatever the
model's dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cai_ray.errors import DataError

_NAME = "sdpa_by_document"
# About as many as a CPU reads at once: what an operator leaves of more has left the caches when the next one wants it,
# and for fewer the weights are read too often.
CPU_TOKENS = 2048
# Their layers pass on what `packed_hidden_states` tells them, and position comes in by the position ids alone.
_FORKING = {"gemma", "gemma2", "gemma3_text", "gpt_neox", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3"}
Part = tuple[int, int]  # tokens, and how many at its document's beginning stand before them


@dataclass
class _Row:
    """Travels through a forward pass to every attention layer."""

    parts: Sequence[Part]
    layers: int = 0  # that have read it


def packed_hidden_states(model: PreTrainedModel, ids_1T: Tensor, documents: Sequence[Sequence[Part]]) -> Tensor:
    """The last hidden states hidden_1TH, after the final norm, of documents that stand one after the other in one row.

    On a CPU a long row goes through the model in several passes, which changes only the time and the rounding.

    Args:
        model: a causal or a scalar model; from now on it attends through this module, also over padded rows.
        ids_1T: token ids, without padding.
        documents: the parts of each, T tokens in all. The first, (tokens, 0), is read from its beginning; any other,
            (tokens, head), goes on from the first `head` tokens of that one, in its positions too, and sees no others.

    Raises:
        DataError: the architecture does not tell its attention layers where documents begin.
    """
    if model.config._attn_implementation != _NAME:
        model.set_attn_implementation(_NAME)
    lengths = [sum(n for n, _ in parts) for parts in documents]
    middles = [end - n / 2 for n, end in zip(lengths, accumulate(lengths), strict=True)]
    # Not under ZeRO-3 (whose parameters have such ids), where every rank has to make as many passes as the others.
    in_passes = ids_1T.is_cpu and not hasattr(next(model.parameters()), "ds_id")
    passes = -(-ids_1T.shape[1] // CPU_TOKENS) if in_passes else 1
    groups = groupby(zip(documents, middles, strict=True), key=lambda x: x[1] * passes // ids_1T.shape[1])
    rows = [[part for document, _ in group for part in document] for _, group in groups]
    ids = ids_1T.split([sum(n for n, _ in row) for row in rows], dim=1)
    return torch.cat([_pass(model, own_1T, row) for own_1T, row in zip(ids, rows, strict=True)], dim=1)


def _pass(model: PreTrainedModel, ids_1T: Tensor, parts: Sequence[Part]) -> Tensor:
    """What `packed_hidden_states` returns, of documents that go through the model together."""
    row = _Row(parts)
    positions_1T = torch.cat([torch.arange(head, head + n) for n, head in parts])[None].to(ids_1T.device)
    hidden_1TH = model.base_model(input_ids=ids_1T, position_ids=positions_1T, use_cache=False, documents=row)[0]
    layers = model.config.get_text_config().num_hidden_layers
    if row.layers != layers:
        raise DataError(
            f"{row.layers} of {layers} layers of {type(model).__name__} keep packed documents apart",
            "set sft.packing=false",
        )
    return hidden_1TH


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    documents: _Row | None = None,
    **how: Any,
) -> tuple[Tensor, None]:
    """transformers' scaled-dot-product attention, for each part of each document on its own."""
    if documents is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    documents.layers += 1
    # Split and not sliced: the gradient of each slice is the whole row, zeros but for the slice. And as tokens first,
    # which is how they lie in memory, gradients of the kernel included: then the parts are joined without striding.
    sizes = [n for n, _ in documents.parts]
    tokens_first = (x.transpose(1, 2).split(sizes, dim=1) for x in (query, key, value))
    heads_first = ((part.transpose(1, 2) for part in parts) for parts in tokens_first)
    start, first, outputs = 0, (key, value), []
    for (n, head), q, k, v in zip(documents.parts, *heads_first, strict=True):
        part, start = slice(start, start + n), start + n
        if head:
            k, v = (torch.cat((x[:, :, :head], own), dim=2) for x, own in zip(first, (k, v), strict=True))
            mask = torch.ones(n, head + n, dtype=torch.bool, device=query.device).tril(head)
            if window := how.get("sliding_window"):
                mask = mask.triu(head + 1 - window)
        else:
            first, mask = (k, v), None if attention_mask is None else attention_mask[..., part, part]
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **how)[0])
    return torch.cat(outputs, dim=1), None


def _mask(*, attention_mask: Tensor | None = None, local_size: int | None = None, **how: Any) -> Tensor | None:
    """transformers' mask of padded rows and of sliding windows; within a document plain causal order needs none."""
    if attention_mask is None and local_size is None:
        return None
    return sdpa_mask(attention_mask=attention_mask, local_size=local_size, **how)


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)


# ---- heads, hidden states, scores -----------------------------------------------------------------------------------


class Forward(nn.Module):
    """A forward pass around a transformers model; what reads a weight does so inside it, where ZeRO-3 gathers it."""

    def __init__(self, hf: PreTrainedModel):
        super().__init__()
        self.hf = hf


class ScalarHead(nn.Linear):
    """A score from a hidden state, in float32; called as a module, because ZeRO-3 gathers weights at module calls."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Scores [..., 1] of hidden [..., H]."""
        return F.linear(hidden.float(), self.weight.float())


def lm_head(model: PreTrainedModel, hidden_NH: Tensor) -> tuple[Tensor, Tensor]:
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
    model: PreTrainedModel, ids_1T: Tensor, lengths: Sequence[int], packed: bool | None = None
) -> Tensor:
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


def document_scores(model: PreTrainedModel, ids_1T: Tensor, lengths: Sequence[int]) -> Tensor:
    """One float32 score per document of a row without padding, read at its last token.

    Equals `AutoModelForSequenceClassification`'s logits in float32; `model` is from `load_scalar_model`.
    """
    hidden_TH = document_states(model, ids_1T, lengths)
    return model.get_submodule("score")(hidden_TH[[end - 1 for end in accumulate(lengths)]])[:, 0]


def shares_prompt(model: PreTrainedModel) -> bool:
    """Whether `pair_scores` can be used: a family known to tell its layers where documents fork."""
    return model.config.get_text_config().model_type in _FORKING


def pair_scores(model: PreTrainedModel, ids_1T: Tensor, parts: Sequence[tuple[int, int, int]]) -> tuple[Tensor, ...]:
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
