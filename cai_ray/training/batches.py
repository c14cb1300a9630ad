"""Which rows form an optimizer step, and how a step is laid out on ranks and micro-batches.

Both are pure functions of ids, lengths and the seed: files, workers and ranks change nothing about which rows a step
holds, and the layout changes nothing about its loss but rounding.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from cai_ray.errors import ConfigError
from cai_ray.records import derive_seed

Example = TypeVar("Example", bound=Any)


def epoch_order(ids: Sequence[str], seed: int, epoch: int) -> list[int]:
    """Indices into `ids`, sorted by a hash of (seed, epoch, id)."""
    return sorted(range(len(ids)), key=lambda i: (derive_seed(seed, ids[i], f"epoch {epoch}"), ids[i]))


def total_steps(rows: int, epochs: float, batch_size: int) -> int:
    """Optimizer steps of a whole run; a partial last batch of an epoch counts as one."""
    return sum(-(-n // batch_size) for n in _epoch_rows(rows, epochs))


def _epoch_rows(rows: int, epochs: float) -> list[int]:
    """Rows that each epoch takes; the last epoch may be a part of one."""
    whole, part = int(epochs), epochs - int(epochs)
    return [rows] * whole + ([max(1, round(part * rows))] if part else [])


def step_rows(
    ids: Sequence[str], seed: int, epochs: float, batch_size: int, start: int = 0
) -> Iterator[tuple[float, list[int]]]:
    """Yields (epochs behind after this step, the step's row indices) for every optimizer step from `start` on.

    Each row comes once an epoch; no step mixes two epochs.
    """
    for epoch, count in enumerate(_epoch_rows(len(ids), epochs)):
        if start * batch_size < count:
            order = epoch_order(ids, seed, epoch)[:count]
            for first in range(start * batch_size, count, batch_size):
                rows = order[first : first + batch_size]
                yield epoch + (first + len(rows)) / len(ids), rows
        start = max(0, start - -(-count // batch_size))


def copies(example: Example, seed: int) -> list[Example]:
    """An example as often as its weight says; 2.5 is twice, and a third time for half of all ids, by a hash.

    Args:
        example: a data class with the fields `id` and `weight`; copies have ids of their own.
        seed: the run's.
    """
    whole, part = divmod(example.weight, 1)
    count = int(whole) + (derive_seed(seed, example.id, "weight") < part * 2**31)
    return [example] * min(count, 1) + [replace(example, id=f"{example.id}+{k}") for k in range(1, count)]


def layout(
    rows: Sequence[int], lengths: Sequence[int], ranks: int, microbatch_tokens: int, packed: bool = False
) -> list[list[list[int]]]:
    """One step's rows as [rank][micro-batch][row]; every rank gets as many micro-batches, the missing ones empty.

    Rows are sorted by length, so that little is padding, and cut into micro-batches whose token counts, padding
    included, are as even as the order allows. Neighbours in length run side by side on different ranks.

    Args:
        rows: indices into `lengths`.
        lengths: tokens of each row; for a pair, of its prompt and both answers.
        ranks: data-parallel ranks.
        microbatch_tokens: most tokens in one micro-batch.
        packed: rows of a micro-batch stand one after the other, and nothing is padded.

    Raises:
        ConfigError: a row alone is longer than that.
    """
    order = sorted(rows, key=lambda i: -lengths[i])
    longest = lengths[order[0]] if order else 0
    if longest > microbatch_tokens:
        raise ConfigError(
            f"a row of {longest} tokens does not fit microbatch_tokens={microbatch_tokens}",
            "raise sharding.microbatch_tokens or lower max_tokens (a preference pair counts with both answers)",
        )
    fewest = len(_cut(order, lengths, microbatch_tokens, packed))
    count = min(len(order), -(-fewest // ranks) * ranks)  # as few as the budget allows, but work for every rank
    # The smallest budget that needs no more micro-batches than that.
    budgets = range(longest, microbatch_tokens)
    smaller = bisect_left(budgets, True, key=lambda tokens: len(_cut(order, lengths, tokens, packed)) <= count)
    micro = _cut(order, lengths, longest + smaller, packed)
    micro += [[] for _ in range(-len(micro) % ranks)]
    return [micro[rank::ranks] for rank in range(ranks)]


def _cut(order: Sequence[int], lengths: Sequence[int], tokens: int, packed: bool) -> list[list[int]]:
    """`order`, longest first, in as few consecutive groups of at most `tokens` tokens as there can be."""
    groups: list[list[int]] = []
    size, longest = tokens, 1  # of the last group, which is full: the first row begins one
    for i in order:
        size += lengths[i] if packed else longest
        if size > tokens:
            groups.append([])
            size = longest = lengths[i]
        groups[-1].append(i)
    return groups
