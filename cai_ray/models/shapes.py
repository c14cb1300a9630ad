"""The dimensions of a model, from the config.json at hand: nothing is downloaded and no weight is read.

Dimensions that are unknown are NaN, which spoils every sum that it enters and exceeds no limit.
"""

import contextlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
HEAD_TOKENS = 1024  # tokens whose logits exist at a time


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
