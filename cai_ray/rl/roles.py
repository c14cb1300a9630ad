"""The groups of workers that PPO has beside the rollout engines, started and ended together."""

from collections.abc import Iterator
from contextlib import contextmanager

from cai_ray.rl.groups import RETRIES, Call, Group, placed, wait
from cai_ray.rl.rewards import Reward
from cai_ray.rl.setup import Setup
from cai_ray.rl.workers import Actor, Critic, Reference
from cai_ray.training.launch import KEEP_MEMORY


@contextmanager
def started(setup: Setup) -> Iterator[dict[str, Group]]:
    """Actor, critic (where advantages need one), reward and reference by name, models loaded; they end with the block.

    Raises:
        ResourceError: the cluster cannot hold them.
        StageFailed: one did not start within `cluster.start_timeout_s` seconds.
    """
    config, timeout_s = setup.config, setup.cluster.start_timeout_s
    actor, critic = config.actor.sharding, config.critic.sharding
    roles = {  # class, ranks, threads of a rank
        "actor": (Actor, actor.ranks, actor.cpus_per_rank),
        "critic": (Critic, critic.ranks, critic.cpus_per_rank),
        "reward": (Reward, config.inference_ranks, critic.cpus_per_rank),
        "reference": (Reference, config.inference_ranks, actor.cpus_per_rank),
    }
    if not config.has_critic:
        del roles["critic"]
    updates = config.ppo_epochs * config.rollout_batch_size // config.minibatch_size
    # Roles whose ranks are one process group, which none can leave and come back to, and what they are told to join it.
    joined = {"actor": [updates * (config.steps - config.critic_warmup_steps)], "critic": [updates * config.steps]}
    if config.inference_sharded:
        joined |= {"reward": [], "reference": []}
    memory = {} if setup.device == "gpu" else KEEP_MEMORY
    groups: dict[str, Group] = {}
    with placed({role: ranks for role, (_, ranks, _) in roles.items()}, setup.device, timeout_s) as placement:
        try:
            for role, (cls, ranks, threads) in roles.items():
                env = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **memory}
                retries = 0 if role in joined else RETRIES
                groups[role] = placement.start(role, cls, ranks, env, retries, setup)
            ready: list[Call] = []
            for role, group in groups.items():
                if role not in joined:
                    ready += group.submit("info")
                    continue
                (where, *_) = wait(group.submit("address"), timeout_s, f"start of the {role}")
                ready += group.submit("join", *where, *joined[role])
            wait(ready, timeout_s, "start of PPO's workers")
            yield groups
        finally:
            for group in groups.values():
                group.kill()
