"""What a worker of any role is, and one that trains nothing: with whole models, or with its part of them.

Whole, a worker may die and is started again by Ray. A part is of use only beside the others: their ranks are one
process group, every call goes to all of them, and a death takes PPO back to the last checkpoint.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from cai_ray.config import Learner
from cai_ray.rl.groups import free_address
from cai_ray.rl.setup import Setup
from cai_ray.training.deepspeed import init_distributed, loading, sharded_to_look


class Worker:
    """One rank of a role, a plain class that becomes a Ray actor.

    Its methods return a table, scalars by name, both or nothing; the controller calls them through `call`.
    """

    def __init__(self, role: str, rank: int, ranks: int, setup: Setup):
        self._role, self._rank, self._ranks, self._setup = role, rank, ranks, setup
        self._device = setup.torch_device

    def call(self, method: str, *args: Any) -> tuple[pa.Table | None, dict[str, Any]]:
        """Calls a method and returns its table, which goes from worker to worker, and scalars for the controller.

        These say also when it ran: `span`, two times in seconds since the epoch. It leaves no memory reserved that an
        engine on the same GPU needs.
        """
        begun = time.time()
        found = getattr(self, method)(*args)
        if self._setup.colocated:
            torch.cuda.empty_cache()  # nothing where there is no GPU
        if not isinstance(found, tuple):
            found = (found, {}) if isinstance(found, pa.Table) else (None, found or {})
        payload, scalars = found
        return payload, {**scalars, "span": (begun, time.time())}

    def info(self) -> dict[str, Any]:
        """Process and node."""
        return {"pid": os.getpid(), "node": os.uname().nodename}

    def address(self) -> dict[str, Any]:
        """Where the other ranks meet rank 0: its node's address and a free port."""
        host, port = free_address()
        return {"address": host, "port": port}

    def _meet(self, address: str, port: int) -> None:
        """Joins the process group of the role's ranks."""
        where = {"MASTER_ADDR": address, "MASTER_PORT": port, "RANK": self._rank, "WORLD_SIZE": self._ranks}
        os.environ.update({name: str(value) for name, value in where.items()}, LOCAL_RANK="0")
        # Longer than the controller waits: it names who hangs, torch would end those that wait for it.
        init_distributed(self._device, 1.5 * self._setup.cluster.step_timeout_s)


class Onlooker(Worker):
    """Complete as it starts, or with `ppo.inference_sharded` once it has joined the others; `_load` completes it."""

    _load: Callable[[], None]

    def __init__(self, role: str, rank: int, ranks: int, setup: Setup):
        super().__init__(role, rank, ranks, setup)
        self._share = (rank, ranks) if setup.config.inference_sharded else (0, 1)  # of the rows of a call
        if not setup.config.inference_sharded:
            self._load()

    def join(self, address: str, port: int) -> None:
        """Joins the others and loads this rank's part of the models."""
        self._meet(address, port)
        self._load()


def load_to_look(setup: Setup, learner: Learner, load: Callable[[str], nn.Module]) -> nn.Module:
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
