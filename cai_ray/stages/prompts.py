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
from cai_ray.sources import read_rows, to_prompts

CHUNK = 5_000
_PARSED = pa.schema([("prompt", pa.struct(list(PROMPT))), ("reason", pa.string()), ("place", pa.string())])


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
    seen: dict[str, Row] = {}
    bad: list[Row] = []
    raw_rows = duplicates = 0
    for kind, sources in (("harmful", config.harmful), ("helpful", config.helpful)):
        for source in sources:
            parsed, raw = _parse(source, kind)
            raw_rows += raw
            fresh: dict[str, Row] = {}
            for row in parsed:
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


def _parse(source: Source, kind: str) -> tuple[list[Row], int]:
    """Parsed rows of a source, and how many raw ones there were."""
    blocks, bad, count = [], [], 0
    rows = enumerate(read_rows(source), 1)
    while chunk := list(islice(rows, CHUNK)):
        count += len(chunk)
        good = {"place": [], "raw": []}
        for number, row in chunk:
            place = f"{source.path}:{number}"
            if isinstance(row, DataError):
                bad.append({"prompt": None, "reason": row.message, "place": place})
                continue
            good["place"].append(place)
            good["raw"].append(json.dumps(row, default=str))  # escapes bytes that are no UTF-8
        blocks.append(pa.table(good, schema=pa.schema([("place", pa.string()), ("raw", pa.string())])))
    if not any(b.num_rows for b in blocks):
        return bad, count

    def parse(block: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([p for r in block.to_pylist() for p in _parse_row(r, kind, source)], schema=_PARSED)

    # Few and small compared with what engines produce: the parsed rows of a source come together in the driver,
    # because duplicates are known only when all are seen.
    done: Any = ray.data.from_arrow(blocks).map_batches(parse, batch_format="pyarrow").take_all()
    return bad + done, count


def _parse_row(raw: Row, kind: str, source: Source) -> list[Row]:
    try:
        found = to_prompts(json.loads(raw["raw"]), kind, source)
    except DataError as e:
        return [{"prompt": None, "reason": e.message, "place": raw["place"]}]
    return [{"prompt": p, "reason": None, "place": raw["place"]} for p in found]
