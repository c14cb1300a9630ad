"""Several documents in one row of tokens: nothing is padding, and no token sees another document.

transformers' own masks keep documents apart where position ids begin anew and there is no attention mask, but then all
tokens of the row are compared and most results thrown away. Here each layer attends document by document through
transformers' attention interface, so that a row costs what its documents cost alone; no other kernel is needed.

Shapes: T tokens of all documents, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cai_ray.errors import DataError

_NAME = "sdpa_by_document"
# About as many as a CPU reads at once: what an operator leaves of more has left the caches when the next one wants it,
# and for fewer the weights are read too often.
CPU_TOKENS = 2048


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
