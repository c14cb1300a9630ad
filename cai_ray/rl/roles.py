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
    steps = {"actor": config.steps - config.critic_warmup_steps, "critic": config.steps}
    memory = {} if setup.device == "gpu" else KEEP_MEMORY
    groups: dict[str, Group] = {}
    with placed({role: ranks for role, (_, ranks, _) in roles.items()}, setup.device, timeout_s) as placement:
        try:
            for role, (cls, ranks, threads) in roles.items():
                env = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **memory}
                retries = 0 if role in steps else RETRIES
                groups[role] = placement.start(role, cls, ranks, env, retries, setup)
            ready: list[Call] = groups["reward"].submit("info") + groups["reference"].submit("info")
            for role in filter(groups.get, steps):
                (where, *_) = wait(groups[role].submit("address"), timeout_s, f"start of the {role}")
                ready += groups[role].submit("join", *where, updates * steps[role])
            wait(ready, timeout_s, "start of PPO's workers")
            yield groups
        finally:
            for group in groups.values():
                group.kill()
