"""What PPO's controller costs by itself: workers that answer at once, in processes of their own, as many as are asked.

    python -m tests.bench.ppo_controller [--steps 500]

Every role but the controller is a stand-in: its methods return tables and scalars of the right form without computing.
The loop, the groups, the sampler, the advantages, rollouts on disk and the metrics are the real ones. A step with 2
and with 8 workers a role (8 responses a worker) gives what one more worker of each role costs, and so 64: of the step's
time, in which all stand-ins share the cores of this machine, and of the CPU time of the driver itself, which is what a
cluster cannot take over. The driver's memory is read over the steps with 8 workers, its first 50 left out.

The last line is one JSON object: step_s_2, step_s_8, step_s_64 (extrapolated), share_of_10_s; the same of driver_cpu_s;
driver_mib_first and driver_mib_last (means over 50 steps), driver_kib_a_step (the line through all) and the settings.
"""

import argparse
import json
import os
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from cai_ray.artifacts import StageDir
from cai_ray.cluster import start_ray
from cai_ray.config import Cluster, Learner, Optim, PPOConfig, Sharding
from cai_ray.config_files import load_config
from cai_ray.generation.actor import BAD
from cai_ray.records import to_table
from cai_ray.rl import loop
from cai_ray.rl.batches import table
from cai_ray.rl.groups import Group
from cai_ray.rl.rollouts import ROLLOUTS
from cai_ray.rl.workers import Actor, Worker
from tests.bench.ppo_work import prompt_rows

RESPONSE, EACH, SKIP = 8, 8, 50  # tokens; responses of a worker; steps that warm up


def lists(batch: pa.Table, rows: list[int], name: str) -> pa.Table:
    """A value for each response token of some rows."""
    return table(batch, rows, {name: pa.array([[-1.0] * RESPONSE] * len(rows), pa.list_(pa.float32()))})


class Light(Worker):
    """Answers for any role beside the engines."""

    keep, experience = staticmethod(Actor.keep), staticmethod(Actor.experience)

    def __init__(self, role: str, rank: int, ranks: int, setup: Any):
        super().__init__(role, rank, ranks, setup)
        self._engines = list[Any]()

    def _load(self) -> None:
        """Nothing to load."""

    def join(self, address: str, port: int) -> None:
        """Nothing to join."""

    def score(self, batch: pa.Table, piece: tuple[int, int]) -> pa.Table:
        """A score a row."""
        part = batch.slice(*piece)
        scores = pa.array([float(r) for r in range(len(part))])
        return table(part, list(range(len(part))), dict.fromkeys(("score", "score_raw"), scores))

    def logprobs(self, batch: pa.Table, what: Any) -> pa.Table:
        """The actor's of its share, or the reference's of a piece."""
        if self._role == "reference":
            part = batch.slice(*what)
            return lists(part, list(range(len(part))), "ref_logprobs")
        return lists(batch, list(range(self._rank, len(batch), self._ranks)), "old_logprobs")

    def values(self, batch: pa.Table, keep: bool) -> pa.Table:
        """The critic's."""
        return lists(batch, list(range(self._rank, len(batch), self._ranks)), "values")

    def update(self, *args: Any) -> dict[str, Any]:
        """Stats of an update."""
        return {"sums": {"loss": 0.0}, "grad_norm": 1.0, "lr": 0.0}

    def sync(self, version: int, engines: Group | None, folder: Path) -> None:
        """Rank 0 tells the engines their version."""
        import ray

        self._engines = engines.workers if engines else self._engines
        if self._rank == 0:
            ray.get([engine.call.remote("finish_weight_update", version) for engine in self._engines])

    def probe(self, batch: pa.Table) -> dict[str, Any]:
        """What the engines say too."""
        return {"ids": [[1] * 16] * 2, "starts": [8] * 2, "logprobs": [[-1.0] * RESPONSE] * 2, "shift": 1.0}

    def export(self, out: Path, adapter: Path | None = None) -> None:
        """Nothing to write."""


