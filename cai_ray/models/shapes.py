"""The dimensions of a model, from the config.json at hand: nothing is downloaded and no weight is read.

Dimensions that are unknown are NaN, which spoils every sum that it enters and exceeds no limit.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cai_ray.config import Lora, Sharding

GIB = 2**30
WIDTH = {"float32": 4, "bfloat16": 2}  # bytes
LIBRARIES_GIB = {"cpu": 0.7, "gpu": 1.5}  # Python and torch; on a GPU its context and communication buffers
SELECTIVE = 0.55  # of a layer's activations: what selective checkpointing keeps
GATHERED = 1e9  # parameters that ZeRO-3 holds whole at a time
HEAD_TOKENS = 1024  # tokens whose logits exist at a time


Part = tuple[str, float, int]  # purpose, GiB in all, number of processes or GPUs that share it


@dataclass(frozen=True)
class Shape:
    """The dimensions of a decoder with gated MLPs (Llama, Mistral, Qwen, Gemma and their kin)."""

    hidden: float
    layers: float
    heads: float
    kv_heads: float
    head_dim: float
    intermediate: float
    vocab: float
    max_positions: float
    tied: bool = False

    @property
    def parameters(self) -> float:
        """Parameters with the LM head; a scalar head in its place is smaller."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + self.hidden + self.vocab * self.hidden * (1 if self.tied else 2)

    def gib(self, width: int) -> float:
        """GiB of `width` bytes for every parameter."""
        return self.parameters * width / GIB

    def kv_gib(self, tokens: int, width: int) -> float:
        """GiB of the keys and values of `tokens` tokens."""
        return 2 * self.layers * self.kv_heads * self.head_dim * tokens * width / GIB

    def work_gib(self, tokens: int, width: int, layers: float = 1, inputs: float = 0) -> float:
        """GiB of activations, roughly: all of some layers, the inputs of others, a chunk of logits and its gradient."""
        layer = tokens * (10 * self.hidden + 4 * self.intermediate) * width
        return (layers * layer + inputs * tokens * self.hidden * width + 8 * HEAD_TOKENS * self.vocab) / GIB

    def lora_parameters(self, rank: int) -> float:
        """Parameters of low-rank adapters of all linear modules of the layers."""
        attention = 2 * self.hidden + 2 * self.head_dim * (self.heads + self.kv_heads) + 2 * self.hidden
        return self.layers * rank * (attention + 3 * (self.hidden + self.intermediate))


def training_memory(
    shape: Shape, sharding: Sharding, device: str, lora: Lora | None = None
) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """(parts in a rank's CPU or GPU memory, parts in a GPU rank's host memory), as `training.deepspeed` builds it."""
    n, width, zero = sharding.ranks, WIDTH[sharding.dtype], sharding.stage
    trained = shape.lora_parameters(lora.rank) if lora else shape.parameters
    kept = {False: (shape.layers, 0), True: (1, shape.layers), "selective": (1 + SELECTIVE * shape.layers, 0)}
    layers, inputs = kept[sharding.gradient_checkpointing]
    parts: list[Part] = [
        ("weights", shape.gib(width), n if zero == 3 else 1),
        ("gradients", trained * 4 / GIB, n if zero >= 2 else 1),
        # AdamW keeps two moments, and from stage 1 on a float32 copy of the weights.
        ("optimizer", trained * (12 if zero else 8) / GIB, n if zero else 1),
        ("activations", shape.work_gib(sharding.microbatch_tokens, width, layers, inputs), 1),
        ("libraries", LIBRARIES_GIB[device], 1),
    ]
    if zero == 3 and n > 1:
        parts.append(("gathered layers", min(GATHERED, shape.parameters) * width / GIB, 1))
    offloaded = {"weights": sharding.offload_parameters, "optimizer": sharding.offload_optimizer and zero > 0}
    host = [part for part in parts if device == "gpu" and offloaded.get(part[0])]
    return tuple(part for part in parts if part not in host), tuple(host)


def memory_sum(parts: Iterable[Part]) -> str:
    """Memory as a sum that can be checked by hand."""
    return " + ".join(f"{purpose} {total:.2f}" + (f"/{n}" if n > 1 else "") for purpose, total, n in parts)


UNKNOWN = Shape(*[math.nan] * 7, max_positions=math.inf)
_LLAMA_70B = Shape(8192, 80, 64, 8, 128, 28672, 128256, 131072)
_MISTRAL_7B = Shape(4096, 32, 32, 8, 128, 14336, 32000, 32768)
KNOWN = {  # so that the shipped configurations can be planned before anything is downloaded
    "embedded": Shape(576, 30, 9, 3, 64, 1536, 49152, 8192, True),
    "tiny": Shape(64, 2, 2, 2, 32, 128, 49152, 2048, True),
    "mistralai/Mistral-7B-v0.1": _MISTRAL_7B,
    "mistralai/Mistral-7B-Instruct-v0.1": _MISTRAL_7B,
    "meta-llama/Llama-3.1-8B": Shape(4096, 32, 32, 8, 128, 14336, 128256, 131072),
    "meta-llama/Llama-3.1-70B": _LLAMA_70B,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_70B,
}


def find_shape(model: str, revision: str | None = None) -> Shape:
    """The shape of `embedded`, `tiny`, a folder or a hub id; UNKNOWN where no config.json is at hand.

    Args:
        model: as in a configuration's `models`.
        revision: branch, tag or commit of a hub id.
    """
    if model in KNOWN:
        return KNOWN[model]
    folder = Path(model).expanduser()
    if not folder.is_dir():  # the hub's cache, found without the hub's library
        home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
        cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{model.replace('/', '--')}"
        ref = cache / "refs" / (revision or "main")
        folder = cache / "snapshots" / (ref.read_text("utf-8").strip() if ref.is_file() else revision or "none")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        c = json.loads((folder / "config.json").read_text("utf-8"))
        c = {"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False, **(c.get("text_config") or c)}
        hidden, heads = c["hidden_size"], c["num_attention_heads"]
        mlp = math.nan if any("experts" in key for key in c) else c["intermediate_size"]  # experts: other arithmetic
        kv, dim = c["num_key_value_heads"] or heads, c["head_dim"] or hidden // heads
        rest = (c["vocab_size"], c["max_position_embeddings"], c["tie_word_embeddings"])
        return Shape(hidden, c["num_hidden_layers"], heads, kv, dim, mlp, *rest)
    return UNKNOWN
