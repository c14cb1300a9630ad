"""What a run needs, before anything starts: rows, processes, memory with its arithmetic, minutes; and whether it fits.

Memory is exact where parameters, gradients and optimizer state are counted, and rough for activations. Minutes come
from floating-point operations (2 per parameter and token forward, 6 with the backward pass, 8 with recomputation) at
the rates below, prompts of PROMPT_TOKENS and responses of full length: right within a factor of two or three.
"""

import contextlib
import gzip
import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cai_ray.cluster import LOGICAL_CPUS
from cai_ray.config import Config, PPOConfig, Sharding, Source
from cai_ray.errors import DataError, ResourceError
from cai_ray.pipeline import evaluated, feedback_model, model_spec, needed, preference_init, stage_of_path
from cai_ray.shipped import asset_path

GIB = 2**30
CPU_RATE = 100e9  # float32 operations per second of a small machine, all roles together
GPU_RATE = 300e12  # bfloat16, an H100-class GPU at about a third of its peak: training and scoring
DECODE_RATE = 100e12  # the same GPU while it samples
PROMPT_TOKENS = 150  # a typical prompt
START_MINUTES = 0.5  # of a stage's processes
TRAIN_SHARE = 0.9  # of conversations; the rest is held out
LIBRARIES_GIB = {"cpu": 0.7, "gpu": 1.5}  # Python, torch and theirs; on a GPU its context and communication buffers
GATHERED = 1e9  # parameters that ZeRO-3 holds whole at a time
HEAD_TOKENS = 1024  # tokens whose logits exist at a time
SAMPLED = 50  # lines from which a file's prompts per line are learnt
WIDTH = {"float32": 4, "bfloat16": 2}
GENERATING = ("revise", "sample_pairs", "label", "evaluate")

Part = tuple[str, float, int]  # purpose, GiB in all, number of processes that share it


@dataclass(frozen=True)
class Shape:
    """The dimensions of a decoder with gated MLPs (Llama, Mistral, Qwen, Gemma and their kin)."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    tied: bool

    @property
    def parameters(self) -> int:
        """Parameters with the LM head; a scalar head in its place is smaller."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + self.hidden + self.vocab * self.hidden * (1 if self.tied else 2)

    def gib(self, width: int) -> float:
        """Size of the weights with `width` bytes each."""
        return self.parameters * width / GIB

    def kv_gib(self, tokens: int, width: int) -> float:
        """Keys and values of `tokens` tokens."""
        return 2 * self.layers * self.kv_heads * self.head_dim * tokens * width / GIB

    def activations(self, tokens: int, width: int, kept_layers: float) -> float:
        """GiB of activations: `kept_layers` layers whole, and the chunk of logits with its gradient in float32."""
        layer = tokens * (10 * self.hidden + 4 * self.intermediate) * width
        return (kept_layers * layer + 2 * HEAD_TOKENS * self.vocab * 4) / GIB


KNOWN = {  # so that the shipped configurations can be planned before anything is downloaded
    "embedded": Shape(576, 30, 9, 3, 64, 1536, 49152, 8192, True),
    "tiny": Shape(64, 2, 2, 2, 32, 128, 49152, 2048, True),
    "mistralai/Mistral-7B-v0.1": Shape(4096, 32, 32, 8, 128, 14336, 32000, 32768, False),
    "mistralai/Mistral-7B-Instruct-v0.1": Shape(4096, 32, 32, 8, 128, 14336, 32000, 32768, False),
    "meta-llama/Llama-3.1-8B": Shape(4096, 32, 32, 8, 128, 14336, 128256, 131072, False),
    "meta-llama/Llama-3.1-70B": Shape(8192, 80, 64, 8, 128, 28672, 128256, 131072, False),
    "meta-llama/Llama-3.1-70B-Instruct": Shape(8192, 80, 64, 8, 128, 28672, 128256, 131072, False),
}


def model_shape(config: Config, name: str) -> Shape | None:
    """The shape behind a model's name (a stage, a key of `models`, a path); None where no config.json is at hand."""
    starts = {"sft": config.sft.init, "preference_model": preference_init(config), "ppo": config.ppo.init}
    for _ in starts:
        name = starts.get(name, name)
    spec = model_spec(config, name)
    if spec.path in KNOWN:
        return KNOWN[spec.path]
    stage = stage_of_path(spec.path)
    folder = stage.model if stage else Path(spec.path).expanduser()
    return _read_shape(folder if folder.is_dir() else _cached(spec.path, spec.revision))


