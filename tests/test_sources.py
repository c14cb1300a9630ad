"""Loaders: every form that is accepted, and bad rows that stay alone."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cai_ray.config import Source
from cai_ray.errors import DataError
from cai_ray.sources import parse_transcript, read_comparisons, read_rows, to_comparison, to_prompts

ROWS = [{"prompt": "How do I bake bread?"}, {"prompt": "Why is the sky blue?"}]


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS), "utf-8")


def write_gz(path: Path) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in ROWS).encode()))


def write_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS), "utf-8")


def write_csv(path: Path) -> None:
    path.write_text("prompt\n" + "\n".join(r["prompt"] for r in ROWS) + "\n", "utf-8")


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", write_jsonl),
        ("a.jsonl.gz", write_gz),
        ("a.json", write_json),
        ("a.csv", write_csv),
        ("a.parquet", write_parquet),
    ],
)
def test_file_kinds_give_the_same_rows(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    for path in (tmp_path / name, tmp_path):  # the file, and the folder that holds it
        rows = list(read_rows(Source(path=str(path))))
        assert rows == ROWS


def test_transcript_gives_a_prompt_for_every_human_turn() -> None:
    text = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant: four"
    assert [m["content"] for m in parse_transcript(text)] == ["one", "two", "three", "four"]
    prompts = to_prompts({"chosen": text, "rejected": text + "x"}, "harmful", Source(path="f"))
    assert [[m["content"] for m in p["messages"]] for p in prompts] == [["one"], ["one", "two", "three"]]
    assert len({p["id"] for p in prompts}) == 2
    assert len({p["split"] for p in prompts}) == 1  # the split hangs on the first human turn


def test_messages_that_end_with_the_user_are_one_prompt() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert len(to_prompts({"messages": messages}, "harmful", Source(path="f"))) == 1


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"text": "x"},
        {"prompt": ""},
        {"prompt": "null \x00 byte"},
        {"prompt": 3},
        {"prompt": "\ud800"},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": ["x"]},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"chosen": "no marker at all \n\nAssistant: x"},
    ],
)
def test_bad_prompts_are_data_errors(row: dict[str, object]) -> None:
    with pytest.raises(DataError):
        to_prompts(row, "harmful", Source(path="f"))


def test_a_bad_line_costs_one_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\nnot json\n{"prompt": "\xff\xfe"}\n\n[1]\n{"prompt": "fine too"}\n')
    rows = list(read_rows(Source(path=str(path))))
    assert [isinstance(r, DataError) for r in rows] == [False, True, True, True, False]
    assert "UTF-8" in str(rows[2])


def test_texts_are_not_taken_for_numbers_dates_or_nothing(tmp_path: Path) -> None:
    texts = ["123", "NA", "null", "2024-01-01", 'a "quoted",\nline', "x" * 200_000]
    rows = [{"prompt": text} for text in texts]
    (tmp_path / "a.csv").write_text(
        "prompt\n" + "".join('"' + t.replace('"', '""') + '"\n' for t in texts), "utf-8-sig"
    )
    (tmp_path / "a.json").write_text(json.dumps(rows), "utf-8-sig")
    (tmp_path / "b.json").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8-sig")  # a row a line
    for name in ("a.csv", "a.json", "b.json"):
        assert list(read_rows(Source(path=str(tmp_path / name)))) == rows, name


def test_a_csv_record_of_another_length_costs_one_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,label_prob\nfine,0.25\n\nshort\nlong,1,2\n\xff,1\nfine too,\n")
    rows = list(read_rows(Source(path=str(path))))
    assert [row.message if isinstance(row, DataError) else row["prompt"] for row in rows] == [
        "fine",
        "a.csv:4: 1 cells, the header has 2",
        "a.csv:5: 3 cells, the header has 2",
        "\udcff",
        "fine too",
    ]
    with pytest.raises(DataError, match="not valid UTF-8"):
        to_prompts({"prompt": "\udcff"}, "harmful", Source(path="f"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "x"}\n' * 300)[:-9], "end-of-stream"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00" + b"\x00" * 30, "could not be read"),
        ("a.csv", b'prompt\n"no end\n', "unexpected end of data"),
        ("a.json", b'[{"prompt": "x"}', "not JSON"),
        ("a.json", b"[" * 100_000, "not JSON"),
        ("a.parquet", b"PAR1", "could not be read"),
    ],
    ids=["cut", "zeros", "quote", "list", "deep", "parquet"],
)
def test_a_broken_file_is_refused_with_its_name(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        list(read_rows(Source(path=str(tmp_path / name))))
    assert str(caught.value).startswith(name)


def test_values_that_python_cannot_hold_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"when": pa.array([2**63 - 1]).view(pa.timestamp("us"))}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="OverflowError"):
        list(read_rows(Source(path=str(tmp_path / "a.parquet"))))
    (tmp_path / "a.jsonl").write_bytes(
        b'{"prompt": 1' + b"0" * 5000 + b"}\n" + b'{"prompt": ' + b"[" * 20 + b"]" * 20 + b"}"
    )
    huge, deep = read_rows(Source(path=str(tmp_path / "a.jsonl")))
    assert "a.jsonl:1: not a JSON object" in str(huge)
    assert "a.jsonl:2: more than 16 levels" in str(deep)


def test_missing_file_and_unknown_ending(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a file or folder"):
        list(read_rows(Source(path=str(tmp_path / "none.jsonl"))))
    (tmp_path / "a.txt").write_text("x", "utf-8")
    with pytest.raises(DataError, match="no reader"):
        list(read_rows(Source(path=str(tmp_path / "a.txt"))))
    with pytest.raises(DataError, match="no data file"):
        list(read_rows(Source(path=str(tmp_path))))


def test_what_a_download_leaves_beside_the_data_is_no_data(tmp_path: Path) -> None:
    for name in ("a/train.jsonl", ".cache/huggingface/download/a/train.jsonl.metadata", "a/.train.jsonl.crc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"prompt": "x"}\n', "utf-8")
    assert len(list(read_rows(Source(path=str(tmp_path))))) == 1


def test_columns_are_named_but_a_headerless_files_first_line_is_not_quoted() -> None:
    with pytest.raises(DataError, match=r"among \['answer', 'question'\]"):
        to_prompts({"question": "x", "answer": "y"}, "harmful", Source(path="f"))
    with pytest.raises(DataError, match=r"among \['42'\] and 1 others"):
        to_prompts({"How do I bake bread at home?": "x", "42": "y"}, "harmful", Source(path="f"))


def test_cells_of_csv_hold_messages_as_json(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good, [{"}]
    file = tmp_path / "m.csv"
    with file.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["messages", "chosen", "rejected"])
        writer.writerow([json.dumps(turns[:1]), json.dumps(turns), json.dumps([{**turns[1], "content": "bad"}])])
        writer.writerow([str(turns[:1]), "x", "y"])  # as Python prints it
        writer.writerow(["[1, 2] is what?", "[{x}]", "[]"])  # texts like any other
    source = Source(path=str(file))
    first, second, third = (row for row in read_rows(source) if not isinstance(row, DataError))
    assert [p["messages"] for p in to_prompts(first, "harmful", source)] == [turns[:1]]
    plain = {"messages": turns[:1], "chosen": turns[1]["content"], "rejected": "bad"}
    assert to_comparison(first, source) == to_comparison(plain, source)
    with pytest.raises(DataError, match="no JSON"):
        to_prompts(second, "harmful", source)
    assert to_prompts(third, "harmful", source)[0]["messages"][0]["content"] == "[1, 2] is what?"
    assert to_comparison(third, source)["response_a"] == "[{x}]"


def test_comparisons_in_every_form() -> None:
    human = "\n\nHuman: hi\n\nAssistant: "
    forms = [
        {"prompt": "hi", "chosen": "good", "rejected": "bad"},
        {"messages": [{"role": "user", "content": "hi"}], "chosen": "good", "rejected": "bad"},
        {"chosen": human + "good", "rejected": human + "bad"},
        {
            "prompt": [{"role": "user", "content": "hi"}],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        },
        {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " good", "rejected": " bad"},
        {"prompt": "hi", "chosen": human + "good", "rejected": human + "bad"},
        # Columns that other rows of the same table fill:
        {"messages": None, "prompt": "hi", "chosen": "good", "rejected": "bad", "label_prob": None},
    ]
    rows = [to_comparison(f, Source(path="f")) for f in forms]
    assert len({r["id"] for r in rows}) == 1
    assert rows[0]["response_a"] == "good"
    assert rows[0]["label_prob"] == 1.0
    assert rows[0]["votes"] == []


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "chosen": "same", "rejected": "same "},
        {"prompt": "hi", "chosen": "", "rejected": "x"},
        {"prompt": "hi", "chosen": "x"},
        {"prompt": "hi", "chosen": [{"role": "user", "content": "x"}], "rejected": "y"},
        {"prompt": "hi", "chosen": "\n\nHuman: x", "rejected": "y"},
        *(
            {"prompt": "hi", "chosen": "x", "rejected": "y", "label_prob": p}
            for p in (1.5, "much", float("nan"), 10**400)
        ),
        {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"},
    ],
)
def test_bad_comparisons_are_data_errors(row: dict[str, object]) -> None:
    with pytest.raises(DataError):
        to_comparison(row, Source(path="f"))


def test_published_comparisons(test_data: Path) -> None:
    source = Source(path=str(test_data / "hh-rlhf" / "harmless-base_test.jsonl.gz"))
    rows, bad, read, repeated = read_comparisons(source)
    assert len(bad) >= 4  # the four with an empty reply, and equal replies
    assert len(rows) + len(bad) + repeated == read == 2312
    assert len(rows) > 2200
    assert {r["split"] for r in rows} == {"train", "test"}
    few, *rest = read_comparisons(source.model_copy(update={"limit": 10}))
    assert (len(few), rest) == (10, [bad, read, repeated])  # what is bad is a share of all that were read


@pytest.mark.parametrize("column", ["chosen", "prompt"])
def test_transcripts_written_on_windows_have_the_same_turns(column: str) -> None:
    unix = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"
    windows, source = unix.replace("\n", "\r\n"), Source(path="x")
    found = to_prompts({column: windows}, "harmful", source)
    assert found == to_prompts({column: unix}, "harmful", source)
    assert [len(row["messages"]) for row in found] == [1, 3]
    pairs = [{"chosen": text, "rejected": text[:-1] + "e"} for text in (unix, windows)]
    for head in ({}, {"prompt": "q"}):
        first, second = (to_comparison({**head, **pair}, source) for pair in pairs)
        assert first == second
        assert (first["response_a"], first["response_b"]) == ("d", "e")


def test_a_data_set_that_would_run_a_script_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found x.py")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match="no longer supported"):
        list(read_rows(Source(path="hf:some/name")))
