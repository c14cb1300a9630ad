"""How a model is trained over ranks: AdamW, ZeRO, adapters; and a user's own DeepSpeed options, held against these."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from cai_ray.config_base import Fraction, Op, Section

_Decay = Annotated[float, Field(ge=0, lt=1)]


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


class Optim(Section):
    """AdamW and its schedule."""

    lr: PositiveFloat
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up; linear and cosine end at 0."""
    warmup_fraction: Fraction = 0.0
    """Share of steps over which the rate rises from 0."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    betas: tuple[_Decay, _Decay] = (0.9, 0.95)
    """AdamW moment decay rates."""
    max_grad_norm: PositiveFloat = 1.0
    """Global gradient norm is clipped to this."""


class Sharding(Section):
    """How a trained model is laid over ranks."""

    ranks: Op[PositiveInt] = 1
    """Data-parallel ranks."""
    zero_stage: Op[Literal[0, 1, 2, 3]] = 0
    """DeepSpeed ZeRO stage; in bfloat16, 0 and 1 mean 2, which alone adds gradients up in float32."""
    offload_optimizer: Op[bool] = False
    """Keep optimizer state in host memory (ZeRO 1 to 3 on GPUs)."""
    offload_parameters: Op[bool] = False
    """Keep weights in host memory and fetch each layer when it runs (ZeRO 3 on GPUs)."""
    dtype: Op[Literal["float32", "bfloat16"]] = "bfloat16"
    """Training precision; bfloat16 keeps float32 master weights."""
    microbatch_tokens: Op[Annotated[int, Field(ge=8)]] = 8192
    """Most tokens (padding counted) in one forward pass of a rank."""
    gradient_checkpointing: Op[bool | Literal["selective"]] = False
    """Compute activations again in the backward pass; selective: all but matrix products and attention."""
    cpus_per_rank: Op[PositiveInt] = 1
    """CPU threads of a rank."""
    deepspeed: Op[Annotated[dict[str, Any] | None, BeforeValidator(read_options)]] = None
    """DeepSpeed options, a mapping or a JSON file's path, which replace ours; none may contradict the rest of this."""

    @property
    def stage(self) -> int:
        """The ZeRO stage that runs."""
        # Below stage 2 DeepSpeed would accumulate bfloat16 gradients in bfloat16 or refuse; 2 gives the same numbers.
        return max(2, self.zero_stage) if self.dtype == "bfloat16" else self.zero_stage

    @model_validator(mode="after")
    def _agree(self) -> "Sharding":
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(f"offload_parameters needs zero_stage 3, zero_stage is {self.zero_stage}")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3, zero_stage is 0")
        return self


class Lora(Section):
    """Low-rank adapters (arXiv 2106.09685) in place of training every weight."""

    rank: PositiveInt = 16
    """Rank of each adapter."""
    alpha: PositiveFloat = 32
    """An adapter's output is scaled by alpha / rank."""
    target_modules: Literal["auto"] | tuple[str, ...] = "auto"
    """Names of the layers' linear modules that get one, such as q_proj; auto is all of them."""


def check_options(sharding: Sharding, optim: Optim, batch_size: int) -> None:
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
        "data_types": (None, "gradients add up in float32"),
        "managed_gradient_accumulation": (False, "a step ends where the loop says so"),
        "zero_force_ds_cpu_optimizer": (False, "optim is PyTorch's AdamW"),
    }
    for key, name in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_parameters")):
        if not getattr(sharding, name):
            fixed[f"zero_optimization.{key}"] = None, f"sharding.{name} is false"
    for key, (ours, why) in fixed.items():
        found: Any = sharding.deepspeed
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found not in (None, ours):
            raise ValueError(f"sharding.deepspeed sets {key} to {found}, but {why}: remove it there")
