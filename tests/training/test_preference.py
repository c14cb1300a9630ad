"""The preference model: what a pair becomes, what it weighs, its held-out numbers by hand, and planted labels."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cai_ray.artifacts import StageDir
from cai_ray.config import Comparisons, Optim, PreferenceModelConfig, Sharding
from cai_ray.errors import DataError, StageFailed
from cai_ray.records import Row
from cai_ray.training import preference
from cai_ray.training.launch import Job, run_training
from cai_ray.training.loop import _examples
from tests.reference import values_of
from tests.training.rows import pair

CPU = torch.device("cpu")
CONFIG = PreferenceModelConfig()
VOTE = {"principle_id": "p", "prob": 0.5}


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_a_pair_reads_its_prompt_and_both_answers_with_eos(tokenizer: Any) -> None:
    row = pair(1, response_a="yes", response_b="certainly not")
    (example,) = preference.examples(row, tokenizer, CONFIG)
    assert example.prompt_T.tolist() == tokenizer.prompt(row["messages"])
    assert example.a_T.tolist() == [*tokenizer.response("yes"), tokenizer.eos_id]
    assert example.b_T.tolist() == [*tokenizer.response("certainly not"), tokenizer.eos_id]
    assert example.tokens == len(example.prompt_T) + len(example.a_T) + len(example.b_T)
    assert not example.truncated


def test_a_long_pair_loses_its_prompts_left_for_both_answers_alike(tokenizer: Any) -> None:
    row = pair(1, response_a="yes", response_b="certainly not, and never again as long as I live")
    (whole,) = preference.examples(row, tokenizer, CONFIG)
    limit = len(whole.prompt_T) + len(whole.b_T) - 5
    (example,) = preference.examples(row, tokenizer, PreferenceModelConfig(max_tokens=limit))
    assert example.truncated
    assert example.prompt_T.tolist() == whole.prompt_T[5:].tolist()
    assert (example.a_T.tolist(), example.b_T.tolist()) == (whole.a_T.tolist(), whole.b_T.tolist())


@pytest.mark.parametrize("prob", [None, math.nan, -0.01, 1.01, math.inf])
def test_a_label_that_is_no_probability_is_an_error(tokenizer: Any, prob: float | None) -> None:
    with pytest.raises(DataError, match=r"label_prob is .*, expected a probability"):
        preference.examples(pair(1, label_prob=prob), tokenizer, CONFIG)


def test_two_equal_answers_teach_nothing(tokenizer: Any) -> None:
    assert preference.examples(pair(1, response_a="no", response_b="no"), tokenizer, CONFIG) == []


def test_weights_follow_where_a_pair_comes_from(tokenizer: Any) -> None:
    data = (Comparisons(path="label", weight=0.5), Comparisons(path="file", weight=2.25))
    config, row = PreferenceModelConfig(data=data), pair(1, source="file")  # also the source of the label's prompts
    for votes, source, weight in ([VOTE], "file", 0.5), ([], "file", 2.25), ([], "another", 1.0):
        (example,) = preference.examples({**row, "votes": votes, "source": source}, tokenizer, config)
        assert example.weight == weight


def test_bad_labels_are_quarantined_and_equal_answers_and_copies_counted(
    write_rows: Callable[[list[Row]], Path], tokenizer: Any, tmp_path: Path
) -> None:
    rows = [pair(i, split="train") for i in range(8)]
    rows[1] |= {"label_prob": math.nan}
    rows[2] |= {"label_prob": 1.5}
    rows[3] |= {"response_a": "no", "response_b": "no"}
    config = PreferenceModelConfig(data=(Comparisons(path="s0", weight=2), Comparisons(path="s1")))
    folder, out = write_rows(rows), StageDir(tmp_path)
    job = Job("preference_model", config, tmp_path, "auto", (folder,), tmp_path, 7, "cpu", 0.3, 1.0, 1.0)
    trained, _, counts = _examples(job, preference, tokenizer, out, lambda: None)
    bad = [json.loads(line) for line in out.quarantine_path.read_text().splitlines()]
    assert sorted(b["id"] for b in bad) == sorted(row["id"] for row in rows[1:3])
    assert (counts["quarantined"], counts["rows_without_example"]) == (2, 1)
    assert (counts["train_examples/s0"], counts["train_examples/s1"]) == (2, 4)  # row 0 twice, rows 4 to 7
    assert len({e.id for e in trained}) == counts["train_examples"] == 6
    with pytest.raises(StageFailed, match="2 of 8 rows are bad, the first for: label_prob is"):
        _examples(replace(job, max_bad_fraction=0.1), preference, tokenizer, out, lambda: None)


# ---- scores and loss ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def module(tiny: Path) -> preference.PairScores:
    module = preference.load(tiny, "float32", 1).eval()
    with torch.no_grad():
        module.hf.score.weight.mul_(20)  # scores of order 1
    return module


@pytest.fixture(scope="module")
def batch(tokenizer: Any) -> list[preference.Example]:
    return [e for i in range(6) for e in preference.examples(pair(i), tokenizer, CONFIG)]


@torch.no_grad()
def test_the_scores_of_a_pair_are_those_that_ppo_and_evaluation_give(
    module: preference.PairScores, batch: list[preference.Example], tokenizer: Any
) -> None:
    from cai_ray.models.tokenization import preference_input

    found = preference.score(module, batch, preference.collate(batch, CPU, CONFIG))
    for row, scores in zip(map(pair, range(6)), found, strict=True):
        for name, score in zip(("response_a", "response_b"), scores, strict=True):
            prompt, response = tokenizer.prompt(row["messages"]), tokenizer.response(row[name])
            ids = preference_input(prompt, response, tokenizer.eos_id, 500)
            assert score == pytest.approx(float(values_of(module.hf, ids)[-1]), abs=1e-5)
    assert np.std(found) > 0.1


def test_margin_and_centering_reach_the_loss(
    module: preference.PairScores, batch: list[preference.Example], tokenizer: Any
) -> None:
    tensors = preference.collate(batch, CPU, CONFIG)
    a, b = np.array(preference.score(module, batch, tensors)).T
    p = np.array([e.prob for e in batch])

    def nats(x: Any) -> Any:
        return np.log1p(np.exp(-x))

    for margin, center in ((0.0, 0.0), (0.7, 0.0), (0.0, 0.1), (0.7, 0.1)):
        config = PreferenceModelConfig(margin=margin, center_coef=center)
        expected = p * nats(a - b - margin) + (1 - p) * nats(b - a - margin) + center * (a + b) ** 2
        found = preference.loss(module, batch, tensors, config, 10)
        assert float(found.detach()) == pytest.approx(expected.sum() / 10, rel=1e-4)


# ---- held-out numbers -----------------------------------------------------------------------------------------------


def example(prob: float, source: str = "s", lengths: tuple[int, int] = (1, 1)) -> preference.Example:
    prompt, a, b = (np.zeros(n, np.int32) for n in (3, *lengths))
    return preference.Example(f"{prob} {source} {lengths}", prompt, a, b, prob, source, False)


def test_summary_by_hand() -> None:
    lengths = [(2, 1), (3, 1), (1, 1), (9, 1), (1, 1)]
    labels = [(1.0, "human"), (0.0, "human"), (0.7, "ai"), (0.5, "ai"), (0.2, "ai")]
    batch = [example(p, source, n) for (p, source), n in zip(labels, lengths, strict=True)]
    scores = [(2.0, 1.0), (3.0, 1.0), (0.5, 0.0), (9.0, 0.0), (1.0, 1.0)]  # right, wrong, right, undecided, tied
    out = preference.summary(batch, scores)
    assert out["eval/accuracy"] == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert (out["eval/accuracy/human"], out["eval/accuracy/ai"]) == (0.5, 0.75)
    prob = [1 / (1 + math.exp(b - a)) for a, b in scores]
    p = [label for label, _ in labels]
    loss = [-y * math.log(q) - (1 - y) * math.log(1 - q) for q, y in zip(prob, p, strict=True)]
    assert out["eval/loss"] == pytest.approx(sum(loss) / 5, rel=1e-6)
    assert out["eval/label_agreement"] == pytest.approx(1 - sum(abs(q - y) for q, y in zip(prob, p, strict=True)) / 5)
    leads = sorted([1.0, -2.0, 0.5, 0.0])
    assert out["eval/margin/p50"] == pytest.approx((leads[1] + leads[2]) / 2)
    assert out["eval/margin/p05"] == pytest.approx(leads[0] + 0.15 * (leads[1] - leads[0]))
    every, sizes = np.array(scores).T.ravel(), np.array(lengths).T.ravel()
    assert out["eval/length_bias"] == pytest.approx(np.corrcoef(every, sizes)[0, 1])
    assert preference.summary(batch, [(1.0, 1.0)] * 5)["eval/length_bias"] == 0.0


def test_calibration_does_not_depend_on_which_answer_stands_first() -> None:
    # Sure at 3/4 and right in three of four: calibrated, though every pair is labelled 1, as human ones are.
    batch, lead = [example(1.0, str(i)) for i in range(4)], math.log(3)
    scores = [(lead, 0.0), (lead, 0.0), (lead, 0.0), (0.0, lead)]
    assert preference.summary(batch, scores)["eval/calibration_error"] == pytest.approx(0.0, abs=1e-6)
    scores[3] = (lead, 0.0)
    assert preference.summary(batch, scores)["eval/calibration_error"] == pytest.approx(0.25)


def test_leaks_are_measured_without_prompts() -> None:
    batch = [example(1.0, lengths=(3, 1)), example(1.0, lengths=(1, 2)), example(0.5), example(0.1, lengths=(1, 5))]

    def by_length(examples: Any) -> list[preference.Score]:
        assert all(not len(e.prompt_T) for e in examples)
        return [(float(len(e.a_T)), float(len(e.b_T))) for e in examples]

    assert preference.leaks(batch, by_length) == {"eval/accuracy_response_only": pytest.approx(2 / 3)}
    assert preference.leaks([example(0.5)], by_length) == preference.leaks([], lambda _: []) == {}


# ---- training -------------------------------------------------------------------------------------------------------


def test_planted_soft_labels_are_recovered_and_calibrated(
    ray_cluster: None, write_rows: Callable[[list[Row]], Path], tiny: Path, tmp_path: Path
) -> None:
    """P(A better) = σ(worth of A's words - worth of B's): the model has to find each word's worth."""
    words = {"red": -1.5, "green": -0.5, "blue": 0.5, "white": 1.5}
    random = np.random.default_rng(0)

    def planted(i: int) -> Row:
        a, b = (random.choice(list(words), 2).tolist() for _ in "ab")
        lead = sum(words[w] for w in a) - sum(words[w] for w in b)
        texts = {"response_a": " ".join(a), "response_b": " ".join(b)}
        return pair(i, **texts, label_prob=1 / (1 + math.exp(-lead)))

    out = StageDir(tmp_path / "out", 7)
    out.path.mkdir()
    sharding = Sharding(dtype="float32", microbatch_tokens=8192)
    optim = Optim(lr=3e-3, schedule="linear", warmup_fraction=0.05)
    config = PreferenceModelConfig(batch_size=32, max_tokens=128, optim=optim, sharding=sharding, epochs=3)
    rows = [planted(i) for i in range(1000)]
    job = Job("preference_model", config, tiny, "plain", (write_rows(rows),), out.path, 7, "cpu", 0.0, 300.0, 300.0)
    metrics = run_training(job, out)
    assert metrics["eval/calibration_error"] < 0.05
    # A model that says 1/2 throughout is calibrated, too: it has to tell the pairs apart.
    assert metrics["eval/label_agreement"] > 0.93
    assert metrics["eval/accuracy"] > 0.9
    assert metrics["eval/accuracy_response_only"] > 0.8  # the prompts say nothing here
    assert metrics["rows_without_example"] == sum(r["response_a"] == r["response_b"] for r in rows) > 0
