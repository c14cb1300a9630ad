"""What rows teach, how they are batched, and the held-out numbers, by hand."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cai_ray.config import Mix, PreferenceModelConfig, SftConfig
from cai_ray.errors import DataError, StageFailed
from cai_ray.training import preference, sft
from cai_ray.training.loop import reward_scale
from tests.training.rows import revision

CPU = torch.device("cpu")


def learned(tokenizer: Any, example: sft.Example) -> str:
    ids = example.ids_T[example.loss_mask_T]
    assert ids[-1] == tokenizer.eos_id
    return tokenizer.decode(ids[:-1].tolist())


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [("all", ["first", "second"]), ("last", ["second"]), ((1,), ["first"]), ((2, 7), ["second"]), ((7,), [])],
)
def test_only_chosen_revisions_are_learned_never_the_initial_response(
    tokenizer: Any, rounds: Any, expected: list[str]
) -> None:
    turns = [{"principle_id": "p", "critique": "c", "revision": r} for r in ("first", "second")]
    row = revision(1, initial_response="an initial response", rounds=turns)
    examples = sft.examples(row, tokenizer, SftConfig(rounds=rounds))
    assert [learned(tokenizer, e) for e in examples] == expected
    assert len({e.id for e in examples}) == len(examples)
    assert sft.examples({**row, "rounds": []}, tokenizer, SftConfig(rounds=rounds)) == []


def test_a_helpful_row_teaches_its_sample(tokenizer: Any) -> None:
    row = revision(1, kind="helpful", initial_response="a helpful sample", rounds=[])
    (example,) = sft.examples(row, tokenizer, SftConfig(rounds="last"))
    assert learned(tokenizer, example) == "a helpful sample"
    assert sft.examples({**row, "initial_response": "  "}, tokenizer, SftConfig()) == []


def test_a_text_that_was_cut_teaches_no_end(tokenizer: Any) -> None:
    turns = [{"principle_id": "p", "critique": "c", "revision": r} for r in ("first", "second")]
    cut = sft.examples(revision(1, rounds=turns, flags=["truncated:revision/1"]), tokenizer, SftConfig())
    whole = sft.examples(revision(1, rounds=turns, flags=["truncated:critique/1"]), tokenizer, SftConfig())
    assert [e.ids_T.tolist() for e in cut] == [whole[0].ids_T.tolist()[:-1], whole[1].ids_T.tolist()]
    assert cut[0].loss_mask_T.tolist() == whole[0].loss_mask_T.tolist()[:-1]
    assert not cut[0].truncated
    helpful = revision(1, kind="helpful", initial_response="one", rounds=[], flags=["truncated:response"])
    (example,) = sft.examples(helpful, tokenizer, SftConfig())
    assert tokenizer.decode(example.ids_T[example.loss_mask_T].tolist()) == "one"


def test_each_kind_has_its_source_and_weight(tokenizer: Any) -> None:
    turns = [{"principle_id": "p", "critique": "c", "revision": r} for r in ("first", "second", "third")]
    rows = [revision(1, rounds=turns), revision(2, kind="helpful", initial_response="a helpful sample", rounds=[])]
    mix = Mix(revisions=(0.5, 2.0), helpful=3.0)
    examples = [e for row in rows for e in sft.examples(row, tokenizer, SftConfig(mix=mix))]
    assert [(e.source, e.weight) for e in examples] == [
        *(("round-1", 0.5), ("round-2", 2.0), ("round-3", 2.0)),
        ("helpful", 3.0),
    ]
    (last,) = sft.examples(rows[0], tokenizer, SftConfig(mix=mix, rounds="last"))
    assert (last.source, last.weight) == ("round-3", 2.0)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}],
        [{"role": "user", "content": None}],
        [{"role": "narrator", "content": "Once"}],
    ],
)
def test_turns_that_cannot_be_used_are_errors(tokenizer: Any, messages: Any) -> None:
    with pytest.raises(DataError, match="messages"):
        sft.examples(revision(1, messages=messages), tokenizer, SftConfig())


@pytest.mark.parametrize("packing", [False, True])
def test_sft_log_probs_are_those_of_the_answer(tiny: Path, tokenizer: Any, packing: bool) -> None:
    examples = [e for i in range(3) for e in sft.examples(revision(i), tokenizer, SftConfig())]
    module = sft.load(tiny, "float32", 0)
    tensors = sft.collate(examples, CPU, SftConfig(packing=packing))
    lengths = [e.tokens for e in examples]
    read: list[Any] = []
    module.hf.base_model.register_forward_pre_hook(lambda _, args, how: read.append(how["input_ids"]), with_kwargs=True)
    with torch.no_grad():
        scores = sft.score(module, examples, tensors)
        assert [ids.shape for ids in read] == [(1, sum(lengths)) if packing else (6, max(lengths))]
        for example, (logprob, tokens) in zip(examples, scores, strict=True):
            ids = torch.from_numpy(example.ids_T.astype(np.int64))
            logprobs = module.hf(ids[None]).logits[0, :-1].log_softmax(-1)
            chosen = logprobs.gather(1, ids[1:, None])[:, 0][torch.from_numpy(example.loss_mask_T[1:])]
            assert (logprob, tokens) == (pytest.approx(float(chosen.sum()), rel=1e-5), len(chosen))


def test_no_loss_in_a_pack_moves_with_another_document(tiny: Path, tokenizer: Any) -> None:
    module, config = sft.load(tiny, "float32", 0), SftConfig()
    examples = [sft.examples(revision(i), tokenizer, config)[0] for i in range(4)]
    changed = replace(examples[1], ids_T=np.full_like(examples[1].ids_T, 7))
    with torch.no_grad():
        before, after = (
            [logprob for logprob, _ in sft.score(module, batch, sft.collate(batch, CPU, config))]
            for batch in (examples, [examples[0], changed, *examples[2:]])
        )
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True, True]


@pytest.mark.parametrize(
    ("task", "config"),
    [(sft, SftConfig()), (sft, SftConfig(packing=False)), (preference, PreferenceModelConfig())],
    ids=["sft", "sft-padded", "preference"],
)
def test_an_empty_micro_batch_has_no_loss_and_no_gradient(task: Any, config: Any, tiny: Path, tokenizer: Any) -> None:
    module = task.load(tiny, "float32", 0)
    tensors = task.collate([], CPU, config)
    assert task.score(module, [], tensors) == []
    loss = task.loss(module, [], tensors, config, 5)
    loss.backward()
    assert float(loss.detach()) == 0.0
    grads = [p.grad for p in module.parameters()]
    assert all(g is not None and not g.any() for g in grads)  # present, so that ZeRO's hooks run


def test_sft_summary_by_hand() -> None:
    out = sft.summary([], [(-2.0, 2.0), (-4.0, 1.0)])  # 6 nats over 3 tokens
    assert out == {"eval/loss": 2.0, "eval/perplexity": pytest.approx(math.exp(2.0))}


def test_reward_scale() -> None:
    assert reward_scale([1.0, 2.0, 3.0]) == {"reward_mean": 2.0, "reward_std": 1.0}
    for scores in ([1.0, 1.0], [1.0, math.nan], [1.0, math.inf]):
        with pytest.raises(StageFailed, match="standard deviation"):
            reward_scale(scores)
