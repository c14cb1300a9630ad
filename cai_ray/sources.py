"""Prompts and comparisons from files, folders and the Hugging Face hub, read by the `datasets` library's own builders.

What is accepted (one form a row; `Source.column` names another column for the prompt):
  messages             a conversation; ending with the user it is one prompt, ending with the assistant it is a
                       transcript, and each of its human turns is a prompt
  prompt               text or messages
  chosen, rejected     HH transcripts ("\\n\\nHuman: … \\n\\nAssistant: …"), replies to `prompt`/`messages`, or messages
"""

import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from cai_ray.config import Source
from cai_ray.errors import DataError
from cai_ray.records import Message, Row, check_messages, row_id, split_of
from cai_ray.shipped import asset_path

_TOLERANT = {"encoding_errors": "backslashreplace"}
_TURN = re.compile(r"\n\n(Human|Assistant): ?")
# Lines are parsed here, so that a bad one costs one row.
_BUILDERS = {".jsonl": "text", ".ndjson": "text", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def read_rows(source: Source) -> Iterator[Row | DataError]:
    """The raw rows of a source in order; a line that is not readable comes as the error that says so.

    Raises:
        DataError: the source does not exist or no builder of `datasets` reads it.
    """
    if source.path.startswith("hf:"):
        name, _, split = source.path.removeprefix("hf:").partition(":")
        name, _, folder = name.partition("//")  # hf:Anthropic/hh-rlhf//harmless-base:train
        yield from _stream(name, name, split=split or "train", data_dir=folder or None)
        return
    for path in _files(source.path):
        suffix = path.with_suffix("").suffix if path.suffix in (".gz", ".zst", ".bz2", ".xz") else path.suffix
        if suffix not in _BUILDERS:
            raise DataError(f"{path.name}: no reader for its ending {suffix!r}", f"use one of {', '.join(_BUILDERS)}")
        # Bytes that are no UTF-8 become what JSON refuses.
        more: Any = {".tsv": {"sep": "\t"}, ".jsonl": _TOLERANT, ".ndjson": _TOLERANT}.get(suffix, {})
        rows = _stream(path.name, _BUILDERS[suffix], data_files=str(path), split="train", **more)
        if _BUILDERS[suffix] == "text":
            lines = ((n, row["text"]) for n, row in enumerate(rows, 1))
            yield from (_parse_line(path.name, n, text) for n, text in lines if text.strip())
        else:
            yield from rows


def check_source(source: Source) -> None:
    """Raises DataError when a local source does not exist; the hub is asked only when it is read."""
    if not source.path.startswith("hf:"):
        _files(source.path)


def _files(path: str) -> list[Path]:
    if path.startswith("starter:"):
        return [asset_path(path.removeprefix("starter:") + ".jsonl")]
    here = Path(path).expanduser()
    if here.is_dir():
        files = sorted(p for p in here.rglob("*") if p.is_file() and {*p.suffixes} & _BUILDERS.keys())
        if not files:
            raise DataError(f"the folder {path} holds no data file", f"expected {', '.join(_BUILDERS)}")
        return files
    if not here.is_file():
        raise DataError(
            f"no data at {path!r}: not a file or folder here",
            "give an existing path, `starter:red_team`, `starter:helpful`, `starter:helpful_comparisons` or `hf:NAME`",
        )
    return [here]


def _stream(name: str, builder: str, **options: Any) -> Iterator[Row]:
    """The rows of one file or hub data set; what cannot be read is an error with its name, not a traceback."""
    import datasets.exceptions
    import pyarrow as pa

    datasets.disable_progress_bars()
    try:
        yield from datasets.load_dataset(builder, streaming=True, **options)
    except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as e:
        raise DataError(
            f"{name} could not be read: {type(e).__name__}: {str(e)[:200]}",
            "mend or remove the file; on the hub check name and split (hf:NAME//FOLDER:SPLIT), network and HF_TOKEN",
        ) from e


def _parse_line(name: str, number: int, text: str) -> Row | DataError:
    try:
        row = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return DataError(f"{name}:{number}: not a JSON object in UTF-8")
    return row if isinstance(row, dict) else DataError(f"{name}:{number}: not a JSON object")


def parse_transcript(text: str) -> list[Message]:
    """An HH transcript as messages.

    Raises:
        DataError: it does not begin with a human turn.
    """
    parts = _TURN.split(text if text.startswith("\n\n") else "\n\n" + text.lstrip())
    if len(parts) < 3 or parts[0].strip() or parts[1] != "Human":
        raise DataError("transcript: expected text that begins with '\\n\\nHuman:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[r], "content": t.strip()} for r, t in zip(parts[1::2], parts[2::2], strict=True)]


def _conversation(value: Any, transcript: bool = False) -> list[Message]:
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
            f"no column {source.column or 'messages, prompt or chosen'} among {sorted(row)}", "name it in `column`"
        )
    messages = _conversation(row[column], transcript=column == "chosen")
    humans = [i for i, m in enumerate(messages, 1) if m["role"] == "user"]
    ends = humans[-1:] if messages[-1]["role"] == "user" else humans
    if not ends:
        raise DataError("the conversation has no human turn")
    return [_prompt(check_messages(messages[:end]), kind, source.path) for end in ends]


def _prompt(messages: list[Message], kind: str, source: str) -> Row:
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
        raise DataError(f"expected the columns chosen and rejected, got {sorted(row)}")
    head = row.get("messages", row.get("prompt"))
    if head is None:
        chosen, rejected = _conversation(row["chosen"], True), _conversation(row["rejected"], True)
        if chosen[:-1] != rejected[:-1] or chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
            raise DataError("chosen and rejected are not two replies to one conversation")
        messages, a, b = chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]
    else:
        messages = _conversation(head)
        a, b = _reply(row["chosen"]), _reply(row["rejected"])
    messages = check_messages(messages)
    for text in (a, b):
        check_messages([{"role": "user", "content": text}])  # the same rules for text: not empty, UTF-8, no null byte
    if a.strip() == b.strip():
        raise DataError("the two replies are equal")
    prob = row.get("label_prob", 1.0)
    if not isinstance(prob, int | float) or not 0 <= prob <= 1:
        raise DataError(f"label_prob is {prob!r}, expected a number in [0, 1]")
    return {
        **_prompt(messages, "helpful", source.path),
        "id": row_id([messages, a, b]),
        "response_a": a,
        "response_b": b,
        "label_prob": float(prob),
        "votes": [],
        "seed": 0,
        "flags": [],
    }


def _reply(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        value = value[-1].get("content")
    if not isinstance(value, str):
        raise DataError(f"a reply is {type(value).__name__}, expected text")
    return value.strip()


def read_comparisons(source: Source) -> tuple[list[Row], list[Row]]:
    """All comparisons of a source and its bad rows ({id, reason}); duplicates count once."""
    good: dict[str, Row] = {}
    bad: list[Row] = []
    for number, raw in enumerate(read_rows(source), 1):
        try:
            if isinstance(raw, DataError):
                raise raw
            row = to_comparison(raw, source)
            good.setdefault(row["id"], row)
        except DataError as e:
            bad.append({"id": f"{Path(source.path).name}:{number}", "reason": e.message})
    rows = sorted(good.values(), key=lambda r: r["id"])
    return list(islice(rows, source.limit)), bad
