"""Prompt order, requests, what is kept of rollouts, and the order of shaping; values worked by hand."""

import asyncio
from dataclasses import dataclass
from itertools import chain

import pyarrow as pa
import pytest

from cai_ray.config import PPOConfig
from cai_ray.errors import DataError, StageFailed
from cai_ray.generation.actor import BAD
from cai_ray.generation.engine import Completion
from cai_ray.records import derive_seed, to_table
from cai_ray.rl.experience import make_experience
from cai_ray.rl.rollouts import ROLLOUTS, RollOut, keep_rollouts, prompts_of_steps, requests


def prompt(i, kind="harmful", text="hi"):
    return {"id": f"{kind}{i}", "kind": kind, "messages": [{"role": "user", "content": text}], "split": "train"}


PROMPTS = [prompt(i, kind) for kind in ("harmful", "helpful") for i in range(6)]


class Words:
    format = "plain"

    def prompt(self, messages):
        if messages[-1]["content"] == "refused":
            raise DataError("the template knows no such turn")
        return [7] * len(messages[-1]["content"].split())


def steps_of(prompts, seed, **changes):
    return prompts_of_steps(prompts, PPOConfig(**changes), seed, Words())[0]


# ---- prompts --------------------------------------------------------------------------------------------------------


def test_each_epoch_reads_every_prompt_once_in_its_own_order():
    steps = steps_of(PROMPTS, 1, steps=6, rollout_batch_size=8, minibatch_size=8, samples_per_prompt=2)
    ids = [row["id"] for row in chain(*steps)]
    assert [len(step) for step in steps] == [4] * 6
    assert sorted(ids[:12]) == sorted(ids[12:]) == sorted(p["id"] for p in PROMPTS)
    assert ids[:12] != ids[12:]


def test_the_order_depends_on_seed_and_ids_not_on_how_the_rows_arrive():
    sizes = {"rollout_batch_size": 4, "minibatch_size": 4}
    first = steps_of(PROMPTS, 1, steps=3, **sizes)
    assert steps_of(PROMPTS[::-1], 1, steps=3, **sizes) == first
    assert steps_of(PROMPTS, 1, steps=9, **sizes)[:3] == first
    assert steps_of(PROMPTS, 2, steps=3, **sizes) != first


def test_the_helpful_share_holds_over_steps():
    steps = steps_of(PROMPTS, 1, steps=8, rollout_batch_size=3, minibatch_size=3, helpful_fraction=0.25)
    helpful = [sum(row["kind"] == "helpful" for row in step) for step in steps]
    assert sum(helpful) == 6  # a quarter of 24
    assert set(helpful) <= {0, 1}


def test_a_kind_without_prompts_is_an_error_not_an_endless_search():
    harmful = [p for p in PROMPTS if p["kind"] == "harmful"]
    with pytest.raises(DataError, match="max_prompt_tokens"):
        steps_of(harmful, 0, rollout_batch_size=4, minibatch_size=4, helpful_fraction=0.5)
    with pytest.raises(DataError, match="none of 0 prompts") as error:  # such as held-out ones of few prompts
        steps_of([], 0, rollout_batch_size=4, minibatch_size=4)
    assert "held-out ones where ppo.evaluate_every" in error.value.fix


def test_long_and_refused_prompts_are_left_out_and_named():
    config = PPOConfig(rollout_batch_size=2, minibatch_size=2, max_prompt_tokens=8, steps=3)
    rows = [prompt(0), prompt(1, text="a " * 9), prompt(2, text="a " * 8), prompt(3, text="refused")]
    steps, left_out, looked_at = prompts_of_steps([*rows, *map(prompt, range(4, 90))], config, 0, Words())
    assert len(list(chain(*steps))) == looked_at - len(left_out) == 6  # what no step reaches is not looked at
    steps, left_out, looked_at = prompts_of_steps(rows, config, 0, Words())
    assert {row["id"] for row in chain(*steps)} == {"harmful0", "harmful2"}
    assert looked_at == 4
    assert left_out == [
        {"id": "harmful1", "reason": "the prompt has 9 tokens, more than 8"},
        {"id": "harmful3", "reason": "the template knows no such turn"},
    ]


def test_each_response_has_a_seed_of_its_own_that_names_row_step_and_sample():
    config = PPOConfig(rollout_batch_size=6, minibatch_size=6, samples_per_prompt=2)
    asked = requests([PROMPTS[0], PROMPTS[1], PROMPTS[0]], config, 5, step=3).to_pylist()
    assert [row["row"] for row in asked] == list(range(6))
    assert [row["id"] for row in asked] == [f"harmful{i}" for i in ("0-0", "0-1", "1-0", "1-1", "0-2", "0-3")]
    assert {(row["prompt_id"], row["step"]) for row in asked} == {("harmful0", 3), ("harmful1", 3)}
    assert asked[5]["seed"] == derive_seed(5, "harmful0", "ppo/3/3")
    assert len({row["seed"] for row in asked}) == 6


# ---- rollouts -------------------------------------------------------------------------------------------------------


@dataclass
class Script:
    """An engine that answers from a list."""

    answers: list
    tokenizer: object

    async def ask(self, request):
        self.asked = [*getattr(self, "asked", []), request]
        return self.answers.pop(0)


