"""When each worker did what, as a Chrome trace: open it in chrome://tracing or Perfetto."""

import json
from pathlib import Path


class Timeline:
    """Appends spans to a trace file; a run that goes on appends to what is there.

    The file is a JSON array without its closing bracket, which the trace format leaves out on purpose: whoever reads
    it sees all that was written before a crash.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            path.write_text("[\n", "utf-8")
        self._file = path.open("a", 1, "utf-8")  # a write a line; opening it for each of hundreds of spans is slow

    def add(self, who: str, what: str, step: int, span: tuple[float, float]) -> None:
        """`who` (such as "actor 0") was busy with `what` from one time to another, in seconds since the epoch."""
        role, _, rank = who.partition(" ")
        begun, ended = span
        times = {"ts": round(begun * 1e6), "dur": round((ended - begun) * 1e6)}  # microseconds
        event = {"name": what, "ph": "X", "pid": role, "tid": int(rank or 0), **times, "args": {"step": step}}
        self._file.write(json.dumps(event) + ",\n")
