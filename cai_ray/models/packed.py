"""Several documents in one row of tokens: nothing is padding, and no token sees another document.

transformers' own masks keep documents apart where position ids begin anew and there is no attention mask, but then all
tokens of the row are compared and most results thrown away. Here each layer attends document by document through
transformers' attention interface, so that a row costs what its documents cost alone; no other kernel is needed.

Shapes: T tokens of all documents, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cai_ray.errors import DataError

_NAME = "sdpa_by_document"


@dataclass
class _Documents:
    """Travels through a forward pass to every attention layer."""

    lengths: list[int]
    forks: list[tuple[int, int]]
    layers: int = 0  # that have read it


def packed_hidden_states(
    model: PreTrainedModel, ids_1T: Tensor, lengths: Sequence[int], forks: Sequence[tuple[int, int]] = ()
) -> Tensor:
    """The last hidden states hidden_1TH, after the final norm, of documents that stand one after the other in one row.

    Args:
        model: a causal or a scalar model; from now on it attends through this module, also over padded rows.
        ids_1T: token ids, without padding.
        lengths: tokens of each document, T in all; positions are counted from 0 in each.
        forks: of each document the tokens of a beginning and of an end: the end goes on from the beginning, in its
            positions too, and does not see what stands between. None: documents go straight on.

    Raises:
        DataError: the architecture does not tell its attention layers where documents begin.
    """
    if model.config._attn_implementation != _NAME:
        model.set_attn_implementation(_NAME)
    documents = _Documents(list(lengths), list(forks or [(0, 0)] * len(lengths)))
    positions_T = [
        torch.cat((torch.arange(n - tail), torch.arange(head, head + tail)))
        for n, (head, tail) in zip(documents.lengths, documents.forks, strict=True)
    ]
    positions = torch.cat(positions_T)[None].to(ids_1T.device)
    hidden_1TH = model.base_model(input_ids=ids_1T, position_ids=positions, use_cache=False, documents=documents)[0]
    layers = model.config.get_text_config().num_hidden_layers
    if documents.layers != layers:
        raise DataError(
            f"{documents.layers} of {layers} layers of {type(model).__name__} keep packed documents apart",
            "set sft.packing=false",
        )
    return hidden_1TH


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    documents: _Documents | None = None,
    **how: Any,
) -> tuple[Tensor, None]:
    """transformers' scaled-dot-product attention, for each document on its own."""
    if documents is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    documents.layers += 1
    # Split and not sliced: the gradient of each slice is the whole row, zeros but for the slice. And as tokens first,
    # which is how they lie in memory, gradients of the kernel included: then the parts are joined without striding.
    sizes = [size for n, (_, tail) in zip(documents.lengths, documents.forks, strict=True) for size in (n - tail, tail)]
    tokens_first = (x.transpose(1, 2).split(sizes, dim=1) for x in (query, key, value))
    queries, keys, values = ((part.transpose(1, 2) for part in parts) for parts in tokens_first)
    start, outputs = 0, []
    for n, (head, tail) in zip(documents.lengths, documents.forks, strict=True):
        part, start = slice(start, start + n - tail), start + n
        mask = None if attention_mask is None else attention_mask[..., part, part]
        q, k, v = next(queries), next(keys), next(values)
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **how)[0])
        ends = next(queries), next(keys), next(values)
        if tail:
            k, v = (torch.cat((x[:, :, :head], end), dim=2) for x, end in zip((k, v), ends[1:], strict=True))
            mask = torch.ones(tail, head + tail, dtype=torch.bool, device=query.device).tril(head)
            if window := how.get("sliding_window"):
                mask = mask.triu(head + 1 - window)
            outputs.append(sdpa_attention_forward(module, ends[0], k, v, mask, **how)[0])
    return torch.cat(outputs, dim=1), None


def _mask(*, attention_mask: Tensor | None = None, local_size: int | None = None, **how: Any) -> Tensor | None:
    """transformers' mask of padded rows and of sliding windows; within a document plain causal order needs none."""
    if attention_mask is None and local_size is None:
        return None
    return sdpa_mask(attention_mask=attention_mask, local_size=local_size, **how)


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)
