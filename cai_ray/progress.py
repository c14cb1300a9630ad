"""What a person sees while a run works: a bar on a terminal, plain lines elsewhere, and run.log always."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_INTERVAL_S = 15.0


class Reporter:
    """Prints banners and progress, and writes the same words to a log file."""

    def __init__(self, log: Path | None = None, console: Console | None = None):
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._log = log

    def say(self, text: str, style: str = "") -> None:
        """One line on the terminal and in run.log; `text` is printed as it is, never as markup."""
        self.console.print(text, style=style or None, markup=False)
        if self._log:
            with self._log.open("a", encoding="utf-8") as f:
                f.write(f"{time.strftime('%H:%M:%S')} {text}\n")

    @contextmanager
    def bar(self, what: str, unit: str) -> Iterator["Bar"]:
        """Progress of one stage; call the yielded object with (done, total, extra text)."""
        if not self.console.is_terminal:
            yield Bar(self, what, unit, None)
            return
        columns = [
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[extra]}"),
        ]
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield Bar(self, what, unit, progress)


class Bar:
    """The progress of one stage."""

    def __init__(self, reporter: Reporter, what: str, unit: str, progress: Progress | None):
        self._reporter, self._what, self._unit, self._progress = reporter, what, unit, progress
        self._task: Any = progress.add_task(what, total=None, extra="") if progress else None
        self._start = self._last = time.monotonic()

    def __call__(self, done: float, total: float | None, extra: str = "") -> None:
        """Shows `done` of `total` units (None: not known yet) and a few words such as tokens per second."""
        if self._progress:
            self._progress.update(self._task, completed=done, total=total, extra=extra)
            return
        now = time.monotonic()
        if now - self._last < PLAIN_INTERVAL_S:
            return
        self._last = now
        eta = ""
        if total and done:
            left = (now - self._start) * (total - done) / done
            eta = f", about {left:.0f} s left"
        of = f"/{total:g}" if total else ""
        self._reporter.say(f"  {self._what}: {done:g}{of} {self._unit}{eta}{', ' + extra if extra else ''}")


def quiet_libraries() -> None:
    """Sends the driver's own library chatter away from the terminal; warnings of Python's logging stay."""
    for name in (
        "ray",
        "ray.data",
        "ray.train",
        "datasets",
        "transformers",
        "deepspeed",
        "vllm",
        "urllib3",
        "DeepSpeed",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
