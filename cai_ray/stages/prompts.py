"""Stage 1: red-team and helpful prompts, one row per human turn, deduplicated, split by a hash."""

import json
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from cai_ray.artifacts import Manifest, StageDir, StageKey
from cai_ray.config import PromptsConfig, Source
from cai_ray.errors import DataError, StageFailed
from cai_ray.records import PROMPT, Row, to_table
from cai_ray.sources import as_json, read_rows, to_prompts

BLOCK = 5_000  # raw rows that one Ray task parses
_PLACE = [("source", pa.int64()), ("place", pa.string())]
_RAW = pa.schema([*_PLACE, ("raw", pa.string())])
_PARSED = pa.schema([*_PLACE, ("prompt", pa.struct(list(PROMPT))), ("reason", pa.string())])


@dataclass(frozen=True)
class PromptsInputs:
    """What the stage reads besides its configuration."""

    key: StageKey
    max_bad_fraction: float


def prompts(config: PromptsConfig, inputs: PromptsInputs, out: StageDir) -> Manifest:
    """Reads every source, makes `Prompt` rows in Ray tasks, keeps each conversation once.

    Raises:
        DataError: a source cannot be read, or leaves no prompt.
        StageFailed: more than `max_bad_fraction` of the rows are bad.
    """
    sources = [("harmful", s) for s in config.harmful] + [("helpful", s) for s in config.helpful]
    parsed, raw_rows = _parse(sources)
    seen: dict[str, Row] = {}
    bad: list[Row] = []
    duplicates = 0
    for number, (_, source) in enumerate(sources):
        fresh: dict[str, Row] = {}
        for row in (r for r in parsed if r["source"] == number):
            if row["reason"] is not None:
                bad.append({"id": row["place"], "reason": row["reason"]})
            elif row["prompt"]["id"] in seen or row["prompt"]["id"] in fresh:
                duplicates += 1
            else:
                fresh[row["prompt"]["id"]] = row["prompt"]
        kept = sorted(fresh.values(), key=lambda r: r["id"])
        seen.update((r["id"], r) for r in islice(kept, source.limit))
    out.quarantine_path.write_text("".join(json.dumps(b) + "\n" for b in bad), "utf-8")
    if raw_rows and len(bad) > inputs.max_bad_fraction * raw_rows:
        raise StageFailed(
            f"prompts: {len(bad)} of {raw_rows} rows are bad, the limit is {inputs.max_bad_fraction:.1%}; "
            f"the first: {bad[0]['id']}: {bad[0]['reason']}",
            f"mend them (all are listed in {out.quarantine_path}) or raise run.max_bad_fraction",
        )
    rows = sorted(seen.values(), key=lambda r: r["id"])
    if not rows:
        raise DataError(
            "prompts: the sources hold no prompt", "give prompts.harmful or prompts.helpful a source with rows"
        )
    pq.write_table(to_table(rows, PROMPT), out.data / "part-00000.parquet")
    counts = {
        f"{kind}_{split}": sum(r["kind"] == kind and r["split"] == split for r in rows)
        for kind in ("harmful", "helpful")
        for split in ("train", "test")
    }
    turns = sum(len(r["messages"]) > 2 for r in rows)
    metrics = {"rows": len(rows), **counts, "multi_turn": turns, "duplicates": duplicates, "quarantined": len(bad)}
    return out.commit(inputs.key, {"raw_rows": raw_rows, **metrics})


def _parse(sources: list[tuple[str, Source]]) -> tuple[list[Row], int]:
    """Parsed rows of all sources, and how many raw ones there were."""
    raw: list[Row] = []
    bad: list[Row] = []
    count = 0
    for number, (_, source) in enumerate(sources):
        for line, row in enumerate(read_rows(source), 1):
            count += 1
            place = {"source": number, "place": f"{source.path}:{line}"}
            if isinstance(row, DataError):
                bad.append({**place, "prompt": None, "reason": row.message})
            else:  # as JSON, which escapes what is no UTF-8
                raw.append({**place, "raw": as_json(row)})
    if not raw:
        return bad, count
    blocks = [pa.Table.from_pylist(raw[i : i + BLOCK], schema=_RAW) for i in range(0, len(raw), BLOCK)]

    def parse(block: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([p for r in block.to_pylist() for p in _parse_row(r, sources)], schema=_PARSED)

    # Small beside what engines produce: the parsed rows come together in the driver, because duplicates are known only
    # when all are seen.
    done: Any = ray.data.from_arrow(blocks).map_batches(parse, batch_format="pyarrow").take_all()
    return bad + done, count


def _parse_row(raw: Row, sources: list[tuple[str, Source]]) -> list[Row]:
    kind, source = sources[raw["source"]]
    place = {"source": raw["source"], "place": raw["place"]}
    try:
        found = to_prompts(json.loads(raw["raw"]), kind, source)
    except DataError as e:
        return [{**place, "prompt": None, "reason": e.message}]
    return [{**place, "prompt": p, "reason": None} for p in found]
