"""What ends a run, what rolls it back, what it warns of; and the timeline."""

import json

import pytest

from cai_ray.config import PPOConfig
from cai_ray.errors import StageFailed
from cai_ray.rl.experience import repetitive
from cai_ray.rl.groups import Call, Timeline
from cai_ray.rl.guards import Guards, RollBack

CALM = {"objective/kl": 0.1, "objective/score": 0.0, "rollout/length": 10.0, "rollout/repetitive": 0.0}


def guards(tmp_path, *lines, **changes):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, **line}) + "\n" for i, line in enumerate(lines)))
    return Guards(PPOConfig(**changes), path)


def alarms(guard, *steps):
    return [text for i, step in enumerate(steps) for text in guard.check(i, {**CALM, **step})]


def test_a_number_that_is_none_ends_the_run_by_name(tmp_path):
    with pytest.raises(StageFailed, match="step 3: objective/score not finite"):
        guards(tmp_path).check(3, {**CALM, "objective/score": float("nan")})


def test_kl_above_its_limit_stops_or_rolls_back(tmp_path):
    far = {**CALM, "objective/kl": 12.5}
    assert guards(tmp_path, kl_limit=12.5).check(0, far) == []
    with pytest.raises(StageFailed, match=r"step 4: the policy is 12.5 nats .* ppo.kl_limit is 12") as stopped:
        guards(tmp_path, kl_limit=12).check(4, far)
    assert not isinstance(stopped.value, RollBack)
    with pytest.raises(RollBack):
        guards(tmp_path, kl_limit=12, on_kl_limit="roll_back").check(4, far)


def test_repetition_is_said_once(tmp_path):
    found = alarms(guards(tmp_path), *[{"rollout/repetitive": 0.8}] * 4)
    assert found == ["PPO, step 0: 80% of the responses repeat themselves: the policy collapses."]


def test_length_that_runs_away_is_noticed_also_over_a_restart(tmp_path):
    short, long = {**CALM, "rollout/length": 10.0}, {"rollout/length": 21.0}
    assert alarms(guards(tmp_path), *[short] * 5, *[{"rollout/length": 20.0}] * 5) == []
    found = alarms(guards(tmp_path, *[short] * 5), *[long] * 5)
    assert found == ["PPO, step 4: responses have 21 tokens, at first 10: length is being rewarded."]


def test_a_score_that_rises_while_the_held_out_one_falls_is_noticed(tmp_path):
    def step(score, heldout):
        return {"objective/score": score, "objective/heldout_score": heldout}

    assert alarms(guards(tmp_path), *[step(0, 0)] * 5, *[step(1, 1)] * 5) == []
    assert alarms(guards(tmp_path), *[step(0, 0)] * 5, *[step(-1, -1)] * 5) == []
    found = alarms(guards(tmp_path), *[step(0, 0)] * 5, *[step(1, -0.5)] * 5)
    assert any("the score rose by" in text for text in found)


def test_repetitive_means_that_half_of_the_four_grams_came_before():
    assert not repetitive([1, 2, 3])
    assert not repetitive(range(20))
    assert repetitive([1, 2] * 10)
    assert repetitive([7] * 9)
    assert not repetitive([7] * 5)  # two 4-grams, one of them new


def test_the_timeline_is_a_chrome_trace_that_a_restart_goes_on_with(tmp_path):
    path = tmp_path / "timeline.json"
    Timeline(path).add("update", 3, [Call("actor 1", None)], [{"span": (10.0, 10.5)}])
    Timeline(path).add("rollout", 4, [Call("rollout 0", None)], [{"span": (10.2, 11.0)}])
    text = path.read_text()
    assert text.endswith(",\n")
    first, second = json.loads(text.rstrip(",\n") + "]")
    assert (first["pid"], first["tid"], first["name"], first["args"]) == ("actor", 1, "update", {"step": 3})
    assert (first["ts"], first["dur"], second["ts"]) == (10_000_000, 500_000, 10_200_000)
