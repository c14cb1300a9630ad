"""1,000 malformed inputs through the loaders: accepted, quarantined with a reason, or refused with a message.

Never a traceback of another kind, and never a lost good row: good ones stand between the bad ones and are counted.
"""

import csv
import gzip
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cai_ray.config import Source
from cai_ray.errors import DataError
from cai_ray.records import LABELED_PAIR, PROMPT, Row, to_table
from cai_ray.sources import as_json, read_rows, to_comparison, to_prompts

# Good rows whose texts a reader is tempted to take for something else: a number, a date, nothing, a line's end.
TEXTS = [
    "NA",
    "123",
    "2024-01-01",
    "null",
    'a "quoted", text',
    "one\u2028two\x85three\x0bfour",
    "ü 宪法 😀",
    "x" * 200_000,
]
GOOD = [{"prompt": text, "chosen": "yes", "rejected": "no"} for text in TEXTS]
PLANTED = "planted-text"  # stands in contents of bad rows and must stand in no message

ENOUGH = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
COLUMNS = ["messages", "prompt", "chosen", "rejected", "label_prob", "id"]

any_text = st.one_of(
    st.text(st.characters(exclude_categories=[]), max_size=12),  # half surrogate pairs and null bytes among them
    st.sampled_from(["", " \n", "\x00", "\ud800", "\n\nHuman: a", "\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b"]),
).map(lambda text: text + PLANTED if text.strip() else text)
number = st.one_of(st.integers(), st.just(10**400), st.just(-(2**63)), st.floats(), st.booleans(), st.none())
turn = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": any_text}),
    st.dictionaries(st.sampled_from(["role", "content", "extra"]), any_text | number, max_size=3),
)
value = st.recursive(
    any_text | number | st.lists(turn, max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
bad_row = st.dictionaries(st.sampled_from(COLUMNS), value, max_size=5)


def check_reason(error: DataError) -> None:
    """A reason is short, can be printed, and quotes nothing that stands in a row."""
    text = str(error)
    assert text.encode()
    assert len(text) < 1000
    assert PLANTED not in text


def outcome(row: Row | DataError, source: Source) -> tuple[list[Row], list[Row]]:
    """Prompts and comparisons of a raw row; none where it is quarantined."""
    prompts: list[Row] = []
    comparisons: list[Row] = []
    if isinstance(row, DataError):
        check_reason(row)
        return prompts, comparisons
    travelled = json.loads(as_json(row))  # as the stage `prompts` sends rows to its tasks
    try:
        prompts = to_prompts(row, "harmful", source)
        assert to_prompts(travelled, "harmful", source) == prompts
    except DataError as e:
        check_reason(e)
        with pytest.raises(DataError):
            to_prompts(travelled, "harmful", source)
    try:
        comparisons = [to_comparison(row, source)]
    except DataError as e:
        check_reason(e)
    to_table(prompts, PROMPT)
    to_table(comparisons, LABELED_PAIR)
    return prompts, comparisons


def loaded(path: Path) -> tuple[list[Row | DataError], bool]:
    """The rows of a file, and whether it was read to its end (else it was refused with a message)."""
    rows: list[Row | DataError] = []
    try:
        for row in read_rows(Source(path=str(path))):
            rows.append(row)
    except DataError as e:
        check_reason(e)
        return rows, False
    return rows, True


def good_among(rows: list[Row | DataError]) -> list[str]:
    """The texts of the good rows that came out both as a prompt and as a comparison, in order."""
    texts = []
    for row in rows:
        prompts, comparisons = outcome(row, Source(path="f"))
        if prompts and comparisons and not isinstance(row, DataError) and row.get("chosen") == "yes":
            texts.append(prompts[0]["messages"][0]["content"])
    return texts


@st.composite
def mixed(draw: st.DrawFn, bad: st.SearchStrategy[Any]) -> list[Any]:
    """Good rows with bad ones before, between and behind them."""
    items: list[Any] = draw(st.lists(st.sampled_from(GOOD), min_size=1, max_size=4))
    for thing in draw(st.lists(bad, min_size=1, max_size=5)):
        items.insert(draw(st.integers(0, len(items))), thing)
    return items


def known(items: list[Any]) -> list[str]:
    return [item["prompt"] for item in items if any(item is g for g in GOOD)]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    return path


@given(row=bad_row, column=st.sampled_from([None, *COLUMNS]))
@settings(max_examples=400, **ENOUGH)
def test_malformed_rows(row: Row, column: str | None) -> None:
    outcome(row, Source(path="f", column=column))


def deep(levels: int) -> bytes:
    return b'{"prompt": ' + b"[" * levels + b"]" * levels + b"}"


bad_line = st.one_of(
    bad_row.map(lambda row: json.dumps(row).encode()),
    bad_row.map(lambda row: json.dumps(row).encode()[:-1]),
    value.map(lambda v: json.dumps(v).encode()),
    st.binary(min_size=1, max_size=30).map(lambda b: b.replace(b"\n", b"").replace(b"\r", b"")),
    st.integers(10, 5000).map(deep),
    st.sampled_from([b'{"prompt": 1' + b"0" * 5000 + b"}", b'{"prompt": "\xff"}', b"\x00", b"{}", b"NaN"]),
)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson.gz", "a.json"])
@given(items=mixed(bad_line))
@settings(max_examples=50, **ENOUGH)
def test_malformed_lines(tmp_path: Path, name: str, items: list[Any]) -> None:
    lines = [item if isinstance(item, bytes) else json.dumps(item, ensure_ascii=False).encode() for item in items]
    if name == "a.json":  # its first line says that the lines are objects
        lines, items = [b"{}", *lines], [b"{}", *items]
    rows, whole = loaded(write(tmp_path / name, b"\n".join(lines)))
    assert whole
    assert good_among(rows) == known(items)
    assert len(rows) == sum(bool(line.strip()) for line in lines)


@given(items=mixed(value.filter(lambda v: not isinstance(v, dict)) | bad_row))
@settings(max_examples=100, **ENOUGH)
def test_malformed_items_of_a_json_list(tmp_path: Path, items: list[Any]) -> None:
    rows, whole = loaded(write(tmp_path / "a.json", json.dumps(items, indent=1).encode()))
    assert whole
    assert good_among(rows) == known(items)
    assert len(rows) == len(items)


encodable = any_text.filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv.gz"])
@given(items=mixed(st.lists(encodable, min_size=1, max_size=5)))
@settings(max_examples=50, **ENOUGH)
def test_malformed_records(tmp_path: Path, name: str, items: list[Any]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t" if "tsv" in name else ",", quoting=csv.QUOTE_ALL)
    for item in [list(GOOD[0]), *items]:
        writer.writerow(item.values() if isinstance(item, dict) else item)
    rows, whole = loaded(write(tmp_path / name, text.getvalue().encode()))
    assert whole
    assert good_among(rows) == known(items)
    assert len(rows) == len(items)


arrow_type = st.sampled_from(
    [
        pa.int64(),
        pa.binary(),
        pa.timestamp("us"),
        pa.decimal128(5, 2),
        pa.list_(pa.string()),
        pa.map_(pa.string(), pa.string()),
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.int8())])),
        pa.dictionary(pa.int8(), pa.string()),
        pa.null(),
        pa.large_string(),
    ]
)


