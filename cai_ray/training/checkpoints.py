"""A rank's checkpoints: written on its own disk, brought to the stage's directory by Ray Train while training goes on.

One counts when all ranks' parts have arrived whole. Ray Train keeps the record, and removes what is no longer wanted.
"""

import hashlib
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cai_ray.config import Training

if TYPE_CHECKING:
    from cai_ray.training.deepspeed import ShardedModel

RECORD = "checkpoint_manager_snapshot.json"  # Ray Train's own
RUN_NAME = "train"  # of Ray Train's run in checkpoints/: the same for every attempt, so each finds the last one
SCORE = "eval/loss"  # the lowest are the best


class Checkpoints:
    """When to write one, and which to go on from.

    Args:
        out: the stage's directory.
        rank: this process's rank.
        config: how often.
    """

    def __init__(self, out: Path, rank: int, config: Training):
        own = hashlib.sha256(f"{out} {rank}".encode()).hexdigest()[:16]
        self._scratch = f"cai-ray-checkpoint-{own}-"
        for left in Path(tempfile.gettempdir()).glob(self._scratch + "*"):  # by a rank that was killed here
            shutil.rmtree(left, ignore_errors=True)
        self._run, self._rank = out / "checkpoints" / RUN_NAME, rank
        self._every, self._limit = config.checkpoint_every, 60 * config.checkpoint_minutes
        self._last = time.monotonic()

    def newest(self) -> Path | None:
        """The last checkpoint whose files are all whole, as rank 0 sees it; others off the record are removed."""
        import ray.train
        import torch.distributed as dist

        from cai_ray.training.deepspeed import steps_in

        known = {Path(c.checkpoint.path).name for c in ray.train.get_all_reported_checkpoints()}
        found: list[Path | None] = [None]
        if self._rank == 0:
            steps = {folder: steps_in(folder) or 0 for folder in self._run.glob("checkpoint_*") if folder.is_dir()}
            found = [max((f for f in steps if steps[f]), key=lambda f: steps[f], default=None)]
            for folder in steps:  # Ray Train removes what it has on record, and counts on that until then
                if folder.name not in known and folder != found[0]:
                    shutil.rmtree(folder)
        dist.broadcast_object_list(found)
        return found[0]

    def due(self, steps_done: int) -> bool:
        """Whether to write one now, by steps or because the last is too long ago; only rank 0's clock counts."""
        import torch.distributed as dist

        overdue = [self._rank == 0 and time.monotonic() - self._last > self._limit]
        dist.broadcast_object_list(overdue)
        return steps_done % self._every == 0 or overdue[0]

    def save(self, model: "ShardedModel", metrics: Mapping[str, float]) -> None:
        """Writes this rank's part and hands it to Ray Train, which copies it in the background.

        Args:
            model: what to write.
            metrics: held-out metrics, by which checkpoints are kept.
        """
        import ray.train

        folder = Path(tempfile.gettempdir()) / f"{self._scratch}{model.steps_done}"
        model.save(folder)
        ray.train.report(
            {"steps_done": model.steps_done, **metrics},
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )
        self._last = time.monotonic()
