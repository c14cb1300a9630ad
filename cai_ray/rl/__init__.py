"""PPO over five roles: actor, critic, reward, reference and the rollout engines."""
