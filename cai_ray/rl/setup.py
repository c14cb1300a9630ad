"""What the controller and every worker are told when they start."""

from dataclasses import dataclass
from pathlib import Path

import torch

from cai_ray.config import Cluster, Learner, PPOConfig
from cai_ray.constitution import Constitution


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
    def colocated(self) -> bool:
        """Whether engines share the workers' GPUs, and sleep while these work."""
        return self.config.placement == "colocated"

    @property
    def updates(self) -> int:
        """Optimizer steps of a role in each step."""
        return self.config.ppo_epochs * self.config.rollout_batch_size // self.config.minibatch_size

    def learner(self, role: str) -> Learner:
        """Whose dtype, sizes and DeepSpeed options a role has: those that only look share a learner's."""
        return self.config.actor if role in ("actor", "reference") else self.config.critic

    def joined(self, role: str) -> bool:
        """Whether a role's ranks are one process group, which none can leave and come back to."""
        return role in self.config.learners or self.config.inference_sharded

    @property
    def torch_device(self) -> torch.device:
        """Where a worker's tensors live; Ray shows a worker only its own GPU."""
        return torch.device("cuda", 0) if self.device == "gpu" else torch.device("cpu")

    @property
    def critic_start(self) -> Path:
        """The folder that the critic starts from."""
        models = [r for r in self.rewards if isinstance(r, Path)]
        return models[0] if self.config.critic_init == "reward" else self.policy
