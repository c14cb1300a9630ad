"""Weights from a trainer to vLLM engines of the same machine without GPUs: safetensors files in shared memory.

This module is the sender's side and imports no vLLM. vLLM's processes find the receiving side through the entry point
`vllm.general_plugins`, which calls `register`.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_ray.errors import ResourceError

if TYPE_CHECKING:
    import torch

BACKEND = "shared_memory"
_FOLDER = Path("/dev/shm")


def register() -> None:
    """Makes the backend known to vLLM; may be called again."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as factory

    if BACKEND not in factory._registry:
        factory.register_engine(BACKEND, "cai_ray.generation.weight_receiver", "SharedMemoryReceiver")


@contextmanager
def bucket_folder() -> Iterator[Path]:
    """Where one sender's buckets lie until the block ends. First goes what senders that were killed left behind."""
    space = Path("/proc/self/ns/pid").stat().st_ino  # containers that share the memory number processes each anew
    for left in _FOLDER.glob(f"cai-ray-*-{space}"):
        if not Path("/proc", left.name.split("-")[2]).exists():
            shutil.rmtree(left, ignore_errors=True)
    own = _FOLDER / f"cai-ray-{os.getpid()}-{space}"
    own.mkdir(exist_ok=True)
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)


def write_bucket(tensors: "Mapping[str, torch.Tensor]", path: Path) -> dict[str, Any]:
    """Writes some of a model's tensors, under their Hugging Face names, where engines can read them.

    A bucket holds whole layers: vLLM keeps a layer's tensors until all of them have come. Tied tensors are sent once.

    Args:
        tensors: any dtype; vLLM casts to the engine's.
        path: a file in a `bucket_folder`; whoever has given it to the engines removes it.

    Returns:
        What `Engine.update_weights` takes.

    Raises:
        ResourceError: shared memory is too small for the bucket.
    """
    from safetensors.torch import save_file

    size = sum(t.numel() * t.element_size() for t in tensors.values())
    free = shutil.disk_usage(_FOLDER).free
    if size > free:
        raise ResourceError(
            f"{_FOLDER} has {free / 2**20:.0f} MiB free, a bucket of weights takes {size / 2**20:.0f} MiB",
            "give the container more shared memory (--shm-size), or send smaller buckets",
        )
    save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, path)
    return {"path": str(path)}
