"""One Ray, one engine with the tiny model and its relatives: checkpoints of the same architecture, other weights."""

import json
import os
import shutil

import pytest

from cai_ray.config import Cluster

CLUSTER = Cluster(device="cpu", kv_cache_gib=0.25, max_num_seqs=32, start_timeout_s=240, step_timeout_s=120)
MAX_LEN = 256


@pytest.fixture(scope="package")
def model(tmp_path_factory):
    """The tiny model, with a generation_config that would spoil every test if it were obeyed."""
    from cai_ray.models import tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(tiny_model(), folder)
    spoiled = {"temperature": 0.01, "top_k": 1, "top_p": 0.1, "repetition_penalty": 9.0, "max_new_tokens": 1}
    (folder / "generation_config.json").write_text(json.dumps(spoiled))
    return folder


@pytest.fixture(scope="package")
def relative(model, tmp_path_factory):
    """Makes the folder of a model that differs from the tiny one in all weights."""
    import torch
    from safetensors.torch import load_file, save_file

    def make(seed):
        folder = tmp_path_factory.mktemp("models") / f"relative-{seed}"
        shutil.copytree(model, folder)
        noise = torch.Generator().manual_seed(seed)
        state = load_file(model / "model.safetensors")
        changed = {k: t + 0.05 * torch.randn(t.shape, generator=noise) for k, t in state.items()}
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.fixture(scope="package")
def pool(tmp_path_factory):
    """Ray of our own and its engines."""
    os.environ["RAY_usage_stats_enabled"] = "0"  # noqa: SIM112  Ray spells it so
    import ray

    from cai_ray.generation.pool import EnginePool

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, namespace="test")
    pool = EnginePool(CLUSTER, "cpu", tmp_path_factory.mktemp("logs"))
    yield pool
    pool.release()
    ray.shutdown()


@pytest.fixture
def engine(pool, model):
    """Calls methods of an engine that holds the tiny model: `engine("ask", request)`."""
    return Caller(pool.engines(model, dtype="float32", max_model_len=MAX_LEN)[0])


class Caller:
    """Calls an actor's methods and waits for the answer."""

    def __init__(self, handle):
        self.handle = handle

    def __call__(self, method, *args):
        import ray

        return ray.get(getattr(self.handle, method).remote(*args), timeout=120)


@pytest.fixture(scope="package")
def reference():
    """Log-probabilities by transformers: `reference(folder, prompt_ids, ids, temperature)`."""
    import torch

    from cai_ray.models.checkpoints import load_causal_lm

    loaded = {}

    def logprobs(folder, prompt_ids, ids, temperature=1.0):
        if folder not in loaded:
            loaded[folder] = load_causal_lm(folder, "float32").eval()
        with torch.no_grad():
            logits = loaded[folder](torch.tensor([[*prompt_ids, *ids]])).logits[0, len(prompt_ids) - 1 : -1]
        picked = (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])
        return picked[:, 0].tolist()

    return logprobs
