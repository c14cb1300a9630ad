"""Batches as they travel and as they are computed on: ragged Arrow columns, micro-batches, and who does which rows.

Shapes: B sequences, T tokens, R response tokens of the longest one, N response tokens of all of them, one after the
other. A batch is an Arrow table with a row per response and a list column per token-wise quantity.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cai_ray.config import PPOConfig
from cai_ray.records import derive_seed


def row_lengths(batch: pa.Table, name: str) -> list[int]:
    """Values in each row of a list column."""
    return [len(value) for value in batch[name].to_numpy()]


def flat(batch: pa.Table, name: str) -> Tensor:
    """A list column as one tensor: the rows' values one after the other."""
    return torch.from_numpy(batch[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).copy())


def padded(batch: pa.Table, name: str) -> Tensor:
    """A list column as a tensor with a row per response, zeros on the right."""
    return pad_sequence(list(flat(batch, name).split(row_lengths(batch, name))), batch_first=True)


def ragged(values_N: Tensor, lengths: Sequence[int]) -> pa.Array:
    """The inverse of `flat`: a list column of float32 with rows of these lengths."""
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    return pa.ListArray.from_arrays(pa.array(offsets.numpy()), pa.array(values_N.detach().float().cpu().numpy()))


Plan = list[list[int]]  # micro-batches of one rank, each a list of rows; an empty one is a filler


@dataclass(frozen=True)
class Micro:
    """A micro-batch on a device: right-padded sequences, and N response tokens of all of them in one row."""

    ids_BT: Tensor
    attention_BT: Tensor  # bool
    predicts_BT: Tensor  # bool: the positions whose next token is a response token
    labels_N: Tensor
    mask_N: Tensor  # bool; all False for a filler
    columns: dict[str, Tensor]  # [N]
    lengths: list[int]  # response tokens of each row


def collate(batch: pa.Table, rows: Sequence[int], device: torch.device, columns: Sequence[str] = ()) -> Micro:
    """Takes rows of a batch as a micro-batch; no rows give a filler, which has a shape but counts for nothing."""
    part = batch.take(list(rows) or [0])
    prompts, responses = (flat(part, n).long().split(row_lengths(part, n)) for n in ("prompt_ids", "response_ids"))
    ids_BT = pad_sequence([torch.cat(pair) for pair in zip(prompts, responses, strict=True)], batch_first=True)
    start_B1, length_B1 = (torch.tensor([len(x) for x in xs])[:, None] for xs in (prompts, responses))
    at_T = torch.arange(ids_BT.shape[1])
    labels_N = torch.cat(responses)
    return Micro(
        ids_BT=ids_BT.to(device),
        attention_BT=(at_T < start_B1 + length_B1).to(device),
        predicts_BT=((at_T >= start_B1 - 1) & (at_T < start_B1 + length_B1 - 1)).to(device),
        labels_N=labels_N.to(device),
        mask_N=torch.full_like(labels_N, bool(rows), dtype=torch.bool, device=device),
        columns={name: flat(part, name).to(device) for name in columns},
        lengths=[len(x) for x in responses],
    )


def split(rows: Sequence[int], lengths: Sequence[int], ranks: int, budget: int) -> list[Plan]:
    """Deals rows to ranks and cuts each rank's into micro-batches of at most `budget` tokens, padding counted.

    Long rows come first and ranks take turns to and fro, so that tokens balance; a row beyond the budget stands alone.
    Every rank gets equally many micro-batches: empty ones fill up.
    """
    plans: list[Plan] = [[] for _ in range(ranks)]
    for turn, row in enumerate(sorted(rows, key=lambda r: (-lengths[r], r))):
        lap, place = divmod(turn, ranks)
        plan = plans[place if lap % 2 == 0 else ranks - 1 - place]
        if plan and lengths[plan[-1][0]] * (len(plan[-1]) + 1) <= budget:
            plan[-1].append(row)
        else:
            plan.append([row])
    most = max(len(plan) for plan in plans)
    return [plan + [[]] * (most - len(plan)) for plan in plans]


def minibatches(ids: Sequence[str], config: PPOConfig, seed: int, step: int) -> list[list[int]]:
    """The rows of each optimizer step of an iteration: every epoch a fresh order, by a hash of (seed, id, step)."""
    out = []
    for epoch in range(config.ppo_epochs):
        order = sorted(range(len(ids)), key=lambda i: derive_seed(seed, ids[i], f"ppo/{step}/epoch/{epoch}"))
        out += [order[i : i + config.minibatch_size] for i in range(0, len(ids), config.minibatch_size)]
    return out
