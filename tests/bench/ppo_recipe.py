"""Fifty steps of the PPO trainer, with RLOO's advantages, on a 135M policy against a preference model of human
comparisons, watched by a second one.

    python -m tests.bench.ppo_recipe FOLDER [--steps 50]

Data: HH's harmless-base pairs as in `preference_accuracy`. One preference model is trained on the first 900 training
pairs and is the reward; another, on the other 900 with another head, only watches: what raises the first and not the
second is an artefact. The policy starts from the embedded model; its prompts are the first human turns of the training
conversations. FOLDER keeps models, metrics.jsonl and the timeline; the same command continues.

The last line is one JSON object: reward and held-out score at the first and last ten steps with 95% intervals over
steps, KL in nats per response, both models' accuracy on held-out pairs, the curve (step, score, held-out score, KL),
how far engines and actor were from each other and how far each step moved the actor (both nats a token; the mean and
the largest gap), and the settings.
"""

import argparse
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from cai_ray.artifacts import StageDir
from cai_ray.config import Cluster, Learner, Optim, PPOConfig, Sharding
from cai_ray.records import LABELED_PAIR, Row, to_table
from tests.bench.ppo_work import prompt_rows
from tests.bench.preference_accuracy import pairs, train

THREADS = os.cpu_count() or 1
HALF, EDGE, MAX_PROMPT, MAX_NEW = 900, 10, 96, 32
CLUSTER = Cluster(device="cpu", kv_cache_gib=1.0, max_num_seqs=32, start_timeout_s=300, step_timeout_s=900)


def settings(steps: int) -> PPOConfig:
    """What is tried: every value that differs from PPOConfig's own."""

    def learner(lr: float) -> Learner:
        sharding = Sharding(dtype="float32", microbatch_tokens=4096, cpus_per_rank=THREADS)
        return Learner(optim=Optim(lr=lr, schedule="linear", warmup_fraction=0.1), sharding=sharding)

    sizes = {"rollout_batch_size": 32, "minibatch_size": 32, "max_prompt_tokens": MAX_PROMPT, "max_new_tokens": MAX_NEW}
    return PPOConfig(
        steps=steps,
        # Four samples of a prompt against each other: prompts differ more than their answers do, which a critic would
        # have to learn in so few steps.
        advantage="rloo",
        samples_per_prompt=4,
        kl_coef=0.05,
        kl_limit=20.0,
        checkpoint_every=10,
        actor=learner(4e-5),
        critic=learner(4e-5),
        **sizes,
    )


def preference_model(name: str, seed: int, rows: Sequence[Row], folder: Path) -> dict[str, float]:
    """Trains one on `rows` unless it is there; its held-out metrics."""
    done = folder / f"{name}.json"
    if not done.is_file():
        data = folder / f"{name}-data"
        data.mkdir(exist_ok=True)
        pq.write_table(to_table(rows, LABELED_PAIR), data / "part.parquet")
        done.write_text(json.dumps(train(seed, folder, data, 1.0)))
    return json.loads(done.read_text())


def improve(rows: Sequence[Row], folder: Path, steps: int) -> list[dict[str, float]]:
    """PPO; the metrics of each step."""
    from cai_ray.generation.pool import EnginePool
    from cai_ray.models import embedded_model
    from cai_ray.rl.loop import run_ppo
    from cai_ray.rl.setup import Setup

    turns = sorted({row["messages"][0]["content"] for row in rows})
    model, out = embedded_model(), StageDir(folder / "ppo", 0)
    pool = EnginePool(CLUSTER, "cpu", folder / "logs")
    reward, heldout = (folder / f"seed-{seed}" / "model" for seed in (0, 1))
    setup = Setup(settings(steps), model, (reward,), heldout, "auto", "cpu", 0, CLUSTER, "float32")

    def show(done: float, total: float | None, words: str) -> None:
        print(f"step {done:.0f} of {total:.0f}: {words}", flush=True)

    def engines() -> list[Any]:
        return pool.engines(model, dtype="float32", max_model_len=MAX_PROMPT + MAX_NEW)

    try:
        run_ppo(setup, prompt_rows(turns, "harmful"), engines, out, lambda: nullcontext(show))
    finally:
        pool.release()
    return [json.loads(line) for line in (out.path / "metrics.jsonl").read_text("utf-8").splitlines()]


def interval(values: Sequence[float]) -> list[float]:
    """Mean, and its 95% interval."""
    half = 1.96 * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return [round(x, 4) for x in (float(np.mean(values)), float(np.mean(values)) - half, float(np.mean(values)) + half)]


def main() -> None:
    """Trains both preference models and the policy, and prints the JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    told = parser.parse_args()
    told.folder = told.folder.resolve()  # Ray Train takes no relative path
    told.folder.mkdir(parents=True, exist_ok=True)
    import ray

    ray.init(address="local", num_cpus=THREADS + 6, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    every = pairs()
    learned, held = ([row for row in every if row["split"] == split] for split in ("train", "test"))
    judged = {
        name: preference_model(name, seed, [*part, *held], told.folder)
        for seed, (name, part) in enumerate({"reward": learned[:HALF], "heldout": learned[HALF:]}.items())
    }
    steps = improve(learned, told.folder, told.steps)
    out: dict[str, Any] = {}
    for name in ("objective/score", "objective/heldout_score", "objective/kl"):
        out[name] = {
            "first": interval([s[name] for s in steps[:EDGE]]),
            "last": interval([s[name] for s in steps[-EDGE:]]),
        }
    out["accuracy"] = {name: found["eval/accuracy"] for name, found in judged.items()}
    keys = ("objective/score", "objective/heldout_score", "objective/kl")
    out["curve"] = [[s["step"], *(round(s[key], 3) for key in keys)] for s in steps]
    keys = ("rollout/logprob_gap", "rollout/logprob_gap_max", "policy/logprob_shift")
    out["gap_gap_max_shift"] = [[float(f"{s[key]:.2g}") for key in keys] for s in steps]
    print(json.dumps({**out, "settings": settings(told.steps).model_dump(), "threads": THREADS}))


if __name__ == "__main__":
    main()
