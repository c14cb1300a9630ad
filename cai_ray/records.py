"""The rows that flow between stages: one Arrow schema each, one place.

A row keeps its `id` through every stage, and every random choice about it is seeded by (run seed, id, step): results
depend on no batch, worker, order or retry.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa

from cai_ray.errors import DataError

Row = dict[str, Any]


class Message(TypedDict):
    """One turn of a conversation; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


def _list(**fields: pa.DataType) -> pa.DataType:
    return pa.list_(pa.struct(list(fields.items())))


_TEXT, _NUMBER = pa.string(), pa.float64()
_HEAD = [
    ("id", _TEXT),
    ("messages", _list(role=_TEXT, content=_TEXT)),  # ends with the user's turn
    ("kind", _TEXT),  # harmful | helpful
    ("source", _TEXT),
    ("split", _TEXT),  # train | test, by a hash of the first human turn
]
_PAIR = [("response_a", _TEXT), ("response_b", _TEXT)]
_TAIL = [("seed", pa.int64()), ("flags", pa.list_(_TEXT))]  # seed: the run's; a step's is derive_seed(seed, id, step)
_ROUNDS = _list(principle_id=_TEXT, critique=_TEXT, revision=_TEXT)
# swapped: response_b was shown first. inverted: the question asked for the worse one. logprob_a, logprob_b: of the
# choices as shown, nats. score_a, score_b: of the responses, as the question scores them, in [-1, 1]. Either the
# log-probs or the scores are null. prob: P(response_a better), with swapped and inverted already allowed for.
_VOTES = _list(
    **{"principle_id": _TEXT, "swapped": pa.bool_(), "inverted": pa.bool_()},
    **{"logprob_a": _NUMBER, "logprob_b": _NUMBER, "score_a": _NUMBER, "score_b": _NUMBER},
    **{"prob": _NUMBER, "rationale": _TEXT},
)

PROMPT = pa.schema(_HEAD)
REVISION = pa.schema([*_HEAD, ("initial_response", _TEXT), ("rounds", _ROUNDS), *_TAIL])
RESPONSE_PAIR = pa.schema([*_HEAD, *_PAIR, *_TAIL])
LABELED_PAIR = pa.schema([*_HEAD, *_PAIR, ("label_prob", _NUMBER), ("votes", _VOTES), *_TAIL])  # P(A is better)

TEST_PERCENT = 10


def _digest(*parts: object) -> bytes:
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def row_id(content: object, sample_index: int = 0) -> str:
    """A stable id of 16 hex digits: a hash of the row's content and of which sample of it this is."""
    return _digest(content, sample_index).hex()[:16]


def derive_seed(seed: int, row: str, step: str) -> int:
    """The seed of one random choice: a 31-bit integer from (run seed, row id, step name)."""
    return int.from_bytes(_digest(seed, row, step)[:4], "big") & 0x7FFFFFFF


def split_of(messages: Sequence[Message]) -> str:
    """`test` for a tenth of all conversations, by a hash of the first human turn, else `train`."""
    first = next((m["content"] for m in messages if m["role"] == "user"), "")
    return "test" if int.from_bytes(_digest("split", first)[:4], "big") % 100 < TEST_PERCENT else "train"


def check_messages(messages: object) -> list[Message]:
    """Returns `messages` in canonical form: alternating turns (an optional system turn first), ending with the user.

    Raises:
        DataError: anything else; the message names the position, never the text.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"messages: expected a non-empty list of turns, got {type(messages).__name__}")
    out: list[Message] = []
    for i, turn in enumerate(messages):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise DataError(f"messages[{i}]: expected {{role, content}} with text in both")
        content = turn.get("content")
        if not isinstance(content, str) or not content.strip():
            raise DataError(f"messages[{i}]: the content is empty or not text")
        if "\x00" in content:
            raise DataError(f"messages[{i}]: the content holds a null byte")
        try:
            content.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(f"messages[{i}]: the content is not valid UTF-8") from None
        out.append({"role": turn["role"], "content": content})
    turns = out[1:] if out[0]["role"] == "system" else out
    expected = ["user" if i % 2 == 0 else "assistant" for i in range(len(turns))]
    if [t["role"] for t in turns] != expected or not turns or turns[-1]["role"] != "user":
        roles = ", ".join(m["role"] if m["role"] in ("system", "user", "assistant") else "?" for m in out)
        raise DataError(f"messages: roles are {roles:.200}, expected user and assistant in turn, ending with user")
    return out


def answers(row: Mapping[str, Any], rounds: str | tuple[int, ...]) -> list[tuple[str, str, bool]]:
    """What SFT learns from a `Revision` row: its chosen revisions, or a helpful row's sampled answer.

    Args:
        row: the row.
        rounds: `all`, `last`, or numbers counted from 1. The first response to a harmful prompt is never among them.

    Returns:
        (id, text, whether the model ended it) of each; others were cut at the length limit.
    """
    if row["kind"] == "helpful":
        texts = {row["id"]: (row["initial_response"], "response")}
    else:
        numbered = {k: r["revision"] for k, r in enumerate(row["rounds"] or [], 1)}
        chosen = {"all": list(numbered), "last": list(numbered)[-1:]}.get(rounds, rounds)  # type: ignore[arg-type]
        texts = {f"{row['id']}-{k}": (numbered[k], f"revision/{k}") for k in chosen if k in numbered}  # type: ignore[index]
    flags = row.get("flags") or ()
    return [(n, text, f"truncated:{step}" not in flags) for n, (text, step) in texts.items() if text and text.strip()]


def to_table(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as an Arrow table of exactly `schema`: what a row lacks is null, what the schema lacks is dropped."""
    return pa.Table.from_pylist(list(rows), schema=schema)


def stored_rows(folder: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Rows of the parquet files below a folder, few of them in memory at a time; all columns, or those named.

    Raises:
        DataError: a file cannot be read.
    """
    from pyarrow import parquet  # whoever only wants a schema does without

    try:
        for path in sorted(folder.rglob("*.parquet")):
            for batch in parquet.ParquetFile(path).iter_batches(1000, columns=columns):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"the rows in {folder} cannot be read: {error}", "write them again") from None
