"""Ragged batches and micro-batches; values worked by hand."""

import pyarrow as pa
import torch

from cai_ray.rl.batches import beginnings, collate, flat, padded, ragged

CPU = torch.device("cpu")
BATCH = pa.table(
    {
        "row": pa.array([0, 1], pa.int32()),
        "prompt_ids": pa.array([[5, 6, 7], [8]], pa.list_(pa.int32())),
        "response_ids": pa.array([[1, 2], [3, 4, 9]], pa.list_(pa.int32())),
        "old_logprobs": pa.array([[-1.0, -2.0], [-3.0, -4.0, -5.0]], pa.list_(pa.float32())),
    }
)


def test_a_micro_batch_is_one_row_in_which_the_response_tokens_are_marked():
    micro = collate(BATCH, [0, 1], CPU, ["old_logprobs"])
    assert micro.ids_1T.tolist() == [[5, 6, 7, 1, 2, 8, 3, 4, 9]]
    assert micro.response_1T.int().tolist() == [[0, 0, 0, 1, 1, 0, 1, 1, 1]]
    assert (micro.documents, micro.lengths) == ([5, 4], [2, 3])
    assert micro.columns["old_logprobs"].tolist() == [-1, -2, -3, -4, -5]
    assert micro.mask_N.tolist() == [True] * 5


def test_rows_come_in_the_order_asked_for():
    micro = collate(BATCH, [1, 0], CPU, ["old_logprobs"])
    assert micro.ids_1T.tolist() == [[8, 3, 4, 9, 5, 6, 7, 1, 2]]
    assert micro.columns["old_logprobs"].tolist() == [-3, -4, -5, -1, -2]


def test_a_filler_has_a_shape_and_counts_for_nothing():
    micro = collate(BATCH, [], CPU)
    assert micro.ids_1T.numel()
    assert not micro.mask_N.any()


def test_the_beginnings_of_some_columns():
    part = beginnings(BATCH.take([1, 0]), 2, "response_ids", "old_logprobs")
    assert part.select(["row", "prompt_ids"]) == BATCH.select(["row", "prompt_ids"]).take([1, 0])
    assert part["response_ids"].to_pylist() == [[3, 4], [1, 2]]
    micro = collate(part, [0, 1], CPU, ["old_logprobs"])
    assert micro.ids_1T.tolist() == [[8, 3, 4, 5, 6, 7, 1, 2]]
    assert micro.columns["old_logprobs"].tolist() == [-3, -4, -1, -2]


def test_ragged_columns_survive_the_way_there_and_back():
    values = flat(BATCH, "old_logprobs")
    assert ragged(values, [2, 3]).to_pylist() == BATCH["old_logprobs"].to_pylist()
    assert padded(BATCH, "old_logprobs").tolist() == [[-1, -2, 0], [-3, -4, -5]]
    sliced = BATCH.slice(1, 1)
    assert flat(sliced, "old_logprobs").tolist() == [-3, -4, -5]
