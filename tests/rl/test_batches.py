"""Ragged batches, micro-batches and plans; values worked by hand."""

from itertools import chain

import pyarrow as pa
import torch
from hypothesis import given
from hypothesis import strategies as st

from cai_ray.config import PPOConfig
from cai_ray.rl.batches import collate, flat, minibatches, padded, ragged, split

CPU = torch.device("cpu")
BATCH = pa.table(
    {
        "row": pa.array([0, 1], pa.int32()),
        "prompt_ids": pa.array([[5, 6, 7], [8]], pa.list_(pa.int32())),
        "response_ids": pa.array([[1, 2], [3, 4, 9]], pa.list_(pa.int32())),
        "old_logprobs": pa.array([[-1.0, -2.0], [-3.0, -4.0, -5.0]], pa.list_(pa.float32())),
    }
)


def test_a_micro_batch_marks_the_positions_that_predict_response_tokens():
    micro = collate(BATCH, [0, 1], CPU, ["old_logprobs"])
    assert micro.ids_BT.tolist() == [[5, 6, 7, 1, 2], [8, 3, 4, 9, 0]]
    assert micro.attention_BT.tolist() == [[True] * 5, [True] * 4 + [False]]
    assert micro.predicts_BT.int().tolist() == [[0, 0, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert micro.labels_N.tolist() == [1, 2, 3, 4, 9]
    assert micro.columns["old_logprobs"].tolist() == [-1, -2, -3, -4, -5]
    assert micro.mask_N.all()
    # The token after each marked position is its label, row by row: nothing is shifted by one.
    assert micro.ids_BT.roll(-1, 1)[micro.predicts_BT].tolist() == micro.labels_N.tolist()


def test_rows_come_in_the_order_asked_for_and_alone_are_not_padded():
    micro = collate(BATCH, [1], CPU, ["old_logprobs"])
    assert micro.ids_BT.tolist() == [[8, 3, 4, 9]]
    assert micro.columns["old_logprobs"].tolist() == [-3, -4, -5]


def test_a_filler_has_a_shape_and_counts_for_nothing():
    micro = collate(BATCH, [], CPU)
    assert micro.ids_BT.numel()
    assert not micro.mask_N.any()


def test_ragged_columns_survive_the_way_there_and_back():
    values = flat(BATCH, "old_logprobs")
    assert ragged(values, [2, 3]).to_pylist() == BATCH["old_logprobs"].to_pylist()
    assert padded(BATCH, "old_logprobs").tolist() == [[-1, -2, 0], [-3, -4, -5]]
    sliced = BATCH.slice(1, 1)
    assert flat(sliced, "old_logprobs").tolist() == [-3, -4, -5]


def test_a_plan_worked_by_hand():
    # Lengths 9 | 6, 5 | 4, 2 | 1 go to and fro over two ranks; at most 12 tokens, so 9 stands alone, 6 + 5 fill 12.
    assert split(range(6), [9, 1, 6, 2, 5, 4], 2, 12) == [[[0], [5, 3]], [[2, 4], [1]]]
    # Beyond the budget a row stands alone; the rank with less gets a filler.
    assert split(range(3), [10, 3, 9], 2, 8) == [[[0], []], [[2], [1]]]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 4), st.integers(10, 200))
def test_every_row_is_in_exactly_one_micro_batch_within_the_budget(lengths, ranks, budget):
    plans = split(range(len(lengths)), lengths, ranks, budget)
    assert sorted(chain(*chain(*plans))) == list(range(len(lengths)))
    assert len({len(plan) for plan in plans}) == 1
    for micro in chain(*plans):
        assert len(micro) <= 1 or max(lengths[i] for i in micro) * len(micro) <= budget


def test_each_epoch_takes_every_row_once_in_an_order_of_its_own():
    config = PPOConfig(rollout_batch_size=12, minibatch_size=4, ppo_epochs=2)
    ids = [f"row{i}" for i in range(12)]
    steps = minibatches(ids, config, seed=3, step=7)
    assert [len(rows) for rows in steps] == [4] * 6
    first, second = list(chain(*steps[:3])), list(chain(*steps[3:]))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert steps == minibatches(ids, config, seed=3, step=7) != minibatches(ids, config, seed=3, step=8)
