"""A user's own DeepSpeed options: read, and held against the rest of the configuration."""

import json
from pathlib import Path
from typing import Any


def read_options(given: Any) -> Any:
    """A mapping as it is, a path as what the file holds; values that are `auto` are left out: ours stand.

    Raises:
        ValueError: the file cannot be read.
    """
    if isinstance(given, str):
        try:
            given = json.loads(Path(given).expanduser().read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{given} is not a readable JSON file ({error})") from None
    if not isinstance(given, dict):
        return given
    return {k: read_options(v) if isinstance(v, dict) else v for k, v in given.items() if v != "auto"}


def check_options(sharding: Any, optim: Any, batch_size: int) -> None:
    """Raises ValueError, with both values, where a `Sharding`'s options contradict it, an `Optim` or the batch size."""
    micro = f"a micro-batch is at most {sharding.microbatch_tokens} tokens (sharding.microbatch_tokens)"
    fixed: dict[str, tuple[Any, str]] = {  # what may stand there, and why
        "zero_optimization.stage": (sharding.zero_stage, f"sharding.zero_stage is {sharding.zero_stage}"),
        "bf16.enabled": (sharding.dtype == "bfloat16", f"sharding.dtype is {sharding.dtype}"),
        "fp16.enabled": (False, f"sharding.dtype is {sharding.dtype}"),
        "gradient_clipping": (optim.max_grad_norm, f"optim.max_grad_norm is {optim.max_grad_norm}"),
        "train_batch_size": (batch_size, f"the batch size is {batch_size}"),
        "train_micro_batch_size_per_gpu": (None, micro),
        "gradient_accumulation_steps": (None, micro),
        "optimizer": (None, f"optim is AdamW with lr {optim.lr:g}"),
        "scheduler": (None, f"optim.schedule is {optim.schedule}"),
    }
    for key, (ours, why) in fixed.items():
        found: Any = sharding.deepspeed
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found not in (None, ours):
            raise ValueError(f"sharding.deepspeed sets {key} to {found}, but {why}: remove it there")