class LightEngine:
    """A rollout engine that says the same to everything."""

    def __init__(self) -> None:
        self._version = 0

    def call(self, method: str, *args: Any) -> tuple[Any, Any]:
        """As an `EngineActor`'s."""
        begun = time.time()
        found = getattr(self, method)(*args)
        return (found, {"span": (begun, time.time())}) if isinstance(found, pa.Table) else (None, found)

    def info(self) -> dict[str, Any]:
        """Who this is."""
        return {"pid": os.getpid(), "node": os.uname().nodename, "version": self._version}

    def finish_weight_update(self, version: int) -> None:
        """Takes the version."""
        self._version = version

    def prompt_logprobs(self, ids: list[list[int]], starts: list[int]) -> list[list[float]]:
        """As the actor's probe."""
        return [[-1.0] * (len(x) - s) for x, s in zip(ids, starts, strict=True)]

    def run(self, program: Any, asked: pa.Table, piece: tuple[int, int]) -> pa.Table:
        """A response for each request."""
        same = {
            "prompt": "p",
            "response": "r",
            "prompt_ids": [1] * 8,
            "response_ids": [2] * RESPONSE,
            "rollout_logprobs": [-1.0] * RESPONSE,
            "ended": True,
            "version": self._version,
        }
        rows = [{**row, **same} for row in asked.slice(*piece).select(["row", "id", "kind"]).to_pylist()]
        return to_table(rows, ROLLOUTS.append(pa.field(BAD, pa.string())))


def run(ranks: int, steps: int, folder: Path) -> tuple[float, float, list[float]]:
    """Seconds of a step with so many workers a role, those of the driver's CPU, its memory (MiB) at each step."""
    import ray

    from cai_ray.models import tiny_model
    from cai_ray.rl.loop import run_ppo
    from cai_ray.rl.setup import Setup

    learner = Learner(optim=Optim(lr=1e-6), sharding=Sharding(ranks=ranks, dtype="float32"))
    sizes = {"rollout_batch_size": EACH * ranks, "minibatch_size": EACH * ranks, "max_prompt_tokens": 64}
    config = PPOConfig(
        steps=steps,
        max_new_tokens=16,
        checkpoint_every=10**6,
        inference_ranks=ranks,
        actor=learner,
        critic=learner,
        **sizes,
    )
    cluster = Cluster(device="cpu", start_timeout_s=300, step_timeout_s=60)
    setup = Setup(config, tiny_model(), (tiny_model(),), None, "auto", "cpu", 0, cluster, "float32")
    engines = [ray.remote(LightEngine).options(num_cpus=0.1).remote() for _ in range(ranks)]
    memory: list[float] = []
    used: list[float] = []
    process = psutil.Process()

    def watch(done: float, total: float | None, words: str) -> None:
        memory.append(process.memory_info().rss / 2**20)
        used.append(sum(process.cpu_times()[:2]))

    out = StageDir(folder / str(ranks), 0)
    rows = prompt_rows((f"Prompt number {i}" for i in range(64)), "helpful")
    run_ppo(setup, rows, lambda: engines, out, lambda: nullcontext(watch))
    times = [json.loads(line)["time/step"] for line in (out.path / "metrics.jsonl").read_text("utf-8").splitlines()]
    for engine in engines:
        ray.kill(engine)
    skip = min(SKIP, steps // 2)
    return float(np.median(times[skip:])), (used[-1] - used[skip]) / (len(used) - 1 - skip), memory


def main() -> None:
    """Runs both sizes and prints the JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=500)
    told = parser.parse_args()
    loop.CLASSES.update(dict.fromkeys(loop.CLASSES, Light))
    start_ray(load_config("quickstart").cluster.joined)
    with tempfile.TemporaryDirectory() as temporary:
        small, small_cpu, _ = run(2, max(20, told.steps // 5), Path(temporary))
        large, large_cpu, memory = run(8, told.steps, Path(temporary))
    far, far_cpu = (a + (b - a) / 6 * 62 for a, b in ((small, large), (small_cpu, large_cpu)))
    kept = memory[min(SKIP, told.steps // 2) :]
    found = {
        "step_s_2": small,
        "step_s_8": large,
        "step_s_64": far,
        "share_of_10_s": far / 10,
        "driver_cpu_s_2": small_cpu,
        "driver_cpu_s_8": large_cpu,
        "driver_cpu_s_64": far_cpu,
        "driver_cpu_share_of_10_s": far_cpu / 10,
        "driver_mib_first": float(np.mean(kept[:50])),
        "driver_mib_last": float(np.mean(kept[-50:])),
        "driver_kib_a_step": float(np.polyfit(range(len(kept)), kept, 1)[0] * 1024),
    }
    print(json.dumps({**found, "steps": told.steps, "responses_a_worker": EACH, "cores": os.cpu_count()}))


if __name__ == "__main__":
    main()
