"""A driver of its own process, to be killed: maps rows with engines that it finds by name."""

import sys
from pathlib import Path

import ray

from cai_ray.artifacts import StageDir
from cai_ray.generation.data_plane import map_rows
from tests.faults.chain import Chain, settings

address, root, *names = sys.argv[1:]
ray.init(address=address, namespace="faults", log_to_driver=False)
map_rows(
    Path(root) / "in",
    Chain(Path(root) / "trace"),
    lambda: [ray.get_actor(name) for name in names],
    StageDir(Path(root) / "stage"),
    settings=settings(),
)