@given(
    items=mixed(st.sampled_from([None, "", "\x00", " "])), kinds=st.lists(arrow_type, max_size=3), seed=st.integers(0)
)
@settings(max_examples=100, **ENOUGH)
def test_malformed_columns(tmp_path: Path, items: list[Any], kinds: list[pa.DataType], seed: int) -> None:
    columns = {name: [i[name] if isinstance(i, dict) else i for i in items] for name in GOOD[0]}
    table = pa.table(columns, schema=pa.schema([(name, pa.string()) for name in GOOD[0]]))
    for k, kind in enumerate(kinds):
        table = table.append_column(f"extra{k}", pa.nulls(len(items), kind))
    other = random.Random(seed).choice(["messages", "rejected", "prompt", "label_prob"])
    wrong = pa.table(
        {**{c: table[c] for c in table.column_names}, other: pa.array([b"\xff"] * len(items), pa.binary())}
    )
    for name, content in (("a.parquet", table), ("b.parquet", wrong)):
        pq.write_table(content, tmp_path / name)
        rows, whole = loaded(tmp_path / name)
        assert whole
        assert len(rows) == len(items)
        assert good_among(rows) == (known(items) if name == "a.parquet" else [])


def intact() -> Iterator[tuple[str, bytes]]:
    rows = [{"prompt": "How?", "chosen": "yes", "rejected": "no"}] * 20
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table, parquet = pa.Table.from_pylist(rows), io.BytesIO()
    pq.write_table(table, parquet)
    yield "a.jsonl", lines
    yield "a.json", json.dumps(rows).encode()
    yield "a.csv", b"prompt,chosen,rejected\n" + b'"How, then?",yes,no\n' * 20
    yield "a.parquet", parquet.getvalue()
    yield "a.jsonl.gz", gzip.compress(lines, mtime=0)


INTACT = dict(intact())


@given(name=st.sampled_from(sorted(INTACT)), seed=st.integers(0), changes=st.integers(1, 6), cut=st.booleans())
@settings(max_examples=150, **ENOUGH)
def test_broken_bytes(tmp_path: Path, name: str, seed: int, changes: int, cut: bool) -> None:
    chance, content = random.Random(seed), bytearray(INTACT[name])
    for _ in range(changes):
        at = chance.randrange(len(content))
        content[at : at + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
    if cut:
        del content[chance.randrange(len(content)) :]
    (tmp_path / name).write_bytes(content)
    for row in loaded(tmp_path / name)[0]:
        outcome(row, Source(path="f"))
