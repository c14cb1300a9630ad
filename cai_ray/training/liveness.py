"""Signs of life of training ranks: each writes its own log, and the driver sees who fell silent.

A log's time of change is the sign; a rank that hangs notes its stacks beside it, so that it is told from those that
only wait for it.
"""

import faulthandler
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cai_ray.artifacts import StageDir, print_to
from cai_ray.errors import StageFailed

PULSE_S = 2.0


def rank_log(out: StageDir, rank: int) -> Path:
    """A rank's log file."""
    return out.logs / f"rank-{rank}.log"


def stacks(log: Path) -> Path:
    """Where a rank that hangs notes what each of its threads was doing."""
    return log.with_suffix(".stack")


def own_log(path: Path, limit_s: float) -> Callable[[], None]:
    """`print_to(path)`; returns a function that touches the file as a sign of life.

    Without one for nearly `limit_s` the rank notes its stacks, before the driver gives it up.
    """
    print_to(path)
    os.utime(path)
    last, notes = -PULSE_S, stacks(path).open("a")

    def pulse() -> None:
        nonlocal last
        if time.monotonic() - last > PULSE_S:  # each row and micro-batch calls this; the watchdog is a new thread
            os.utime(path)
            notes.truncate(0)  # of an earlier wait, which came to its end
            faulthandler.dump_traceback_later(0.8 * limit_s, file=notes)
            last = time.monotonic()

    pulse()
    return pulse


class Watch:
    """Notices a rank that gives no sign of life: its log file is neither written nor touched for too long.

    Args:
        logs: one of each rank.
        start_s: longest wait for the first sign of a rank, seconds.
        step_s: longest wait between two.
    """

    def __init__(self, logs: Sequence[Path], start_s: float, step_s: float):
        self._logs, self._limits = logs, {False: start_s, True: step_s}
        self._seen = [(_touched(log), time.monotonic(), False) for log in logs]  # (change, noticed when, began)

    def __call__(self) -> None:
        """Raises StageFailed naming the ranks that have not answered, and for how long."""
        now, silent = time.monotonic(), []
        for rank, log in enumerate(self._logs):
            change, since, began = self._seen[rank]
            if (touched := _touched(log)) != change:
                self._seen[rank] = (touched, now, True)
            elif now - since > self._limits[began]:
                silent.append((rank, began))
        if silent:
            began = silent[0][1]
            named = [rank for rank, also in silent if also == began]
            ranks = ", ".join(map(str, [r for r in named if not _waits(stacks(self._logs[r]))] or named))
            raise StageFailed(
                f"training ranks {ranks} have not {'answered' if began else 'started'} for {self._limits[began]:.0f} s",
                f"see {self._logs[0].parent}; raise cluster.{'step' if began else 'start'}_timeout_s if they "
                "are only slow; the same command continues",
            )


def _touched(log: Path) -> int:
    return log.stat().st_mtime_ns if log.is_file() else 0


def _waits(stack: Path) -> bool:
    """Whether a rank that fell silent noted that it was waiting for the others."""
    text = stack.read_text("utf-8") if stack.is_file() else ""
    thread = next((part for part in text.split("\n\n") if "training/loop.py" in part), "")
    inner = next((line for line in thread.splitlines() if line.lstrip().startswith("File ")), "")
    return "torch/distributed/" in inner or "deepspeed/comm/" in inner
