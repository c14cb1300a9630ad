"""Training on Ray Train and DeepSpeed: supervised fine-tuning, preference models, and PPO's sharded model."""
