"""Reads what W&B wrote offline, from its own binary files."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7  # LevelDB's log format: blocks of fragments, each with a checksum, length and type


@dataclass
class OfflineRun:
    """One W&B run."""

    name: str = ""
    group: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def read_offline_runs(folder: Path) -> list[OfflineRun]:
    """Every offline run below `folder`."""
    return [_read(path) for path in sorted(folder.rglob("run-*.wandb"))]


def _records(raw: bytes) -> Iterator[bytes]:
    assert raw[:4] == b":W&B"
    at, parts = HEADER, b""
    while at + HEADER <= len(raw):
        room = BLOCK - at % BLOCK
        if room < HEADER:  # the rest of a block that no header fits into
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", raw[at : at + HEADER])
        parts += raw[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last fragment
            yield parts
            parts = b""


def _read(path: Path) -> OfflineRun:
    run = OfflineRun()
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.name, run.group = record.run.display_name, record.run.run_group
            run.config = {u.key: json.loads(u.value_json) for u in record.run.config.update}
        elif kind == "history":
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            run.history.append(row)
            run.summary |= row
        elif kind == "summary":
            run.summary |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.summary.update}
    return run
