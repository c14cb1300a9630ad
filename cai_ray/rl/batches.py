"""Batches as they travel and as they are computed on: ragged Arrow columns, micro-batches without padding.

Shapes: B sequences, T tokens of all of them, R response tokens of the longest one, N response tokens of all of them,
one after the other. A batch is an Arrow table with a row per response and a list column per token-wise quantity.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cai_ray.training.batches import layout


def row_lengths(batch: pa.Table, name: str) -> list[int]:
    """Values in each row of a list column."""
    return [len(value) for value in batch[name].to_numpy()]


def flat(batch: pa.Table, name: str) -> Tensor:
    """A list column as one tensor: the rows' values one after the other."""
    return torch.from_numpy(batch[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).copy())


def padded(batch: pa.Table, name: str) -> Tensor:
    """A list column as a tensor with a row per response, zeros on the right."""
    return pad_sequence(list(flat(batch, name).split(row_lengths(batch, name))), batch_first=True)


def beginnings(batch: pa.Table, size: int, *names: str) -> pa.Table:
    """The batch with the first `size` values of each row of some list columns."""
    cut = {name: pc.list_slice(batch[name], 0, size) for name in names}  # pyright: ignore[reportAttributeAccessIssue]
    for name, column in cut.items():
        batch = batch.set_column(batch.column_names.index(name), name, column)
    return batch


def ragged(values_N: Tensor, lengths: Sequence[int]) -> pa.Array:
    """The inverse of `flat`: a list column of float32 with rows of these lengths."""
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    return pa.ListArray.from_arrays(pa.array(offsets.numpy()), pa.array(values_N.detach().float().cpu().numpy()))


def table(batch: pa.Table, rows: Sequence[int], columns: Mapping[str, pa.Array]) -> pa.Table:
    """A table of (row, …): what a worker computed for some rows of the table that it was given."""
    return pa.table({"row": batch["row"].take(pa.array(rows, pa.int32())), **columns})


Plan = list[list[int]]  # micro-batches of one rank, each a list of rows; an empty one is a filler


def plan_of(
    batch: pa.Table, rows: Sequence[int], microbatch_tokens: int, rank: int = 0, ranks: int = 1
) -> tuple[Plan, int]:
    """A rank's micro-batches of some rows of a batch, and the response tokens of all these rows.

    Raises:
        ConfigError: a row alone is longer than `microbatch_tokens`.
    """
    prompts, responses = (row_lengths(batch, name) for name in ("prompt_ids", "response_ids"))
    lengths = [p + r for p, r in zip(prompts, responses, strict=True)]
    plans = layout(sorted(rows), lengths, ranks, microbatch_tokens, packed=True)
    return plans[rank], sum(responses[row] for row in rows)


@dataclass(frozen=True)
class Micro:
    """A micro-batch on a device: whole sequences one after the other in one row, and their N response tokens."""

    ids_1T: Tensor
    response_1T: Tensor  # bool: the response tokens
    documents: list[int]  # tokens of each sequence
    mask_N: Tensor  # bool; all False for a filler
    columns: dict[str, Tensor]  # [N]
    lengths: list[int]  # response tokens of each sequence


def collate(batch: pa.Table, rows: Sequence[int], device: torch.device, columns: Sequence[str] = ()) -> Micro:
    """Takes rows of a batch as a micro-batch; no rows give a filler, which has a shape but counts for nothing."""
    part = batch.take(list(rows) or [0])
    prompts, responses = (flat(part, n).long().split(row_lengths(part, n)) for n in ("prompt_ids", "response_ids"))
    pairs = list(zip(prompts, responses, strict=True))
    lengths = [len(x) for x in responses]
    ids_T = torch.cat([x for pair in pairs for x in pair])
    response_T = torch.cat([torch.full((len(x),), bool(k)) for pair in pairs for k, x in enumerate(pair)])
    return Micro(
        ids_1T=ids_T[None].to(device),
        response_1T=response_T[None].to(device),
        documents=[len(p) + len(r) for p, r in pairs],
        mask_N=torch.full((sum(lengths),), bool(rows), device=device),
        columns={name: flat(part, name).to(device) for name in columns},
        lengths=lengths,
    )
