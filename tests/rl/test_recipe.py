"""The committed run of tests/bench/ppo_recipe.py: what README says of it, and that it is of these settings."""

import json
from pathlib import Path

import pytest

from cai_ray.config import PPOConfig
from cai_ray.errors import StageFailed
from cai_ray.rl.weight_sync import GAP_LIMITS, check_sync
from tests.bench.ppo_recipe import EDGE, interval, settings

RUN = json.loads((Path(__file__).parents[1] / "bench" / "ppo_recipe.json").read_text("utf-8"))


def test_the_committed_run_has_the_recipe_s_settings():
    assert PPOConfig(**RUN["settings"]).identity() == settings(50).identity()  # on any number of cores
    assert [step for step, *_ in RUN["curve"]] == list(range(50))


def test_engines_followed_the_actor_at_every_step_and_a_skipped_sync_would_have_been_seen():
    assert len(RUN["gap_gap_max_shift"]) == 50
    for step, (gap, largest, shift) in enumerate(RUN["gap_gap_max_shift"]):
        assert gap < 5e-5
        assert largest < 1e-3
        check_sync(gap, shift, GAP_LIMITS["float32"], step)
        with pytest.raises(StageFailed, match=r"they hold older weights|differ by"):  # as far off as the step has moved
            check_sync(shift, shift, GAP_LIMITS["float32"], step)


def test_both_scores_rose_and_the_kl_stayed_within_its_limit():
    for place, name in ((1, "objective/score"), (2, "objective/heldout_score")):
        values = [row[place] for row in RUN["curve"]]
        first, last = interval(values[:EDGE]), interval(values[-EDGE:])
        for told, found in ((RUN[name]["first"], first), (RUN[name]["last"], last)):
            assert max(abs(a - b) for a, b in zip(told, found, strict=True)) < 2e-3
        assert first[2] < last[1]  # the intervals lie apart
    assert max(row[3] for row in RUN["curve"]) < RUN["settings"]["kl_limit"]
