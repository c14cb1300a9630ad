"""Other ways to run PPO, end to end on the real engines: without a critic, one step ahead, with several rewards."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from cai_ray.config import Learner, Lora, Optim, Sharding
from cai_ray.models.checkpoints import load_causal_lm
from cai_ray.rl import sampler
from cai_ray.rl.batches import plan_of
from cai_ray.rl.guards import Guards
from cai_ray.rl.setup import Setup

from .conftest import config, prompts


def lines(out, name="metrics.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def spans(out):
    """(role, phase, step) -> [(begun, ended)], microseconds."""
    found = {}
    for event in json.loads((out / "timeline.json").read_text().rstrip(",\n") + "]"):
        key = (event["pid"], event["name"], event["args"]["step"])
        found.setdefault(key, []).append((event["ts"], event["ts"] + event["dur"]))
    return found


def vowels(prompts, responses):
    """A reward: whether the first letter is a vowel."""
    return [float(r.strip()[:1].lower() in set("aeiou")) for r in responses]


def test_a_bandit_is_learned_without_a_critic(train, tmp_path):
    """One token a response; a third of what the random model says begins with a vowel."""
    sizes = {"rollout_batch_size": 64, "minibatch_size": 64, "samples_per_prompt": 16, "max_new_tokens": 1, "steps": 40}
    settings = config(lr=3e-2, advantage="rloo", kl_coef=0.0, reward=f"{__name__}:vowels", **sizes)
    _, workers = train(tmp_path, settings, rewards=settings.reward)
    assert set(workers) == {"actor", "reward", "reference", "rollout"}
    steps = lines(tmp_path)
    assert [step["step"] for step in steps] == list(range(40))
    assert steps[0]["objective/score"] < 0.6
    assert sum(step["objective/score"] for step in steps[-5:]) / 5 >= 0.95
    assert max(step["rollout/logprob_gap"] for step in steps) < 5e-5
    assert max(step["rollout/logprob_gap_max"] for step in steps) < 1e-3
    assert not any(name.startswith("value/") for name in steps[-1])


def test_one_step_ahead_rollouts_and_training_overlap(train, reward_model, tmp_path):
    settings = config(
        staleness=1,
        steps=4,
        kl_penalty="k2_loss",
        entropy_coef=0.01,
        heldout_reward="x",
        critic_warmup_steps=1,
        ptx_coef=0.1,
        evaluate_every=2,
    )
    answers = {
        "id": ["a", "b", "c"],
        "prompt_ids": [[5, 6], [7], [8, 9]],
        "response_ids": [[10, 11], [12], [13, 14, 15]],
    }
    models = {"rewards": (reward_model, reward_model), "heldout": reward_model}
    train(tmp_path, settings, sl_rows=pa.table(answers), held=prompts()[:2], **models)
    steps, seen = lines(tmp_path), spans(tmp_path)
    for step in (1, 2, 3):  # sampled while the step before was scored and trained on
        ((begun, ended),) = seen["rollout", "rollout", step]
        ((scored, _),), ((_, updated),) = (
            seen[role, phase, step - 1] for role, phase in (("reward", "score"), ("critic", "update_critic"))
        )
        assert begun < updated
        assert ended > scored
    # The first step only warms the critic up, so step 1's stale rollouts are the actor's own; later ones are not.
    assert "policy/loss" not in steps[0]
    assert "policy/loss" in steps[1]
    losses = [step["policy/ptx_loss"] for step in steps[1:]]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 5  # nats a token of an untrained model
    assert steps[1]["rollout/logprob_gap"] < 5e-5
    assert min(step["rollout/logprob_gap"] for step in steps[2:]) > 1e-3
    for step in steps:
        assert step["objective/heldout_score"] == pytest.approx(step["objective/score"], abs=1e-6)
        assert ("eval/score" in step) == (step["step"] in (1, 3))
    first, last = steps[1], steps[3]
    for step in (first, last):  # mean of all answers: the two rewards and the one that watches are one model
        assert step["eval/heldout_score"] == pytest.approx(step["eval/score"], abs=1e-6)
        assert step["eval/score_raw"] == pytest.approx(2 * step["eval/score"] + 0.25, abs=1e-5)
    assert abs(first["eval/score"] - last["eval/score"]) > 1e-4  # the policy has moved
    assert {s["sample"] for s in lines(tmp_path, "samples.jsonl")} == {"best", "worst", "random"}


@pytest.mark.full
def test_side_by_side_responses_are_looked_at_while_others_arrive(train, reward_model, tmp_path, monkeypatch):
    """And by models that are cut over two workers; what they say is what whole ones say, one role after the other."""
    monkeypatch.setattr(sampler, "PIECE", 7)
    sharding = Sharding(dtype="float32", microbatch_tokens=76)  # of a prompt and a response at their longest
    learner = Learner(optim=Optim(lr=1e-3), sharding=sharding)
    for name, sharded in {"in turn": False, "at once": True}.items():
        monkeypatch.setattr(Setup, "side_by_side", sharded)  # as on GPUs
        sizes = {"rollout_batch_size": 96, "minibatch_size": 96, "samples_per_prompt": 4, "advantage": "rloo"}
        settings = config(steps=2, actor=learner, inference_ranks=2, inference_sharded=sharded, **sizes)
        train(tmp_path / name, settings, heldout=reward_model)
    times = {name: spans(tmp_path / name) for name in ("in turn", "at once")}
    for phase, role in (("score", "reward"), ("reference", "reference")):
        for step in (0, 1):  # the engine takes 16 at a time
            begun = {name: min(seen[role, phase, step])[0] for name, seen in times.items()}
            ended = {name: max(end for _, end in seen["rollout", "rollout", step]) for name, seen in times.items()}
            assert len(times["at once"]["rollout", "rollout", step]) == 14
            assert len(times["at once"][role, phase, step]) == 28
            assert begun["in turn"] > ended["in turn"]
            assert begun["at once"] < ended["at once"]
    batch = pq.read_table(tmp_path / "at once" / "checkpoints" / "rollouts-0.parquet")
    assert [] in plan_of(batch.slice(0, 7), range(7), 76, 1, 2)[0]  # a filler: rank 1 has less to do than rank 0
    one, other = (lines(tmp_path / name) for name in times)
    for step in (0, 1):
        for key in (k for k in one[step] if k.startswith(("objective/", "policy/"))):
            assert other[step][key] == pytest.approx(one[step][key], rel=1e-4, abs=1e-6), key
    assert abs(one[1]["objective/kl"]) > 1e-3


@pytest.mark.full
def test_log_probs_of_the_engines_can_stand_for_the_actor_s(train, tmp_path):
    for whose in ("trainer", "rollout"):
        train(tmp_path / whose, config(steps=2, old_logprobs=whose))
    for one, other in zip(*(lines(tmp_path / whose) for whose in ("trainer", "rollout")), strict=True):
        for key in ("objective/kl", "objective/score", "policy/loss", "policy/grad_norm", "policy/logprob_shift"):
            assert other[key] == pytest.approx(one[key], rel=2e-3, abs=2e-5), key
        assert other["rollout/logprob_gap"] == 0 < one["rollout/logprob_gap"]
        assert "time/logprobs" in one
        assert "time/logprobs" not in other


@pytest.mark.full
def test_engines_that_share_gpus_rest_while_the_others_work(train, tmp_path, monkeypatch):
    """On CPU engines have nothing to free, but the order of who works when is that of GPUs, and changes no weight."""
    rests, plain = [], sampler.Sampler._rest

    def noted(self, method, what, *args):
        if self._setup.colocated:
            rests.append((method, *args))
        plain(self, method, what, *args)

    monkeypatch.setattr(sampler.Sampler, "_rest", noted)
    for placement in ("separate", "colocated"):
        train(tmp_path / placement, config(steps=2, zero_stage=2, checkpoint_every=1, placement=placement))
    how = {"steps": 2, "zero_stage": 2, "placement": "colocated", "evaluate_every": 1}
    train(tmp_path / "evaluated", config(**how), held=prompts())
    awake = [("wake", "weights"), ("wake", "kv_cache")]
    without = [("sleep",), *awake] * 3
    # After an evaluation rewards work, so engines sleep, and are given the weights once more before the next step.
    assert rests == without + [*[("sleep",), *awake] * 2, ("sleep",)] * 2
    one, *others = (
        load_file(tmp_path / how / "model" / "model.safetensors") for how in ("separate", "colocated", "evaluated")
    )
    assert all(torch.equal(one[name], other[name]) for name in one for other in others)


def test_a_judge_cannot_be_sharded():
    with pytest.raises(ValueError, match="feedback_model as a reward cannot be sharded"):
        config(inference_sharded=True, critic_init="policy", reward=["feedback_model"])


@pytest.mark.full
@pytest.mark.parametrize("how", ["merged", "adapter"])
def test_adapters_are_trained_and_reach_the_engines(train, policy, tmp_path, how):
    from peft import PeftModel

    sharding = Sharding(dtype="float32", zero_stage=3)
    learner = Learner(optim=Optim(lr=1e-2), sharding=sharding, lora=Lora(rank=4))
    train(tmp_path, config(steps=3, checkpoint_every=2, actor=learner, critic=learner, lora_sync=how))
    # Each version under a name of its own; those before the last checkpoint are gone.
    sent = {path.name.rpartition("-")[2] for path in (tmp_path / "checkpoints").glob("adapter-*")}
    assert sent == ({"2", "3"} if how == "adapter" else set())
    steps = lines(tmp_path)
    assert max(step["rollout/logprob_gap"] for step in steps) < 5e-5
    assert min(step["policy/logprob_shift"] for step in steps) > 1e-3  # the engines follow a policy that moves
    assert steps[0]["objective/kl"] == pytest.approx(0, abs=1e-6)
    assert steps[2]["objective/kl"] > 1e-4
    ids = torch.arange(20, 52).reshape(2, 16)
    with torch.no_grad():
        base, merged = (load_causal_lm(folder, "float32").eval() for folder in (policy, tmp_path / "model"))
        start, expected = base(ids).logits, merged(ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
    torch.testing.assert_close(adapted, expected, rtol=1e-5, atol=1e-5)
    assert (expected - start).abs().max() > 1e-3
    before, after = load_file(policy / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


@pytest.mark.full
@pytest.mark.parametrize(
    ("every", "coefs", "left"),
    [
        # Checkpoint 2 is the policy that went too far: step 1 is taken again, its rollouts are not.
        (1, [0.01, 0.02, 0.02, 0.02], {"step-2", "step-3", "rollouts-2.parquet", "rollouts-3.parquet"}),
        # Before the first checkpoint there is the start.
        (9, [0.02] * 4, {"step-0", *(f"rollouts-{step}.parquet" for step in range(4))}),
    ],
)
def test_a_step_too_far_is_taken_again_from_the_checkpoint_before(every, coefs, left, train, tmp_path, monkeypatch):
    check, raised = Guards.check, []

    def once(self, step, metrics):
        if step == 2 and not raised:
            raised.append(step)
            metrics = {**metrics, "objective/kl": 99.0}
        return check(self, step, metrics)

    monkeypatch.setattr(Guards, "check", once)
    train(tmp_path, config(steps=4, checkpoint_every=every, kl_limit=50.0, on_kl_limit="roll_back", kl_coef=0.01))
    steps = lines(tmp_path)
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    assert [step["objective/kl_coef"] for step in steps] == coefs
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == left