def _cached(hub_id: str, revision: str | None) -> Path:
    """The newest snapshot of a model in the hub cache, found without the hub's library."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{hub_id.replace('/', '--')}"
    ref = cache / "refs" / (revision or "main")
    commit = ref.read_text("utf-8").strip() if ref.is_file() else revision
    found = [cache / "snapshots" / commit] if commit else sorted(cache.glob("snapshots/*"))
    return found[-1] if found else cache


def _read_shape(folder: Path) -> Shape | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        c = json.loads((folder / "config.json").read_text("utf-8"))
        c = c.get("text_config") or c
        if not any(k in c for k in ("num_local_experts", "num_experts", "n_routed_experts")):
            heads = c["num_attention_heads"]
            return Shape(
                hidden=c["hidden_size"],
                layers=c["num_hidden_layers"],
                heads=heads,
                kv_heads=c.get("num_key_value_heads") or heads,
                head_dim=c.get("head_dim") or c["hidden_size"] // heads,
                intermediate=c["intermediate_size"],
                vocab=c["vocab_size"],
                max_positions=c["max_position_embeddings"],
                tied=bool(c.get("tie_word_embeddings", False)),
            )
    return None


# ---- processes and their memory -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Role:
    """One kind of process of a stage. On GPUs `parts` lie in each of its GPUs, `host` in host memory."""

    name: str
    count: int
    gpus: int
    cpus: float
    parts: tuple[Part, ...] | None  # None: the model's shape is unknown
    host: tuple[Part, ...] = ()

    @property
    def gib(self) -> float | None:
        """GiB of one process, or of one of its GPUs."""
        return None if self.parts is None else sum(total / n for _, total, n in self.parts)

    @property
    def host_gib(self) -> float:
        """GiB of host memory that one process takes beside its GPU."""
        return sum(total / n for _, total, n in self.host)

    @property
    def arithmetic(self) -> str:
        """The memory as a sum a person can check."""
        if self.parts is None:
            return f"{self.name}: unknown, because the model's config.json is not here"
        terms = " + ".join(_term(p) for p in self.parts)
        where = f"{self.name} (each of {self.count})" if self.count > 1 else self.name
        host = f", and in host memory {' + '.join(_term(p) for p in self.host)}" if self.host else ""
        return f"{where}: {terms} = {self.gib:.1f} GiB{' a GPU' if self.gpus else ''}{host}"


def _term(part: Part) -> str:
    purpose, total, n = part
    return f"{purpose} {total:.1f}" + (f"/{n}" if n > 1 else "")


def _engine(config: Config, name: str, stage: str, device: str, idle: bool = False) -> Role:
    spec, shape, cluster = _spec_dtype(config, name), model_shape(config, name), config.cluster
    count, tp = cluster.engines, cluster.tensor_parallel_size
    if stage == "ppo":
        count, tp = config.ppo.engines, config.ppo.tensor_parallel_size
    title = "idle engine" if idle else "engine"
    libraries: Part = ("libraries", LIBRARIES_GIB[device], 1)
    if device == "cpu":
        parts = shape and (("weights", shape.gib(spec), 1), ("KV cache", cluster.kv_cache_gib, 1), libraries)
        return Role(title, count, 0, 1, parts)
    work = shape and shape.activations(8192, spec, 1)
    parts = shape and (
        ("weights", shape.gib(spec), tp),
        ("KV cache of one sequence", shape.kv_gib(_lengths(config)[stage], spec), min(tp, shape.kv_heads)),
        ("activations", work or 0.0, tp),
        libraries,
    )
    return Role(title, count, tp, 1, parts)


def _spec_dtype(config: Config, name: str) -> int:
    known = name in type(config.models).model_fields
    return WIDTH[(model_spec(config, name) if known else config.models.helpful).dtype]


def _trainer(config: Config, role: str, name: str, sharding: Sharding, device: str) -> Role:
    """A trained model over DeepSpeed ranks, counted as `training.deepspeed` builds it."""
    shape, n, width = model_shape(config, name), sharding.ranks, WIDTH[sharding.dtype]
    zero = max(2, sharding.zero_stage) if width == 2 else sharding.zero_stage
    gpus = int(device == "gpu")
    if shape is None:
        return Role(role, n, gpus, sharding.cpus_per_rank, None)
    adam = 12 if zero else 8  # two moments, and from stage 1 on a float32 copy of the weights
    optimizer: Part = ("optimizer", shape.gib(adam), n if zero else 1)
    kept = 1 if sharding.gradient_checkpointing else shape.layers
    work = shape.activations(sharding.microbatch_tokens, width, kept)
    if sharding.gradient_checkpointing:
        work += shape.layers * sharding.microbatch_tokens * shape.hidden * width / GIB
    parts: list[Part] = [
        ("weights", shape.gib(width), n if zero == 3 else 1),
        ("gradients", shape.gib(4), n if zero >= 2 else 1),
        ("activations", work, 1),
        ("libraries", LIBRARIES_GIB[device], 1),
    ]
    if zero == 3 and n > 1:
        parts.append(("gathered layers", min(GATHERED, shape.parameters) * width / GIB, 1))
    offloaded = sharding.offload_optimizer and zero and gpus
    host = (optimizer,) if offloaded else ()
    return Role(role, n, gpus, sharding.cpus_per_rank, tuple([*parts[:2], *([] if host else [optimizer]), *parts[2:]]), host)


def _onlooker(config: Config, role: str, name: str, sharding: Sharding, ranks: int, device: str) -> Role:
    """A model that only looks: reward, reference, scorer."""
    shape, width = model_shape(config, name), WIDTH[sharding.dtype]
    parts = shape and (
        ("weights", shape.gib(width), 1),
        ("activations", shape.activations(sharding.microbatch_tokens, width, 1), 1),
        ("libraries", LIBRARIES_GIB[device], 1),
    )
    return Role(role, ranks, int(device == "gpu"), sharding.cpus_per_rank, parts)