def test_a_response_that_is_cut_to_nothing_is_sampled_again_without_stop_markers():
    done = Completion(ids=[4, 5], logprobs=[-1.0, -2.0], text="Human:", ended=True, version=2)
    nothing = Completion(ids=[], logprobs=[], text="", ended=True, version=2)
    engine = Script([nothing, done], Words())
    asked = requests(PROMPTS[:1], PPOConfig(rollout_batch_size=1, minibatch_size=1), 0, 0).to_pylist()[0]
    row = asyncio.run(RollOut(PPOConfig(temperature=0.7, max_new_tokens=9))(asked, engine))
    first, second = engine.asked
    assert (first.temperature, first.max_new_tokens, first.seed) == (0.7, 9, asked["seed"])
    assert first.stop
    assert not second.stop
    assert (row["response_ids"], row["rollout_logprobs"], row["version"]) == ([4, 5], [-1.0, -2.0], 2)
    to_table([row], ROLLOUTS)


def rollout(row, response_ids, logprobs, ended=True):
    return {
        **{"row": row, "id": f"p{row}-0", "kind": "harmful", "prompt": "p", "response": "r", "version": 4},
        **{"prompt_ids": [9, 9], "response_ids": response_ids, "rollout_logprobs": logprobs, "ended": ended},
    }


def answered(*rows):
    return to_table(rows, ROLLOUTS.append(pa.field(BAD, pa.string())))


A, B = rollout(0, [1, 2], [-1.1, -2.0]), rollout(1, [3], [-1.2], ended=False)


def test_rollouts_are_put_in_order_kept_and_read_again(tmp_path):
    path = tmp_path / "rollouts-4.parquet"
    batch, seen = keep_rollouts(path, 2, answered(B), answered(A))
    assert batch["response_ids"].to_pylist() == [[1, 2], [3]]
    assert (seen["tokens"], seen["response_tokens"], seen["versions"]) == (7, 3, [4])
    again, seen_again = keep_rollouts(path, 2)
    assert again.equals(batch)
    assert seen_again == seen
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_missing_responses_are_an_error_and_nothing_is_kept(tmp_path):
    with pytest.raises(StageFailed, match="3 responses were asked for, 2 came"):
        keep_rollouts(tmp_path / "rollouts-0.parquet", 3, answered(A, B))
    with pytest.raises(StageFailed, match="2 responses were asked for, 1 came; too long"):
        keep_rollouts(tmp_path / "rollouts-0.parquet", 2, answered(A, {"id": "p1-0", BAD: "too long"}))
    assert not list(tmp_path.iterdir())


# ---- rewards and advantages -----------------------------------------------------------------------------------------


def parts():
    per_token = pa.list_(pa.float32())
    return [
        pa.table({"row": pa.array([1], pa.int32()), "score_raw": [7.0], "score": [3.0]}),
        pa.table({"row": pa.array([0], pa.int32()), "score_raw": [5.0], "score": [3.0]}),
        pa.table({"row": pa.array([1, 0], pa.int32()), "old_logprobs": pa.array([[-1], [-1, -2]], per_token)}),
        pa.table({"row": pa.array([0, 1], pa.int32()), "ref_logprobs": pa.array([[-1.5, -1], [-1]], per_token)}),
        pa.table({"row": pa.array([0, 1], pa.int32()), "values": pa.array([[1, 0.5], [0]], per_token)}),
    ]


CONFIG = PPOConfig(gae_lambda=0.5, kl_coef=0.1, score_clip=2.0, missing_eos_penalty=2.5)


def test_penalty_then_clip_then_kl_then_gae_then_whitening():
    # Row 0 ended: 3 is clipped to 2, KL k1 = (0.5, -1): rewards (-0.05, 2.1), advantages (0.25, 1.6).
    # Row 1 was cut off: 3 - 2.5 = 0.5 (clipped first it would be -0.5), KL 0: reward 0.5, advantage 0.5.
    batch, out = make_experience(CONFIG, 0.1, to_table([A, B], ROLLOUTS), *parts())
    assert batch["returns"].to_pylist() == [pytest.approx([1.25, 2.1]), pytest.approx([0.5])]
    assert batch["advantages"].to_pylist() == [
        pytest.approx([-0.74258, 1.13708], abs=1e-4),
        pytest.approx([-0.39450], abs=1e-4),
    ]
    metrics = out["metrics"]
    assert metrics["objective/kl"] == pytest.approx(-0.25)  # nats per response, not per token
    assert metrics["objective/score"] == pytest.approx(3)
    assert metrics["objective/score_raw"] == pytest.approx(6)
    assert metrics["objective/reward"] == pytest.approx((2.05 + 0.5) / 2)
    assert metrics["rollout/logprob_gap"] == pytest.approx(0.1, abs=1e-6)
    assert metrics["rollout/logprob_gap_max"] == pytest.approx(0.2, abs=1e-6)
    assert metrics["rollout/truncated"] == 0.5
    assert metrics["rollout/length"] == 1.5
    assert metrics["value/explained_variance"] == pytest.approx(1 - 0.515833 / 0.640833, abs=1e-4)
    assert [(s["sample"], s["id"]) for s in out["samples"]] == [(n, "p0-0") for n in ("best", "worst", "random")]


def test_without_whitening_advantages_are_gae_s_own():
    config = CONFIG.model_copy(update={"whiten_advantages": False})
    batch, _ = make_experience(config, 0.1, to_table([A, B], ROLLOUTS), *parts())
    assert batch["advantages"].to_pylist() == [pytest.approx([0.25, 1.6]), pytest.approx([0.5])]


def test_a_worker_that_answers_for_too_few_rows_is_noticed():
    with pytest.raises(StageFailed, match="score: the workers answered for 1 of 2"):
        make_experience(CONFIG, 0.1, to_table([A, B], ROLLOUTS), *parts()[1:])
