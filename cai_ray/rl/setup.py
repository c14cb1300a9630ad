"""What the controller and every worker are told when they start, and the form of what workers answer."""

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from cai_ray.config import Cluster, Learner, PPOConfig
from cai_ray.constitution import Constitution
from cai_ray.rl.groups import free_address
from cai_ray.training.deepspeed import init_distributed, loading, sharded_to_look

Answer = tuple[Any, Any]  # (payload, which goes from worker to worker; scalars, which reach the controller)


@dataclass(frozen=True)
class Judge:
    """A feedback model as a reward."""

    model: Path
    format: str  # auto | plain | chat
    constitution: Constitution  # whose principles are drawn


@dataclass(frozen=True)
class Setup:
    """Configuration, models, and where they run."""

    config: PPOConfig
    policy: Path  # start and reference of the policy, Hugging Face folder
    rewards: tuple[Path | Judge | str, ...]  # folders of preference models, feedback models, names of functions
    heldout_reward: Path | None  # a preference model that only watches
    format: str  # of the policy's prompts: auto | plain | chat
    device: str  # cpu | gpu
    seed: int
    cluster: Cluster  # time limits; GPUs that share one rollout engine
    engine_dtype: str  # decides, with the actor's, how far log-probs of engine and actor may differ

    @property
    def side_by_side(self) -> bool:
        """Whether roles work at the same time; on CPU they take turns and each has all cores."""
        return self.device == "gpu"

    @property
    def torch_device(self) -> torch.device:
        """Where a worker's tensors live; Ray shows a worker only its own GPU."""
        return torch.device("cuda", 0) if self.device == "gpu" else torch.device("cpu")

    @property
    def critic_start(self) -> Path:
        """The folder that the critic starts from."""
        models = [r for r in self.rewards if isinstance(r, Path)]
        return models[0] if self.config.critic_init == "reward" else self.policy


def timed(method: Callable[..., Answer]) -> Callable[..., Answer]:
    """A worker's method whose scalars also say when it ran (seconds since the epoch)."""

    @functools.wraps(method)
    def run(self: Any, *args: Any) -> Answer:
        begun = time.time()
        payload, scalars = method(self, *args)
        return payload, {**scalars, "span": (begun, time.time())}

    return run


def onlooker(setup: Setup, learner: Learner, load: Callable[[str], nn.Module]) -> nn.Module:
    """A model that is not trained, on this worker's device; with `ppo.inference_sharded` a part of it (ZeRO-3).

    Args:
        setup: says whether it is sharded; the worker has joined the others then.
        learner: whose dtype and DeepSpeed options it shares.
        load: loads it in the dtype it is given.
    """
    sharding, optim, device = learner.sharding, learner.optim, setup.torch_device
    if not setup.config.inference_sharded:
        return load(sharding.dtype).to(device).eval()
    sharding = sharding.model_copy(update={"zero_stage": 3, "offload_optimizer": False})
    with loading(sharding, optim, device):
        module = load(sharding.dtype)
    return sharded_to_look(module, optim, sharding, device)


def join_ranks(setup: Setup, rank: int, ranks: int, address: str, port: int) -> None:
    """Joins the process group of this worker's role, whose rank 0 is at that address."""
    where = {"MASTER_ADDR": address, "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in where.items()}, LOCAL_RANK="0")
    init_distributed(setup.torch_device, setup.cluster.step_timeout_s)


def address(self: Any) -> Answer:
    """Where the other ranks meet rank 0, its node's address and a free port: a method of workers that have ranks."""
    return None, free_address()


def info(self: Any) -> Answer:
    """Process and node: a method of every worker."""
    return None, {"pid": os.getpid(), "node": os.uname().nodename}


class Onlooker:
    """A worker that trains nothing: complete as it starts, or with `ppo.inference_sharded` once it has joined others.

    `_load` is what makes it complete.
    """

    _load: Callable[[], None]

    def __init__(self, role: str, rank: int, ranks: int, setup: Setup):
        self._setup, self._rank, self._ranks = setup, rank, ranks
        self._share = (0, 1)  # its rank, and those that share the rows of a call
        if not setup.config.inference_sharded:
            self._load()

    info, address = info, address

    def join(self, address: str, port: int) -> Answer:
        """Joins the others and loads this rank's part of the models."""
        join_ranks(self._setup, self._rank, self._ranks, address, port)
        self._share = (self._rank, self._ranks)
        self._load()
        return None, {}


def table(batch: pa.Table, rows: Sequence[int], columns: Mapping[str, pa.Array]) -> pa.Table:
    """A table of (row, …): what a worker computed for some rows of the table that it was given."""
    return pa.table({"row": batch["row"].take(pa.array(rows, pa.int32())), **columns})
