"""Low-rank adapters (arXiv 2106.09685) by peft: added to a model in place, merged on the way out, saved beside it."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cai_ray.config import Lora
from cai_ray.errors import ConfigError
from cai_ray.models.hub import whole_folder

_NAME = "default"  # peft's name of the one adapter


def add_adapters(hf: Any, lora: Lora, base: Path, seed: int) -> None:
    """Puts adapters beside linear modules of `hf`, in place; only they and a scalar head are trained from now on.

    peft leaves its configuration there, for `save_adapter`.

    Args:
        hf: a causal or a scalar model of transformers.
        lora: rank, scale and places.
        base: the model's folder, which the saved adapter names.
        seed: of the adapters' first weights; at the start they change nothing.

    Raises:
        ConfigError: no module has such a name, or one lies outside the layers.
    """
    from peft import LoraConfig, TaskType, inject_adapter_in_model

    head = getattr(hf, "score", None)
    config: Any = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        target_modules="all-linear" if lora.target_modules == "auto" else list(lora.target_modules),
        task_type=TaskType.CAUSAL_LM if head is None else TaskType.SEQ_CLS,
        base_model_name_or_path=str(base),
    )
    torch.manual_seed(seed)
    try:
        inject_adapter_in_model(config, hf, _NAME)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {error}", "name linear modules of the model, or take auto") from None
    outside = [name for name, p in hf.named_parameters() if p.requires_grad and not re.search(r"\.\d+\.", name)]
    if outside:
        raise ConfigError(f"lora.target_modules reaches {outside[0]}", "name modules inside the layers, or take auto")
    if head is not None:
        config.modules_to_save = ["score"]  # so that peft looks for the whole head in the adapter's file
        head.requires_grad_(True)


def merged_name(name: str) -> str | None:
    """A parameter's name in the model without adapters; None for a part of an adapter."""
    return None if ".lora_" in name else name.replace(".base_layer.", ".")


@torch.no_grad()
def merged(hf: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """The parameter with its adapter's part added; the parameters of its layer must be whole."""
    owner, _, kind = name.rpartition(".base_layer.")
    if kind != "weight":
        return parameter
    delta: Any = hf.get_submodule(owner).get_delta_weight  # pyright: ignore[reportCallIssue]
    return (parameter.float() + delta(_NAME).float()).to(parameter.dtype)


def save_adapter(hf: Any, trained: dict[str, Tensor], folder: Path) -> None:
    """Writes adapters, and a scalar head, as peft's `PeftModel.from_pretrained` reads them.

    Args:
        hf: the model that `add_adapters` was given.
        trained: the trained parameters under the model's own names.
        folder: appears whole or not at all.
    """
    from safetensors.torch import save_file

    config = hf.peft_config[_NAME]
    config.inference_mode = True
    names = {name: f"base_model.model.{name.replace(f'.{_NAME}.', '.')}" for name in trained}
    with whole_folder(folder) as new:
        config.save_pretrained(new)
        state = {names[name]: tensor.contiguous() for name, tensor in trained.items()}
        save_file(state, new / "adapter_model.safetensors", metadata={"format": "pt"})
