"""A driver of its own process, which a test kills: maps rows with an engine that it finds by name."""

import sys
from contextlib import contextmanager
from pathlib import Path

import ray

from cai_ray.artifacts import StageDir
from cai_ray.generation.data_plane import MapSettings, map_rows
from tests.generation.programs import TwoSteps

address, engine_name, root = sys.argv[1:]


@contextmanager
def silent():
    yield lambda done, total, extra: None


ray.init(address=address, namespace="test", log_to_driver=False)
map_rows(
    Path(root) / "in",
    TwoSteps(new=40),
    lambda: [ray.get_actor(engine_name)],
    StageDir(Path(root) / "stage"),
    settings=MapSettings(4, 0.0, 120, silent),
)
