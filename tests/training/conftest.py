"""One Ray cluster, the tiny model, and rows for the training tests."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cai_ray.records import LABELED_PAIR, REVISION, Row, to_table


@pytest.fixture(scope="package")
def ray_cluster() -> Iterator[None]:
    """A small local cluster with more logical CPUs than cores, quiet on the terminal."""
    for name in ("RAY_prestart_worker_first_driver", "RAY_enable_worker_prestart", "RAY_worker_niceness"):
        os.environ.setdefault(name, "0")
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """This process as the only rank of a process group."""
    import torch

    from cai_ray.training.deepspeed import init_distributed

    with pytest.MonkeyPatch.context() as patch, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            patch.setenv(name, value)
        free.close()
        init_distributed(torch.device("cpu"))
        yield


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The tiny random model's folder."""
    from cai_ray.models import tiny_model

    return tiny_model()


@pytest.fixture(scope="session")
def tokenizer(tiny: Path) -> Any:
    from cai_ray.models.tokenization import Tokenizer

    return Tokenizer.load(tiny)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[list[Row]], Path]:
    """Writes rows as a folder of parquet, cut into two files."""

    def write(rows: list[Row]) -> Path:
        folder = tmp_path / "rows"
        folder.mkdir()
        schema = REVISION if "rounds" in rows[0] else LABELED_PAIR
        for name, part in (("part-0", rows[: len(rows) // 2]), ("part-1", rows[len(rows) // 2 :])):
            pq.write_table(to_table(part, schema), folder / f"{name}.parquet")
        return folder

    return write
