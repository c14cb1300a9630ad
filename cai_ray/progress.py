"""What a person sees while a run works: a bar on a terminal, plain lines elsewhere, and run.log always."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cai_ray.artifacts import Bar

PLAIN_INTERVAL_S = 15.0


class Reporter:
    """Prints banners and progress, and writes the same words to a log file."""

    def __init__(self, log: Path | None = None):
        self.console = Console(highlight=False, soft_wrap=True)
        self._log = log

    def say(self, text: str, style: str = "") -> None:
        """One line on the terminal and in run.log; `text` is printed as it is, never as markup."""
        self.console.print(text, style=style or None, markup=False)
        if self._log:
            with self._log.open("a", encoding="utf-8") as f:
                f.write(f"{time.strftime('%H:%M:%S')} {text}\n")

    @contextmanager
    def bar(self, what: str, unit: str) -> Iterator[Bar]:
        """Progress of one stage: yields what is told of it."""
        if not self.console.is_terminal:
            yield self._lines(what, unit)
            return
        ends = [TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[extra]}")]
        columns = [TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), *ends]
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(what, total=None, extra="")
            yield lambda done, total, extra: progress.update(task, completed=done, total=total, extra=extra)

    def _lines(self, what: str, unit: str) -> Bar:
        """Says a line now and then, with the time that is left."""
        start = last = time.monotonic()

        def show(done: float, total: float | None, extra: str) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < PLAIN_INTERVAL_S:
                return
            last = now
            of = f"/{total:g}" if total else ""
            left = f", about {(now - start) * (total - done) / done:.0f} s left" if total and done else ""
            self.say(f"  {what}: {done:g}{of} {unit}{left}{', ' + extra if extra else ''}")

        return show


def quiet_libraries() -> None:
    """Sends the driver's own library chatter away from the terminal; warnings of Python's logging stay."""
    names = "ray ray.data ray.train datasets transformers deepspeed DeepSpeed vllm urllib3"
    for name in names.split():
        logging.getLogger(name).setLevel(logging.ERROR)
