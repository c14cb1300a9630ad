"""A small Ray, a tiny policy with its engine, and a tiny preference model of the same family."""

import os
from contextlib import contextmanager, nullcontext

import pytest

from cai_ray.artifacts import StageDir
from cai_ray.config import Cluster, Learner, Optim, PPOConfig, Sharding
from cai_ray.records import row_id

CLUSTER = Cluster(device="cpu", kv_cache_gib=0.25, max_num_seqs=16, start_timeout_s=240, step_timeout_s=120)
TEXTS = ["How do I bake bread?", "Tell me a joke.", "Why is the sky blue?", "Name three rivers.", "What is a prime?"]


def prompts():
    """Five short prompts of both kinds."""
    rows = []
    for i, text in enumerate(TEXTS):
        messages = [{"role": "user", "content": text}]
        kind = "helpful" if i % 2 else "harmful"
        rows.append({"id": row_id(text), "messages": messages, "kind": kind, "source": "test", "split": "train"})
    return rows


def config(ranks=1, zero_stage=0, microbatch_tokens=8192, lr=1e-3, **changes):
    """Three steps of eight responses; rates so high that a step shows."""
    sharding = Sharding(ranks=ranks, zero_stage=zero_stage, microbatch_tokens=microbatch_tokens, dtype="float32")
    learner = Learner(optim=Optim(lr=lr), sharding=sharding)
    sizes = {"rollout_batch_size": 8, "minibatch_size": 8, "max_prompt_tokens": 64, "max_new_tokens": 12}
    return PPOConfig(**{"steps": 3, **sizes, "actor": learner, "critic": learner, "kl_coef": 0.05, **changes})


@pytest.fixture(scope="package")
def policy():
    """Folder of the tiny language model."""
    from cai_ray.models import tiny_model

    return tiny_model()


@pytest.fixture(scope="package")
def reward_model(policy, tmp_path_factory):
    """Folder of a preference model that has learned nothing, with a reward scale."""
    from cai_ray.models.checkpoints import load_scalar_model, save_pretrained
    from cai_ray.models.tokenization import Tokenizer

    model = load_scalar_model(policy, "float32", seed=1)
    model.config.reward_mean, model.config.reward_std = 0.25, 2.0
    out = tmp_path_factory.mktemp("models") / "reward"
    save_pretrained(model.state_dict().items(), model.config, Tokenizer.load(policy), out)
    return out


@contextmanager
def small_pool(logs):
    """Ray of our own and its engines."""
    # Nobody waits for workers that are started ahead, and at Ray's own niceness whatever else runs here comes first.
    quiet = ("RAY_usage_stats_enabled", "RAY_prestart_worker_first_driver", "RAY_enable_worker_prestart")
    os.environ.update(dict.fromkeys([*quiet, "RAY_worker_niceness"], "0"))
    import ray

    from cai_ray.generation.pool import EnginePool

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    pool = EnginePool(CLUSTER, "cpu", logs)
    yield pool
    pool.release()
    ray.shutdown()


def engines_of(pool, policy, count=1, rank=0):
    """What `run_ppo` gets its engines by."""
    how = {"max_model_len": 64 + 12, "count": count, "lora_rank": rank, "updated": True}
    return lambda group=None: pool.engines(policy, dtype="float32", group=group, **how)


@pytest.fixture(scope="package")
def pool(tmp_path_factory):
    """Ray of our own and its engines, for a whole package of tests."""
    with small_pool(tmp_path_factory.mktemp("logs")) as pool:
        yield pool


@pytest.fixture(scope="package")
def train(pool, policy, reward_model):
    """Runs `run_ppo` into a folder with a configuration."""
    from cai_ray.rl.loop import run_ppo
    from cai_ray.rl.setup import Setup

    def run(
        out,
        settings,
        progress=lambda: nullcontext(lambda done, total, words: None),
        rewards=(),
        heldout=None,
        cluster=CLUSTER,
        count=1,
        sl_rows=None,
        card=None,
        held=(),
    ):
        setup = Setup(settings, policy, rewards or (reward_model,), heldout, "auto", "cpu", 7, cluster, "float32")
        stage = StageDir(out, 7)
        stage.card = card
        engines = engines_of(pool, policy, count, settings.adapter_rank)
        return run_ppo(setup, prompts(), engines, stage, progress, sl_rows, held=held)

    return run
