"""PPO end to end: real engine, real workers, tiny model. On two cores a start of the workers takes half a minute."""

import json
import os
import signal
import time
from contextlib import contextmanager

import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file

from cai_ray.algo.ppo import logprobs_from_logits
from cai_ray.artifacts import StageDir
from cai_ray.errors import DataError, StageFailed
from cai_ray.models.checkpoints import load_causal_lm
from cai_ray.rl.groups import Call, WorkerDied, wait
from cai_ray.rl.sampler import Sampler
from cai_ray.rl.weight_sync import check_gap, check_sync, mean_gap

from .conftest import TEXTS, config


def lines(out, name="metrics.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def close(a, b, names, tolerance=2e-3):
    for name in names:
        assert a[name] == pytest.approx(b[name], rel=tolerance, abs=1e-5), name


def kill_the_actor():
    found = [p for p in psutil.Process().children(recursive=True) if p.cmdline()[:1] and "ray::Actor" in p.cmdline()[0]]
    assert len(found) == 1
    os.kill(found[0].pid, signal.SIGKILL)


@pytest.fixture(scope="package")
def killed_once(pool, train, tmp_path_factory):
    """Three steps of one rank a role; the actor is killed once, after step 1 and before its checkpoint."""
    out, seen = tmp_path_factory.mktemp("ppo"), {}

    @contextmanager
    def progress():
        def bar(done, total, words):
            if done == 2 and "before" not in seen:
                seen["before"] = lines(out)
                kill_the_actor()

        yield bar

    metrics, workers = train(out, config(checkpoint_every=1, snapshots=2), progress=progress, card=json.dumps)
    return {"out": out, "metrics": metrics, "workers": workers, **seen}


def test_five_roles_work_in_processes_of_their_own(killed_once):
    workers = killed_once["workers"]
    assert set(workers) == {"actor", "critic", "reward", "reference", "rollout"}
    assert len({w["pid"] for role in workers.values() for w in role}) == 5


def test_engine_and_trainer_agree_at_every_step_and_the_policy_starts_at_its_reference(killed_once):
    steps = lines(killed_once["out"])
    assert [step["step"] for step in steps] == [0, 1, 2]
    for step in steps:
        assert 0 <= step["rollout/logprob_gap"] < 2e-4
        assert step["rollout/logprob_gap"] <= step["rollout/logprob_gap_max"] < 2e-3
        parts = sum(v for k, v in step.items() if k.startswith("time/") and k != "time/step")
        assert parts == pytest.approx(step["time/step"], rel=0.02)
        assert step["objective/score"] == pytest.approx((step["objective/score_raw"] - 0.25) / 2, abs=1e-5)
    assert abs(steps[0]["objective/kl"]) < 1e-5
    assert steps[0]["policy/approx_kl"] < 1e-6  # the first optimizer step is taken on the old policy itself
    assert max(abs(step["objective/kl"]) for step in steps[1:]) > 1e-3
    assert min(step["policy/logprob_shift"] for step in steps) > 1e-3


def test_after_a_kill_the_step_is_taken_again_from_the_checkpoint(killed_once):
    before, after = killed_once["before"], lines(killed_once["out"])
    assert [step["step"] for step in before] == [0, 1]
    assert before[0] == after[0]
    assert before[1]["time"] < after[1]["time"]
    # The same rollouts, the same weights, and the same step of the optimizer, whose moments were restored.
    names = ["objective/score", "objective/kl", "rollout/length", "policy/entropy", "policy/grad_norm"]
    close(before[1], after[1], [*names, "policy/logprob_shift", "value/loss", "value/grad_norm"], 1e-4)
    kept = {path.name for path in (killed_once["out"] / "checkpoints").iterdir()}
    assert kept == {"step-2", "rollouts-2.parquet"}


def test_the_policy_and_its_snapshot_are_models_of_their_own(killed_once, policy):
    out = killed_once["out"]
    first, snapshot, last = (
        load_file(folder / "model.safetensors") for folder in (policy, out / "snapshots/step-2", out / "model")
    )
    assert first.keys() == snapshot.keys() == last.keys()
    for a, b in ((first, snapshot), (snapshot, last)):
        assert not all(torch.equal(a[name], b[name]) for name in a)
    assert (out / "model" / "chat_template.jinja").is_file()
    card = json.loads((out / "snapshots/step-2/README.md").read_text())
    assert card["steps"] == 2
    assert card["objective/score"] == lines(out)[1]["objective/score"]
    assert "snapshots/step-2/model.safetensors" in {entry["path"] for entry in StageDir(out).outputs()}
    samples = lines(out, "samples.jsonl")
    assert len(samples) == 9
    assert {s["prompt"] for s in samples} <= set(TEXTS)


def test_the_engine_holds_the_first_policy_again(killed_once, pool, policy):
    (engine,) = pool.engines(policy, dtype="float32", max_model_len=64)
    ids = [1, 2, 3, 4, 5, 6]
    with torch.no_grad():
        logits = load_causal_lm(policy, "float32")(torch.tensor([ids])).logits
    ours = logprobs_from_logits(logits[:, :-1], torch.tensor([ids[1:]])).tolist()
    theirs = ray.get(engine.prompt_logprobs.remote([ids], [1]), timeout=60)
    assert mean_gap(ours, theirs) < 1e-5


def test_two_ranks_take_the_same_step_and_a_skipped_sync_is_caught(killed_once, train, tmp_path, monkeypatch):
    sync = Sampler.sync

    def forgetful(self):
        if self.version < 2:
            sync(self)

    monkeypatch.setattr(Sampler, "sync", forgetful)
    settings = config(ranks=2, zero_stage=2, microbatch_tokens=130)
    critic = settings.critic.model_copy(
        update={"sharding": settings.critic.sharding.model_copy(update={"zero_stage": 3})}
    )
    with pytest.raises(StageFailed, match="after the weight sync of step 1"):
        train(tmp_path, settings.model_copy(update={"critic": critic}))
    (two,), one = lines(tmp_path), lines(killed_once["out"])[0]
    names = ["objective/score", "objective/reward", "rollout/length", "value/explained_variance"]
    names += ["policy/entropy", "policy/grad_norm", "policy/logprob_shift", "value/loss", "value/grad_norm"]
    close(two, one, names)


def test_a_gap_above_the_limit_or_no_number_stops_the_run():
    check_gap(1e-4, 1e-3, "now")
    for gap in (2e-3, float("nan")):
        with pytest.raises(StageFailed, match="now, engine and actor differ"):
            check_gap(gap, 1e-3, "now")
    check_sync(6e-6, 1e-8, 1e-3, 0)
    check_sync(2e-4, 5e-4, 1e-3, 0)
    check_sync(4e-3, 1e-3, 0.05, 0)  # bfloat16
    with pytest.raises(StageFailed, match=r"step 7, the engines are 0.0003 nats .* moved by 0.00035: they hold older"):
        check_sync(3e-4, 3.5e-4, 1e-3, 7)
    assert mean_gap([[-1.0, -2.0, -3.0], [-1.0]], [[-1.5, -2.0], [-1.25]]) == pytest.approx(0.25)


def test_a_worker_that_cannot_start_says_why_and_is_no_lost_process(pool):
    class Broken:
        def __init__(self):
            raise DataError("config.json has no scale", "train it with cai-ray")

        def info(self):
            return None, {}

    call = Call("reward 0", ray.remote(num_cpus=0)(Broken).remote().info.remote())
    with pytest.raises(StageFailed, match=r"reward 0 could not start: DataError: config\.json has no scale") as error:
        wait([call], 60, "start of PPO's workers")
    assert "train it with cai-ray" in error.value.message


def test_a_death_counts_before_what_it_does_to_the_others(pool):
    class Rank:
        def work(self, rank):
            if rank == 1:
                time.sleep(1)
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("connection closed by peer")

    ranks = [ray.remote(num_cpus=0)(Rank).remote() for _ in range(3)]
    ray.get([rank.__ray_ready__.remote() for rank in ranks], timeout=300)  # a loaded machine takes its time to start
    calls = [Call(f"actor {i}", rank.work.remote(i)) for i, rank in enumerate(ranks)]
    with pytest.raises(WorkerDied, match="an update: actor 1 is gone"):
        wait(calls, 60, "an update")
    with pytest.raises(StageFailed, match="an update: actor 0 failed with RuntimeError: connection") as error:
        wait(calls[::2], 60, "an update")
    assert not isinstance(error.value, WorkerDied)
