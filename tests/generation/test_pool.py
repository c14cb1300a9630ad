import os
import shutil
import signal
from pathlib import Path

import pytest

from cai_ray.config import Cluster
from cai_ray.errors import ResourceError, StageFailed
from cai_ray.generation.pool import EnginePool
from cai_ray.models.memory import KEEP_MEMORY
from tests.generation.conftest import CLUSTER, MAX_LEN


def test_an_engine_is_reused_for_other_weights_and_a_shorter_limit(pool, engine, relative):
    other = relative(11)
    (again,) = pool.engines(other, dtype="float32", max_model_len=MAX_LEN - 10)
    assert again == engine.handle
    assert engine("info")["holds"] == (other, "auto")


def test_an_engine_s_process_began_with_what_malloc_is_to_do(engine):
    began_with = Path(f"/proc/{engine('info')['pid']}/environ").read_text().split("\0")
    assert {f"{name}={value}" for name, value in KEEP_MEMORY.items()} <= set(began_with)


def test_a_dead_engine_is_replaced(pool, engine, model):
    import ray

    os.kill(engine("info")["pid"], signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError):
        engine("info")
    (fresh,) = pool.engines(model, dtype="float32", max_model_len=MAX_LEN)
    assert fresh != engine.handle
    assert ray.get(fresh.info.remote(), timeout=60)["version"] == 0


def test_engines_that_cannot_fit_are_refused_with_the_arithmetic(pool, model, tmp_path):
    many = EnginePool(CLUSTER.model_copy(update={"engines": 6}), "cpu", tmp_path)
    with pytest.raises(ResourceError, match="6 engines take 6 CPU slots and Ray Data 3 more; the cluster has 8"):
        many.engines(model, dtype="float32", max_model_len=MAX_LEN)
    wide = EnginePool(Cluster(device="gpu", engines=2, tensor_parallel_size=4), "gpu", tmp_path)
    with pytest.raises(ResourceError, match=r"2 engines of 4 GPUs need 8 GPUs, .* the cluster has 0 on 1 machines"):
        wide.engines(model, dtype="float32", max_model_len=MAX_LEN)


def test_a_failed_start_shows_the_end_of_the_log(pool, model, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "model.safetensors").unlink()
    failing = EnginePool(CLUSTER, "cpu", tmp_path / "logs")
    with pytest.raises(StageFailed, match=r"engine-\w+ died; the end of .*engine-\w+\.log:\n(.*\n)*.*weights"):
        failing.engines(broken, dtype="float32", max_model_len=MAX_LEN)
