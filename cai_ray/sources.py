"""Prompts and comparisons from files, folders and the Hugging Face hub.

Files are parsed here, row by row: a bad row costs itself alone, and nothing guesses at what type a value might be.
What is accepted (one form a row; `Source.column` names another column for the prompt):
  messages             a conversation; ending with the user it is one prompt, ending with the assistant it is a
                       transcript, and each of its human turns is a prompt
  prompt               text or messages
  chosen, rejected     HH transcripts ("\\n\\nHuman: … \\n\\nAssistant: …"), replies to `prompt`/`messages`, or messages
A cell of a CSV file holds messages as JSON.
"""

import bz2
import csv
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cai_ray.config import Source
from cai_ray.errors import DataError
from cai_ray.records import Message, Row, check_messages, row_id, split_of
from cai_ray.shipped import source_path

_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")
_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PACKED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
BROKEN = (OSError, EOFError, ValueError, OverflowError, csv.Error, zlib.error, lzma.LZMAError, pa.ArrowException)
_DEEPEST = 16  # containers inside each other; no row needs more than four


def read_rows(source: Source) -> Iterator[Row | DataError]:
    """The raw rows of a source in order; a line that is not readable comes as the error that says so.

    Raises:
        DataError: the source does not exist, or its file as a whole cannot be read.
    """
    if source.path.startswith("hf:"):
        name, _, split = source.path.removeprefix("hf:").partition(":")
        name, _, folder = name.partition("//")  # hf:Anthropic/hh-rlhf//harmless-base:train
        yield from _stream(name, split or "train", folder or None)
        return
    for path in data_files(source.path):
        yield from _file_rows(path)


def as_json(row: Row) -> str:
    """A raw row as JSON, to travel between processes; a value that JSON does not know (bytes, a date) is no text."""
    return json.dumps(row, default=lambda value: {type(value).__name__: None})


def check_source(source: Source) -> None:
    """Raises DataError when a local source does not exist; the hub is asked only when it is read."""
    if not source.path.startswith("hf:"):
        data_files(source.path)


def data_files(path: str) -> list[Path]:
    """The files of a local source, in order; of a folder those with a known ending. Raises DataError for none."""
    here = source_path(path)
    if here.is_dir():
        # Hidden ones are no data: the hub's downloads keep `.cache/…/train.jsonl.gz.metadata` beside what they bring.
        shown = (p for p in here.rglob("*") if not any(n.startswith(".") for n in p.relative_to(here).parts))
        files = sorted(p for p in shown if p.is_file() and {*p.suffixes} & {*_ENDINGS})
        if not files:
            raise DataError(f"the folder {path} holds no data file", f"expected {', '.join(_ENDINGS)}")
        return files
    if not here.is_file():
        raise DataError(
            f"no data at {path!r}: not a file or folder here",
            "give an existing path, `hf:NAME`, `starter:red_team`, `starter:helpful`, `starter:helpful_comparisons` or "
            "`starter:judge_gold`",
        )
    return [here]


def _stream(name: str, split: str, folder: str | None) -> Iterator[Row]:
    """The rows of a hub data set."""
    import datasets.exceptions

    datasets.disable_progress_bars()
    try:
        yield from datasets.load_dataset(name, split=split, data_dir=folder, streaming=True)
    except (*BROKEN, RuntimeError, datasets.exceptions.DatasetsError) as e:  # RuntimeError: it would run a script
        fix = "check name and split (hf:NAME//FOLDER:SPLIT), network and HF_TOKEN"
        raise _unreadable(name, e, fix) from e


def _file_rows(path: Path) -> Iterator[Row | DataError]:
    opened = PACKED.get(path.suffix, open)
    suffix = path.with_suffix("").suffix if path.suffix in PACKED else path.suffix
    if suffix not in _ENDINGS:
        raise DataError(f"{path.name}: no reader for its ending {suffix!r}", f"use one of {', '.join(_ENDINGS)}")
    try:
        if suffix == ".parquet":
            for batch in pq.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
        elif suffix in (".csv", ".tsv"):  # what is no UTF-8 becomes what `check_messages` refuses
            with opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
                yield from _csv_rows(path.name, lines, "," if suffix == ".csv" else "\t")
        else:
            with opened(path, "rb") as lines:
                yield from _json_rows(path.name, lines, suffix == ".json")
    except BROKEN as e:
        raise _unreadable(path.name, e, "mend or remove the file") from e


