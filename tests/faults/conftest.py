"""Ray of our own with two engines, stand-ins unless a test asks for vLLM's."""

import os

import pytest

from cai_ray.generation.actor import EngineActor
from tests.faults.chain import CLUSTER, MAX_LEN
from tests.faults.standin import StandIn
from tests.rl.conftest import CLUSTER as PPO_CLUSTER
from tests.rl.conftest import policy, reward_model, train  # noqa: F401  PPO's own, on the pool below


@pytest.fixture(scope="package")
def cluster():
    os.environ["RAY_usage_stats_enabled"] = "0"  # noqa: SIM112  Ray spells it so
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, namespace="faults")
    yield
    ray.shutdown()


@pytest.fixture(scope="package")
def pool_of(cluster, tmp_path_factory):
    """Makes what gives engines of an actor class; they are reused while tests ask for the same class."""
    import cai_ray.generation.pool as pool
    from cai_ray.models import tiny_model

    opened, model = {}, tiny_model()

    def engines(actor):
        if actor not in opened:
            for other in opened.values():
                other.release()
            opened[actor] = pool.EnginePool(CLUSTER, "cpu", tmp_path_factory.mktemp("logs"))

        def get():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pool, "EngineActor", actor)
                return opened[actor].engines(model, dtype="float32", max_model_len=MAX_LEN)

        return get

    engines.opened = opened
    yield engines
    for each in opened.values():
        each.release()


@pytest.fixture
def standins(pool_of):
    return pool_of(StandIn)


@pytest.fixture
def vllm_engines(pool_of):
    yield pool_of(EngineActor)
    pool_of.opened.pop(EngineActor).release()  # nobody is to take their processes for PPO's


@pytest.fixture(scope="package")
def pool(cluster, tmp_path_factory):
    """Where PPO's `train` gets its engines."""
    from cai_ray.generation.pool import EnginePool

    pool = EnginePool(PPO_CLUSTER, "cpu", tmp_path_factory.mktemp("logs"))
    yield pool
    pool.release()
