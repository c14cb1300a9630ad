"""Row order and layout: golden cases worked by hand, and what must hold for any rows."""

import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai_ray.errors import ConfigError
from cai_ray.training.batches import copies, epoch_order, layout, step_rows, total_steps

IDS = [f"row-{i}" for i in range(10)]


def test_order_depends_on_ids_seed_and_epoch_only() -> None:
    shuffled = random.Random(1).sample(IDS, len(IDS))
    order = [IDS[i] for i in epoch_order(IDS, seed=3, epoch=0)]
    assert [shuffled[i] for i in epoch_order(shuffled, seed=3, epoch=0)] == order
    assert sorted(order) == IDS
    others = [[IDS[i] for i in epoch_order(IDS, *key)] for key in ((3, 1), (4, 0))]
    assert order not in others
    assert others[0] != others[1]


def test_every_row_once_an_epoch_and_the_last_partial_batch_is_trained() -> None:
    steps = list(step_rows(IDS, seed=0, epochs=2.5, batch_size=4))
    assert [len(rows) for _, rows in steps] == [4, 4, 2, 4, 4, 2, 4, 1]  # epochs do not mix; 2.5 epochs are 25 rows
    assert [round(epoch, 6) for epoch, _ in steps] == [0.4, 0.8, 1.0, 1.4, 1.8, 2.0, 2.4, 2.5]
    for first in (0, 3):
        assert sorted(i for _, rows in steps[first : first + 3] for i in rows) == list(range(10))
    assert total_steps(len(IDS), 2.5, 4) == len(steps)


def test_a_run_that_starts_later_takes_the_same_steps() -> None:
    steps = list(step_rows(IDS, seed=0, epochs=2.5, batch_size=4))
    for start in range(len(steps) + 1):
        assert list(step_rows(IDS, seed=0, epochs=2.5, batch_size=4, start=start)) == steps[start:]


def test_a_tiny_part_of_an_epoch_is_one_row() -> None:
    assert [len(rows) for _, rows in step_rows(IDS, seed=0, epochs=0.001, batch_size=4)] == [1]


def test_layout_by_hand() -> None:
    lengths = [10, 50, 20, 40, 30]
    # 100 tokens hold [50, 40], then [30, 20, 10] (3 · 30): one micro-batch for each of two ranks
    assert layout(range(5), lengths, ranks=2, microbatch_tokens=100) == [[[1, 3]], [[4, 2, 0]]]
    # all fit one micro-batch, but both ranks get work, as evenly as the order allows
    assert layout(range(5), lengths, ranks=2, microbatch_tokens=1000) == [[[1, 3]], [[4, 2, 0]]]
    assert layout(range(5), lengths, ranks=1, microbatch_tokens=1000) == [[[1, 3, 4, 2, 0]]]
    # fewer rows than ranks: the others run an empty micro-batch
    assert layout([2], lengths, ranks=3, microbatch_tokens=50) == [[[2]], [[]], [[]]]


def test_a_packed_layout_by_hand() -> None:
    lengths = [10, 50, 20, 40, 30]
    # 100 tokens hold [50, 40], then [30, 20, 10]: 90 and 60 tokens, nothing padded
    assert layout(range(5), lengths, ranks=2, microbatch_tokens=100, packed=True) == [[[1, 3]], [[4, 2, 0]]]
    # 150 hold all of them; padded they would take 250
    assert layout(range(5), lengths, ranks=1, microbatch_tokens=150, packed=True) == [[[1, 3, 4, 2, 0]]]
    assert len(layout(range(5), lengths, ranks=1, microbatch_tokens=150)[0]) == 2


@dataclass(frozen=True)
class Weighted:
    id: str
    weight: float


def test_weights_take_rows_by_a_hash() -> None:
    assert copies(Weighted("a", 0.0), 0) == []
    assert copies(Weighted("a", 1.0), 0) == [Weighted("a", 1.0)]
    assert [c.id for c in copies(Weighted("a", 3.0), 0)] == ["a", "a+1", "a+2"]
    names = [f"row-{i}" for i in range(1000)]

    def taken(weight: float, seed: int) -> list[int]:
        return [len(copies(Weighted(name, weight), seed)) for name in names]

    assert set(taken(1.3, 0)) == {1, 2}
    assert sum(taken(1.3, 0)) == pytest.approx(1300, abs=45)  # three standard deviations
    assert taken(1.3, 0) == taken(1.3, 0) != taken(1.3, 1)
    less, more = taken(0.3, 0), taken(0.6, 0)
    assert all(a <= b for a, b in zip(less, more, strict=True))  # a larger weight only adds rows


def test_a_row_that_can_never_fit_is_an_error() -> None:
    with pytest.raises(ConfigError, match="50 tokens does not fit microbatch_tokens=49"):
        layout(range(2), [50, 10], ranks=1, microbatch_tokens=49)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(1, 5), st.integers(100, 500), st.booleans())
def test_layout_always(lengths: list[int], ranks: int, budget: int, packed: bool) -> None:
    plan = layout(range(len(lengths)), lengths, ranks, budget, packed)
    assert len(plan) == ranks
    assert len({len(micro) for micro in plan}) == 1  # else ZeRO-2 and -3 hang
    assert sorted(i for rank in plan for micro in rank for i in micro) == list(range(len(lengths)))
    for micro in (micro for rank in plan for micro in rank if micro):
        assert sum(lengths[i] if packed else max(lengths[j] for j in micro) for i in micro) <= budget
    if len(lengths) >= ranks and len(set(lengths)) == 1:
        assert all(any(micro for micro in rank) for rank in plan)