def _unreadable(name: str, error: Exception, fix: str) -> DataError:
    return DataError(f"{name} could not be read: {type(error).__name__}: {error!s:.200}", fix)


def _json_rows(name: str, lines: Iterable[bytes], whole: bool) -> Iterator[Row | DataError]:
    """An object a line; or, where `whole` allows it and the first line is none, one list of objects."""
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    first = next(numbered, None) if whole else None
    if first and isinstance(_parse(name, *first), DataError):
        text = first[1] + b"".join(line for _, line in numbered)
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            fix = "give a list of objects, or one object a line"
            raise DataError(f"{name} is not JSON in UTF-8", fix) from None
        values = values if isinstance(values, list) else [values]
        yield from (_check(f"{name}:{number}", value) for number, value in enumerate(values, 1))
        return
    yield from (_parse(name, *line) for line in chain([first] if first else [], numbered))


def _parse(name: str, number: int, line: bytes) -> Row | DataError:
    try:
        return _check(f"{name}:{number}", json.loads(line))
    except (ValueError, RecursionError):  # ValueError: also a number of more digits than Python reads
        return DataError(f"{name}:{number}: not a JSON object in UTF-8")


def _check(place: str, value: Any) -> Row | DataError:
    if not isinstance(value, dict):
        return DataError(f"{place}: not a JSON object")
    return value if _shallow(value) else DataError(f"{place}: more than {_DEEPEST} levels of lists and objects")


def _shallow(value: Any, left: int = _DEEPEST) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return left >= 0 and all(_shallow(v, left - 1) for v in inner)


def _csv_rows(name: str, lines: Iterable[str], separator: str) -> Iterator[Row | DataError]:
    """A dict of texts a record; an empty cell is None."""
    csv.field_size_limit(1 << 30)  # the default, 128 KiB, is less than a long conversation
    reader = csv.reader(lines, delimiter=separator, strict=True)
    records = filter(None, reader)
    header = next(records, [])
    for cells in records:
        if len(cells) == len(header):
            yield {column: cell or None for column, cell in zip(header, cells, strict=True)}
        else:
            yield DataError(f"{name}:{reader.line_num}: {len(cells)} cells, the header has {len(header)}")


