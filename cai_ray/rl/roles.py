"""The groups of workers that PPO has beside the rollout engines, started and ended together."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from cai_ray.models.memory import KEEP_MEMORY
from cai_ray.rl.groups import RETRIES, Call, Group, Placement, placed, wait
from cai_ray.rl.rewards import Reward
from cai_ray.rl.setup import Setup
from cai_ray.rl.workers import Actor, Critic, Reference

CLASSES: dict[str, type] = {"actor": Actor, "critic": Critic, "reward": Reward, "reference": Reference}


def reserved(setup: Setup) -> AbstractContextManager[Placement]:
    """Room for actor, critic (where advantages need one), reward and reference, until the block ends.

    Raises:
        ResourceError: the cluster cannot hold them.
    """
    ranks = {role: learner.sharding.ranks for role, learner in setup.config.learners.items()}
    ranks |= dict.fromkeys(("reward", "reference"), setup.config.inference_ranks)
    return placed(ranks, setup.device, setup.cluster.start_timeout_s, setup.colocated)


@contextmanager
def started(setup: Setup, placement: Placement) -> Iterator[dict[str, Group]]:
    """The groups of the roles that have room, by name, models loaded; they end with the block.

    Raises:
        StageFailed: one did not start within `cluster.start_timeout_s` seconds.
    """
    timeout_s, memory = setup.cluster.start_timeout_s, {} if setup.device == "gpu" else KEEP_MEMORY
    groups: dict[str, Group] = {}
    try:
        for role in placement.ranks:
            threads = str(setup.learner(role).sharding.cpus_per_rank)
            env = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", **memory}
            groups[role] = placement.start(role, CLASSES[role], env, 0 if setup.joined(role) else RETRIES, setup)
        ready: list[Call] = []
        for role, group in groups.items():
            if setup.joined(role):
                # Of all, so that all have started: how long they may wait for each other is not how long a start takes.
                (where, *_) = wait(group.submit("address"), timeout_s, f"start of the {role}")
                ready += group.submit("join", where["address"], where["port"])
            else:
                ready += group.submit("info")
        wait(ready, timeout_s, "start of PPO's workers")
        yield groups
    finally:
        for group in groups.values():
            group.kill()
