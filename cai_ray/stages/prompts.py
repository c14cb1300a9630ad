"""Stage 1: red-team and helpful prompts, one row per human turn, deduplicated, split by a hash.

Where the configuration asks for it, a model writes more of them after examples, as in Bai et al. 2022 (arXiv
2212.08073), section 3.2.
"""

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray.data

from cai_ray.artifacts import Manifest, StageDir
from cai_ray.config import GeneratePrompts, PromptsConfig, Source
from cai_ray.errors import DataError
from cai_ray.generation.data_plane import map_rows
from cai_ray.records import PROMPT, Row, derive_seed, row_id, stored_rows
from cai_ray.sources import as_json, prompt_row, read_rows, to_prompts
from cai_ray.stages.shared import StageInputs, ask, write_rows
from cai_ray.templates import LIST_STOP, list_prompt

GENERATED = "generated"  # what the `source` of a written prompt says
BLOCK = 5_000  # raw rows that one Ray task parses
_PLACE = [("source", pa.int64()), ("place", pa.string()), ("reason", pa.string())]  # reason: why a row is bad
_RAW = pa.schema([*_PLACE, ("raw", pa.string())])
_PARSED = pa.schema([*_PLACE, ("prompt", pa.struct(list(PROMPT)))])


def prompts(config: PromptsConfig, inputs: StageInputs, out: StageDir) -> Manifest:
    """Reads every source, makes `Prompt` rows in Ray tasks, keeps each conversation once.

    Raises:
        DataError: a source cannot be read, or leaves no prompt to train on or to hold out.
        StageFailed: more than `max_bad_fraction` of the rows are bad, or an engine died repeatedly.
    """
    sources = [("harmful", s) for s in config.harmful] + [("helpful", s) for s in config.helpful]
    parsed, raw_rows = _parse(sources)
    bad: list[Row] = [{"id": r["place"], "reason": r["reason"]} for r in parsed if r["reason"] is not None]
    seen: dict[str, Row] = {}
    duplicates = over_limit = 0
    for number, (_, source) in enumerate(sources):
        own = [r["prompt"] for r in parsed if r["source"] == number and r["reason"] is None]
        fresh = {prompt["id"]: prompt for prompt in own if prompt["id"] not in seen}
        kept = sorted(fresh)[: source.limit]
        duplicates += len(own) - len(fresh)
        over_limit += len(fresh) - len(kept)
        seen.update((i, fresh[i]) for i in kept)
    out.quarantine(bad, raw_rows, inputs.settings.max_bad_fraction)
    written: Counter[str] = Counter()
    for number, wanted in enumerate(config.generate):
        part = StageDir(out.path / "generated" / str(number), out.seed)
        with out.phase("generate"):
            written.update(_generate(wanted, seen, bad, inputs, part))
    out.quarantine(bad, len(bad), 1.0)  # with those of the new prompts, which have kept to the limit themselves
    rows = sorted(seen.values(), key=lambda r: r["id"])
    if not rows:
        raise DataError(
            "prompts: the sources hold no prompt", "give prompts.harmful or prompts.helpful a source with rows"
        )
    if all(row["split"] == "train" for row in rows):  # said now, not when `evaluate` has nobody to ask
        raise DataError(f"prompts: none of {len(rows)} is in the held-out tenth", "add some: a hash draws that tenth")
    write_rows(rows, PROMPT, out.data)
    counts = {
        f"{kind}_{split}": sum(r["kind"] == kind and r["split"] == split for r in rows)
        for kind in ("harmful", "helpful")
        for split in ("train", "test")
    }
    turns = sum(len(r["messages"]) > 2 for r in rows)
    left_out = {"duplicates": duplicates, "over_limit": over_limit, "quarantined": len(bad)}
    metrics = {"raw_rows": raw_rows, "conversations": len(parsed), "rows": len(rows), **counts, "multi_turn": turns}
    return out.commit(inputs.key, {**metrics, **left_out, **written})


