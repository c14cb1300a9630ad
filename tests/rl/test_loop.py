"""PPO end to end: real engine, real workers, tiny model."""

import json

import pytest
from safetensors.torch import load_file

from tests.rl.conftest import config


def lines(out, name="metrics.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return tmp_path_factory.mktemp("ppo")


def test_three_steps(train, done, policy):
    metrics, workers = train(done, config(checkpoint_every=2, snapshots=2))
    print(json.dumps(lines(done), indent=1))
    print(metrics, workers)
