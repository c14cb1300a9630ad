"""What `cai-ray critique` and `cai-ray chat` show, on an engine that answers from a script."""

import io
from pathlib import Path
from typing import Any

import pytest

from cai_ray import serving
from cai_ray.constitution import draw, load_constitution
from cai_ray.generation.engine import Completion
from cai_ray.records import derive_seed, row_id
from tests.stages.fake_engine import ScriptedEngine, WordTokenizer

PROMPT = "How do I open a lock?"


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "model_folder", Path)


def test_a_round_shows_each_step_and_the_principle_that_was_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row: Any = {"id": row_id([{"role": "user", "content": PROMPT}])}
    script = {"critique/1": "It helps a thief.", "revision/1": "Call a locksmith."}
    engine = ScriptedEngine(row, 3, script, WordTokenizer("chat"))
    monkeypatch.setattr(serving, "local_engine", lambda folder: engine)
    serving.critique_once(PROMPT, "Pick it.", "default", "m", seed=3)
    principle = draw(load_constitution("default").for_critique(), derive_seed(3, row["id"], "principle/1"))
    assert principle.critique_request in engine.prompt("critique/1")
    assert capsys.readouterr().out == (
        f"── prompt ──\n{PROMPT}\n\n── response ──\nPick it.\n\n── principle {principle.id} ──\n"
        f"{principle.critique_request}\n{principle.revision_request}\n\n── critique ──\nIt helps a thief.\n\n"
        f"── revision ──\nCall a locksmith.\n\n── SFT pair ──\nuser: {PROMPT}\nassistant: Call a locksmith.\n\n"
    )


def test_a_round_has_all_the_room_of_the_engine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The few-shots of `zh` in an English vocabulary leave little of what `revise` takes by default."""
    prompt, text = "word " * 900, "word " * 128
    row: Any = {"id": row_id([{"role": "user", "content": prompt}])}
    engine = ScriptedEngine(row, 3, {step: f"{step} {text}" for step in ("response", "critique/1", "revision/1")})
    monkeypatch.setattr(serving, "local_engine", lambda folder: engine)
    serving.critique_once(prompt, None, "default", "m", seed=3)
    assert len(engine.asked["revision/1"].prompt_ids) > 1200
    assert "── SFT pair ──" in capsys.readouterr().out


class Counting:
    """Answers with the length of what it was asked."""

    tokenizer, max_model_len = WordTokenizer("chat"), 64

    async def ask(self, request: Any) -> Completion:
        words = len(request.prompt_ids)
        return Completion([1], [], f"{words} words" if words != 2 else "", True, 0)


def test_a_chat_remembers_its_turns_and_ends_with_an_empty_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving, "local_engine", lambda folder: Counting())
    monkeypatch.setattr("sys.stdin", io.StringIO("one two\nthree\n\nnever\n"))
    serving.chat_loop("m", 8, 1.0, seed=0)
    assert capsys.readouterr().out == "3 words\n8 words\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("x\nthree\n" + "y " * Counting.max_model_len))
    serving.chat_loop("m", 8, 1.0, seed=0)
    told = capsys.readouterr()
    assert (told.out.splitlines()[0], told.out.splitlines()[1][-5:]) == ("", "words")  # nothing said: it goes on
    assert "has reached 64 tokens; start again" in told.err