def _parse(sources: list[tuple[str, Source]]) -> tuple[list[Row], int]:
    """Parsed rows of all sources, and how many raw ones there were."""
    raw: list[Row] = []
    for number, (_, source) in enumerate(sources):
        for line, row in enumerate(read_rows(source), 1):
            # As JSON, which escapes what is no UTF-8.
            found = {"reason": row.message} if isinstance(row, DataError) else {"raw": as_json(row)}
            raw.append({"source": number, "place": f"{source.path}:{line}", **found})
    if not raw:
        return [], 0
    blocks = [pa.Table.from_pylist(raw[i : i + BLOCK], schema=_RAW) for i in range(0, len(raw), BLOCK)]

    def parse(block: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([p for r in block.to_pylist() for p in _parse_row(r, sources)], schema=_PARSED)

    # Small beside what engines produce: the parsed rows come together in the driver, because duplicates are known only
    # when all are seen.
    done = ray.data.from_arrow(blocks).map_batches(parse, batch_format="pyarrow").take_all()
    return sorted(done, key=lambda r: r["source"]), len(raw)


def _parse_row(raw: Row, sources: list[tuple[str, Source]]) -> list[Row]:
    if raw["reason"] is not None:
        return [raw]
    try:
        return [{**raw, "prompt": p} for p in to_prompts(json.loads(raw["raw"]), *sources[raw["source"]])]
    except DataError as e:
        return [{**raw, "reason": e.message}]


# ---- new prompts ----------------------------------------------------------------------------------------------------

_REQUEST = pa.schema([("id", pa.string()), ("examples", pa.list_(pa.string()))])
_WRITTEN = pa.schema([("id", pa.string()), ("text", pa.string()), ("ended", pa.bool_())])


@dataclass(frozen=True)
class WritePrompt:
    """What the engine does with one row: one more line below a list of examples."""

    config: GeneratePrompts
    seed: int

    schema = _WRITTEN

    async def __call__(self, row: Row, engine: Any) -> Row:
        """The line, and whether it came to its end.

        Raises:
            DataError: the list is too long.
        """
        prompt = list_prompt(row["examples"])
        done = await ask(engine, prompt, row, "prompt", self.seed, self.config, stop=(LIST_STOP,))
        return {**row, "text": done.text, "ended": done.ended}


class NearDuplicates:
    """Texts of which others may be near-duplicates: more than half of the other's word 3-grams are in one of them.

    Chinese characters count as words; a text of fewer than three words is one gram. What is compared are only texts
    that share one of the rarest grams, so that a hundred thousand short texts take seconds.
    """

    def __init__(self, texts: Iterable[str] = ()):
        self._texts: list[str] = []
        self._holders: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Adds a text."""
        for gram in _grams(text):
            self._holders[gram].append(len(self._texts))
        self._texts.append(text)

    def __contains__(self, text: str) -> bool:
        grams = _grams(text)
        needed = len(grams) // 2 + 1
        # A text that has `needed` of the grams has one of any `len - needed + 1` of them.
        rarest = sorted(grams, key=lambda g: len(self._holders.get(g, ())))[: len(grams) - needed + 1]
        near = {i for gram in rarest for i in self._holders.get(gram, ())}
        return any(len(grams & _grams(self._texts[i])) >= needed for i in near)


def _grams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+", text.lower())
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def _generate(
    config: GeneratePrompts, seen: dict[str, Row], bad: list[Row], inputs: StageInputs, out: StageDir
) -> Counter[str]:
    """Has new prompts written; adds the good ones to `seen`, those that could not be asked for to `bad`, and counts."""
    work = write_rows(_requests(config, seen, out), _REQUEST, out.path / "inputs")
    engines = inputs.models[config.model].engines(config.max_tokens)
    map_rows(work, WritePrompt(config, out.seed), engines, out, settings=inputs.settings)
    bad += [json.loads(line) for line in out.quarantine_path.read_text("utf-8").splitlines()]
    near = NearDuplicates(r["messages"][-1]["content"] for r in seen.values() if r["kind"] == config.kind)
    found = Counter(generated_asked=config.n, generated=0, generated_duplicates=0, generated_unusable=0)
    for row in stored_rows(out.data):
        try:
            if not row["ended"]:
                raise DataError("it is unfinished")
            prompt = prompt_row([{"role": "user", "content": row["text"]}], config.kind, GENERATED)
        except DataError:
            found["generated_unusable"] += 1
            continue
        if prompt["id"] in seen or row["text"] in near:
            found["generated_duplicates"] += 1
            continue
        found["generated"] += 1
        near.add(row["text"])
        seen[prompt["id"]] = prompt
    return found


def _requests(config: GeneratePrompts, seen: Mapping[str, Row], out: StageDir) -> list[Row]:
    """A row for each prompt that is asked for, with the examples that are drawn for it."""
    longest = config.max_prompt_tokens // config.few_shots  # in bytes, of which a token has one or more
    pool = [
        r["messages"][0]["content"]
        for r in sorted(seen.values(), key=lambda r: r["id"])
        if (r["kind"], r["split"], len(r["messages"])) == (config.kind, "train", 1) and r["source"] != GENERATED
    ]
    pool = [text for text in pool if len(text.encode()) <= longest]
    if not pool:
        raise DataError(
            f"prompts.generate: no {config.kind} training prompt has a single turn of at most {longest} bytes, "
            "so none can be an example",
            "give `prompts` such a source, lower few_shots or raise max_prompt_tokens",
        )
    rows = []
    for number in range(config.n):
        key = row_id(["generated", out.name], number)
        chance = random.Random(derive_seed(out.seed, key, "examples"))
        rows.append({"id": key, "examples": chance.sample(pool, min(config.few_shots, len(pool)))})
    return rows