def parse_transcript(text: str) -> list[Message]:
    """An HH transcript as messages.

    Raises:
        DataError: it does not begin with a human turn.
    """
    text = text.replace("\r\n", "\n")  # of a file that was written on Windows
    parts = _TURN.split(text if text.startswith("\n\n") else "\n\n" + text.lstrip())
    if len(parts) < 3 or parts[0].strip() or parts[1] != "Human":
        raise DataError("transcript: expected text that begins with '\\n\\nHuman:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[r], "content": t.strip()} for r, t in zip(parts[1::2], parts[2::2], strict=True)]


def _unpacked(value: Any) -> Any:
    """A list of messages that a cell of CSV holds as text; everything else as it is."""
    if not (isinstance(value, str) and _MESSAGES.match(value)):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError("a cell holds messages that are no JSON: Python's own way to print them is not read") from None


def _conversation(value: Any, transcript: bool = False) -> list[Message]:
    value = _unpacked(value)
    if isinstance(value, str):
        if transcript or value.lstrip().startswith("Human:"):
            return parse_transcript(value)
        return [{"role": "user", "content": value}]
    if isinstance(value, list) and value and all(isinstance(m, Mapping) for m in value):
        return [{"role": m.get("role"), "content": m.get("content")} for m in value]
    raise DataError(f"the prompt is {type(value).__name__}, expected text or messages")


def to_prompts(row: Row, kind: str, source: Source) -> list[Row]:
    """`Prompt` rows of one raw row: one, or one per human turn of a transcript that ends with the assistant.

    Raises:
        DataError: no column that is known, or turns that do not alternate.
    """
    column = source.column or next((c for c in ("messages", "prompt", "chosen") if row.get(c) is not None), None)
    if column is None or row.get(column) is None:
        raise DataError(
            f"no column {source.column or 'messages, prompt or chosen'} among {_columns(row)}", "name it in `column`"
        )
    messages = _conversation(row[column], transcript=column == "chosen")
    humans = [i for i, m in enumerate(messages, 1) if m["role"] == "user"]
    ends = humans[-1:] if messages[-1]["role"] == "user" else humans
    if not ends:
        raise DataError("the conversation has no human turn")
    return [prompt_row(messages[:end], kind, source.path) for end in ends]


def prompt_row(messages: list[Message], kind: str, source: str) -> Row:
    """The `Prompt` row of a conversation; raises DataError for one whose turns do not alternate or are no text."""
    messages = check_messages(messages)
    head = {"id": row_id(messages), "messages": messages, "kind": kind}
    return {**head, "source": source, "split": split_of(messages)}


def to_comparison(row: Row, source: Source) -> Row:
    """A human comparison as a `LabeledPair` row: response_a is the chosen one and label_prob 1, without votes.

    Which response stands first carries no meaning for the preference loss, which is symmetric. A `label_prob` column
    (P(chosen better)) is kept.

    Raises:
        DataError: columns are missing, the replies are equal or empty, or the two conversations differ.
    """
    if row.get("chosen") is None or row.get("rejected") is None:
        raise DataError(f"expected the columns chosen and rejected, got {_columns(row)}")
    head = row.get("prompt") if row.get("messages") is None else row["messages"]
    if head is None:
        chosen, rejected = _conversation(row["chosen"], True), _conversation(row["rejected"], True)
        if chosen[:-1] != rejected[:-1] or chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
            raise DataError("chosen and rejected are not two replies to one conversation")
        messages, a, b = chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]
    else:
        messages = _conversation(head)
        if len(messages) > 1 and messages[-1] == {"role": "assistant", "content": ""}:
            messages = messages[:-1]  # "\n\nAssistant:" at a prompt's end asks for the reply
        a, b = _reply(row["chosen"]), _reply(row["rejected"])
    prompt = prompt_row(messages, "helpful", source.path)
    for text in (a, b):
        check_messages([{"role": "user", "content": text}])  # the same rules for text: not empty, UTF-8, no null byte
    if a.strip() == b.strip():
        raise DataError("the two replies are equal")
    return {
        **prompt,
        "id": row_id([prompt["messages"], a, b]),
        "response_a": a,
        "response_b": b,
        "label_prob": _probability(row.get("label_prob")),
        "votes": [],
        "seed": 0,
        "flags": [],
    }


def _columns(row: Row) -> str:
    # The first line of a file without a header stands here, too: what does not look like a name is not quoted.
    names = sorted(name for name in row if re.fullmatch(r"[\w.-]{1,40}", str(name)))
    return f"{names!s:.200}" + (f" and {len(row) - len(names)} others" if len(row) > len(names) else "")


def _probability(value: Any) -> float:
    try:
        prob = 1.0 if value is None else float(value)  # CSV has texts
    except (TypeError, ValueError, OverflowError):
        prob = -1.0
    if not 0 <= prob <= 1:
        raise DataError("label_prob is no number in [0, 1]")
    return prob


def _reply(value: Any) -> str:
    value = _unpacked(value)
    if isinstance(value, list) or (isinstance(value, str) and re.match(r"(\r?\n){2}Human:", value)):
        last = _conversation(value, True)[-1]
        if last["role"] != "assistant":
            raise DataError("a reply is a conversation that does not end with the assistant")
        value = last["content"]
    if not isinstance(value, str):
        raise DataError(f"a reply is {type(value).__name__}, expected text")
    return value.strip()


def read_comparisons(source: Source) -> tuple[list[Row], list[Row], int, int]:
    """A source's comparisons up to its limit, each once; its bad rows ({id, reason}); rows read; rows repeated."""
    good: dict[str, Row] = {}
    bad: list[Row] = []
    number = repeated = 0
    for number, raw in enumerate(read_rows(source), 1):
        try:
            if isinstance(raw, DataError):
                raise raw
            row = to_comparison(raw, source)
            repeated += row["id"] in good
            good.setdefault(row["id"], row)
        except DataError as e:
            bad.append({"id": f"{Path(source.path).name}:{number}", "reason": e.message})
    rows = sorted(good.values(), key=lambda r: r["id"])
    return list(islice(rows, source.limit)), bad, number, repeated
