"""A run's rows as folders that `datasets.load_dataset` reads: TRL's columns, and those of published CAI data sets.

Rows go from file to file in batches, so that a run of any size passes through little memory.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cai_ray.artifacts import RunDir
from cai_ray.config import Config
from cai_ray.config_files import load_config
from cai_ray.constitution import Principle
from cai_ray.errors import ConfigError, DataError
from cai_ray.models.hub import whole_folder
from cai_ray.records import PROMPT, Row, answers, to_table
from cai_ray.report.cards import LIMITS, card, drawn_from, numbers, provenance, table
from cai_ray.report.collect import cautions, collect
from cai_ray.templates import render_turns

_TEXT = pa.string()
_MESSAGES = PROMPT.field("messages").type
_HEAD = [("id", _TEXT), ("kind", _TEXT), ("source", _TEXT)]
_PAIR = [("prompt", _MESSAGES), ("chosen", _MESSAGES), ("rejected", _MESSAGES), ("label_prob", pa.float64())]
_STEPS = ("init_prompt", "init_response", "critic_prompt", "critic_response", "revision_prompt", "revision_response")
SFT = pa.schema([("messages", _MESSAGES), *_HEAD])
PREFERENCES = pa.schema([*_PAIR, *_HEAD, ("principle_ids", pa.list_(_TEXT))])
CAI = pa.schema([*((name, _TEXT) for name in _STEPS), *_HEAD, ("round", pa.int32()), ("principle_id", _TEXT)])
_BATCH = 1024  # rows that are held at once
Known = Mapping[str, Principle]  # by id


def sft_rows(row: Row, config: Config, principles: Known) -> Iterator[Row]:
    """The conversations that SFT learns from a `Revision` row, each ending with its answer."""
    for name, text, _ in answers(row, config.sft.rounds):
        yield {**row, "id": name, "messages": [*row["messages"], {"role": "assistant", "content": text}]}


def preference_rows(row: Row, config: Config, principles: Known) -> Iterator[Row]:
    """The one pair of a `LabeledPair` row, turned so that label_prob, P(chosen better), is at least a half."""
    prob, chosen, rejected = row["label_prob"], row["response_a"], row["response_b"]
    if prob is None or chosen.strip() == rejected.strip():
        return
    if prob < 0.5:
        prob, chosen, rejected = 1 - prob, rejected, chosen
    pair = {"chosen": chosen, "rejected": rejected}
    yield {
        **row,
        "prompt": row["messages"],
        **{name: [{"role": "assistant", "content": text}] for name, text in pair.items()},
        "label_prob": prob,
        "principle_ids": list(dict.fromkeys(vote["principle_id"] for vote in row["votes"] or ())),
    }


def cai_rows(row: Row, config: Config, principles: Known) -> Iterator[Row]:
    """One row for each round of a `Revision` row; `init_response` is the response that the round begins with."""
    messages, response = row["messages"], row["initial_response"]
    prompt = messages[0]["content"] if len(messages) == 1 else render_turns(messages)
    for number, done in enumerate(row["rounds"] or (), 1):
        principle = principles[done["principle_id"]]
        asked = (principle.critique_request, done["critique"], principle.revision_request, done["revision"])
        texts = dict(zip(_STEPS, (prompt, response, *asked), strict=True))
        numbers = {"id": f"{row['id']}-{number}", "round": number, "principle_id": principle.id}
        yield {**row, **texts, **numbers}
        response = done["revision"]


@dataclass(frozen=True)
class Export:
    """One folder of the export."""

    name: str
    stage: str  # whose rows it is made from
    schema: pa.Schema
    rows: Callable[[Row, Config, Known], Iterable[Row]]  # what one row of the stage becomes


EXPORTS = (
    Export("sft", "revise", SFT, sft_rows),
    Export("preferences", "label", PREFERENCES, preference_rows),
    Export("cai", "revise", CAI, cai_rows),
)
# What an export is; {rounds} are the run's `sft.rounds`.
_ABOUT = {
    "sft": "Conversations for supervised fine-tuning; the last turn is the one to learn. Red-team prompts end with "
    "revisions (rounds: {rounds}), helpful ones with the helpful model's own answers.",
    "preferences": "Pairs of responses to the same prompt. `label_prob` is the feedback model's P(chosen better); at "
    "exactly 0.5 the first response stands as chosen. `principle_ids` are the principles that were asked about. Human "
    "comparisons that the run's preference model may have learned from besides are not among them.",
    "cai": "One row a round of critique and revision: `init_response` is the response that the round begins with, "
    "`critic_prompt` and `revision_prompt` are the principle's two requests. A conversation of several turns "
    "stands in `init_prompt` as a transcript. `critic_response` is empty where a run revises without critique.",
}
# Why a row of the stage becomes none.
_NOTHING = {
    "sft": "they hold no such answer",
    "preferences": "they have no label, or their responses are equal",
    "cai": "helpful prompts have no rounds",
}


def export_run(run: RunDir, to: Path) -> list[str]:
    """Writes `sft`, `preferences` and `cai` under `to`, as far as the run has finished what they are made from.

    Args:
        run: the run's directory.
        to: a new folder, which appears whole or not at all.

    Returns:
        A line for each of them: its rows, or why it was left out.

    Raises:
        ConfigError: `to` cannot be used, or the run has finished nothing that could be exported.
        DataError: rows of the run cannot be read, or the disk does not take them.
    """
    config = load_config(str(run.path / "config.yaml"))
    left_out, principles = _left_out(run)
    if len(left_out) == len(EXPORTS):
        raise ConfigError(f"{run.path} has nothing to export yet: {'; '.join(left_out.values())}", "continue the run")
    if to.exists() or to.is_symlink():  # not even an empty one is replaced: it can be a mount, or where somebody works
        raise ConfigError(f"{to} is there already, and an export is a new folder", "name one that is not there yet")
    limits, lines = [*LIMITS, *cautions(collect(run))], []
    try:
        with whole_folder(to) as folder:
            for export in (export for export in EXPORTS if export.name not in left_out):
                counts = _write(export, run, config, principles, folder / export.name / "data")
                if not _splits(counts):
                    left_out[export.name] = f"no row of {export.stage} became one: {_NOTHING[export.name]}"
                    shutil.rmtree(folder / export.name)
                    continue
                card = _card(export, counts, run, config, limits)
                (folder / export.name / "README.md").write_text(card, "utf-8")
                lines.append(f"{export.name}: {_splits(counts)} from {export.stage}")
    except (OSError, pa.ArrowException) as e:
        raise DataError(f"the export to {to} stopped: {e}", "mend that and export again") from e
    return lines + [f"{name}: left out, {reason}" for name, reason in left_out.items()]


def _left_out(run: RunDir) -> tuple[dict[str, str], Known]:
    """Why exports cannot be made, by name; and the principles of the critiques."""
    left_out, principles = {}, {}
    for export in EXPORTS:
        out = run.stage(export.stage)
        manifest = out.manifest()
        if manifest is None:
            left_out[export.name] = f"the stage {export.stage} is not finished"
        elif export.name == "cai":
            sha = manifest.constitution_sha256
            if found := drawn_from(out, sha):
                principles = {p.id: p for p in found.principles}
            else:
                left_out["cai"] = f"{out.constitution} is not the constitution that the stage drew from (sha256 {sha})"
    return left_out, principles


def _write(export: Export, run: RunDir, config: Config, principles: Known, folder: Path) -> Counter[tuple[str, str]]:
    """Writes a file a split; returns rows by split and kind, those that became none under the split ''."""
    counts: Counter[tuple[str, str]] = Counter()
    writers: dict[str, pq.ParquetWriter] = {}
    folder.mkdir(parents=True)
    files = sorted((run.stage(export.stage).path / "data").glob("*.parquet"))
    with ExitStack() as stack:
        for batch in (batch for file in files for batch in pq.ParquetFile(file).iter_batches(_BATCH)):
            made: dict[str, list[Row]] = {}
            for row in batch.to_pylist():
                rows = list(export.rows(row, config, principles))
                counts[row["split"] if rows else "", row["kind"]] += len(rows) or 1
                if rows:
                    made.setdefault(row["split"], []).extend(rows)
            for split, rows in made.items():
                if split not in writers:
                    writer = pq.ParquetWriter(folder / f"{split}.parquet", export.schema)
                    writers[split] = stack.enter_context(writer)
                writers[split].write_table(to_table(rows, export.schema))
    return counts


def _splits(counts: Counter[tuple[str, str]]) -> str:
    sums = {split: sum(n for (own, _), n in counts.items() if own == split) for split in ("train", "test")}
    return ", ".join(f"{n:,} {split}" for split, n in sums.items() if n)


def _card(export: Export, counts: Counter[tuple[str, str]], run: RunDir, config: Config, limits: list[str]) -> str:
    """The folder's README.md: what `load_dataset` needs, and where the rows come from."""
    splits = sorted({split for split, _ in counts} - {""}, reverse=True)
    files = [{"split": split, "path": f"data/{split}.parquet"} for split in splits]
    head = {"configs": [{"config_name": "default", "data_files": files}], "tags": ["constitutional-ai", "synthetic"]}
    made = [[split, kind, f"{n:,}"] for (split, kind), n in sorted(counts.items(), reverse=True) if split]
    none = sum(n for (split, _), n in counts.items() if not split)
    parts = [_ABOUT[export.name].format(rounds=config.sft.rounds), table(["split", "kind", "rows"], made)]
    if none:
        parts.append(f"Rows of `{export.stage}` that became none: {none:,}, because {_NOTHING[export.name]}.")
    parts.append(provenance(run, export.stage))
    if export.stage == "label" and (label := run.stage("label").manifest()):
        parts += ["## What the labels are like", numbers("of the stage label", label.metrics)]
    return card(head, export.name, parts, limits)
