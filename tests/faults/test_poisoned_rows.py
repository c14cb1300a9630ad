"""One poisoned row ends in quarantine, alone, at whichever door it is found."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cai_ray.artifacts import StageDir, StageKey
from cai_ray.config import Cluster, PromptsConfig, ReviseConfig, Source
from cai_ray.constitution import load_constitution
from cai_ray.records import PROMPT, row_id
from tests.faults.chain import MAX_LEN, PER_BLOCK, Chain, settings, write_rows

ABSURD = "word " * 400_000  # 2 MB


def quarantine(out):
    return [json.loads(line) for line in out.quarantine_path.read_text().splitlines()]


def messages(*contents):
    """A column of one-turn conversations from bytes that nobody checked."""
    text = pa.array(contents, pa.binary()).view(pa.string())
    turns = pa.StructArray.from_arrays([pa.array(["user"] * len(contents)), text], names=["role", "content"])
    return pa.ListArray.from_arrays(pa.array(range(len(contents) + 1), pa.int32()), turns)


def revise_rows(inputs, out, engines):
    from cai_ray.generation.data_plane import map_rows
    from cai_ray.stages.revise import ReviseRow

    config = ReviseConfig(rounds=1, few_shots=0, max_prompt_tokens=MAX_LEN - 8, max_new_tokens=4, max_critique_tokens=4)
    return map_rows(inputs, ReviseRow(config, load_constitution("default"), 0), engines, out, settings=settings(1.0))


def test_bad_text_in_a_file_and_an_absurd_length_are_found_on_the_way(standins, tmp_path):
    from cai_ray.stages.prompts import prompts
    from cai_ray.stages.shared import StageInputs

    good = [json.dumps({"prompt": f"Why is {n} odd?"}).encode() for n in range(1, 60, 2)]
    bad = [b'{"prompt": "a\\u0000b"}', b'{"prompt": "a\xff\xfeb"}', b'{"prompt": "a\\ud800b"}', b'{"prompt": "a']
    lines = [*good[:10], *bad, json.dumps({"prompt": ABSURD}).encode(), *good[10:]]
    (tmp_path / "p.jsonl").write_bytes(b"\n".join(lines))
    source = Source(path=str(tmp_path / "p.jsonl"))
    first, second = StageDir(tmp_path / "prompts"), StageDir(tmp_path / "revise")
    first.path.mkdir()
    inputs = StageInputs(StageKey({}, {}, {}), (), {}, settings(1.0), Cluster(), "cpu", 1)
    prompts(PromptsConfig(harmful=(source,), helpful=()), inputs, first)
    assert sorted(int(q["id"].split(":")[1]) for q in quarantine(first)) == [11, 12, 13, 14]

    counts = revise_rows(first.data, second, standins)
    assert counts == {"rows_in": len(good) + 1, "rows_out": len(good), "quarantined": 1}
    (only,) = quarantine(second)
    assert only["id"] == row_id([{"role": "user", "content": ABSURD}])
    assert "tokens, more than 248" in only["reason"]


def test_bytes_that_are_no_text_spoil_their_own_row_only(standins, tmp_path):
    contents = [b"What is rain?", b"a\xffb", b"null \x00 byte", b"What is snow?"]
    ids = [row_id(n) for n in range(len(contents))]
    rest = {name: ["harmful"] * len(ids) for name in ("kind", "source", "split")}
    (tmp_path / "in").mkdir()
    table = pa.table({"id": ids, "messages": messages(*contents), **rest}).cast(PROMPT)
    pq.write_table(table, tmp_path / "in" / "part.parquet")
    assert len(ids) == PER_BLOCK  # they share a block
    out = StageDir(tmp_path / "revise")
    assert revise_rows(tmp_path / "in", out, standins)["rows_out"] == 3
    assert quarantine(out) == [{"id": ids[1], "reason": "the row holds text that is not UTF-8"}]


@pytest.mark.full
def test_rows_that_kill_engines_far_from_one_another_are_each_found(standins, tmp_path):
    from cai_ray.generation.data_plane import map_rows

    ids, out = write_rows(tmp_path / "in", 400), StageDir(tmp_path / "stage")
    program = Chain(tmp_path / "trace", deadly=(7, 200, 390))  # never two of them in the engine
    counts = map_rows(tmp_path / "in", program, standins, out, settings=settings(0.01))
    assert (counts["rows_out"], counts["quarantined"]) == (397, 3)
    assert {bad["id"] for bad in quarantine(out)} == {ids[n] for n in program.deadly}


@pytest.mark.full
def test_prompts_that_crash_the_tokenizer_take_no_other_row_along(standins, tmp_path):
    from cai_ray.generation.data_plane import map_rows

    ids, out = write_rows(tmp_path / "in", 40), StageDir(tmp_path / "stage")
    program = Chain(tmp_path / "trace", deadly=(7, 9, 30))
    counts = map_rows(tmp_path / "in", program, standins, out, settings=settings(1.0))
    assert (counts["rows_out"], counts["quarantined"]) == (37, 3)
    found = {(bad["id"], bad["reason"]) for bad in quarantine(out)}
    assert found == {(ids[n], "its engine died on it twice") for n in program.deadly}
