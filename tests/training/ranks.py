"""Several ranks of a process group without Ray, and the memory that each of them takes."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def on_ranks(count: int, function: Callable[..., None], *args: Any) -> None:
    """Calls `function(rank, *args)` in `count` processes that form a process group; raises what one of them raises."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (count, port, function, args), nprocs=count)  # pyright: ignore


def _rank(rank: int, count: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    from cai_ray.training.deepspeed import init_distributed

    where = {"RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": 0}
    os.environ.update({name: str(value) for name, value in where.items()})
    torch.set_num_threads(1)
    init_distributed(torch.device("cpu"), 120)
    function(rank, *args)
    torch.distributed.barrier()


def resident() -> int:
    """Bytes of memory that belong to this process alone: what it maps from files can be dropped at any time."""
    with open("/proc/self/status") as status:
        found = {line.split(":")[0]: line.split() for line in status}
    return 1024 * (int(found["RssAnon"][1]) + int(found["RssShmem"][1]))


@contextmanager
def peak_growth() -> Iterator[list[int]]:
    """A list that holds, after the block, by how many bytes `resident` rose at most inside it."""
    before, found, done = resident(), [0], threading.Event()

    def look() -> None:
        while not done.is_set():
            found[0] = max(found[0], resident() - before)
            time.sleep(0.001)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
