"""Revision rounds on a scripted engine: what each step is asked, what becomes of unusable and of long texts."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai_ray.config import ReviseConfig
from cai_ray.constitution import Constitution
from cai_ray.errors import DataError
from cai_ray.records import PROMPT, Row, check_messages, to_table
from cai_ray.stages.revise import ReviseRow, revise_statistics
from cai_ray.stages.shared import ask, fit_turns, in_share, read_rows, write_rows
from cai_ray.templates import FRAMES, STOP_PLAIN
from tests.stages.fake_engine import CONTROL, CUT, ScriptedEngine, WordTokenizer, prompt_row

CONSTITUTION = Constitution.model_validate(
    {
        "name": "test",
        "version": "1",
        "principles": [
            {"id": i, "critique_request": f"Criticise {i}.", "revision_request": f"Mend {i}."} for i in "abc"
        ],
        "critique_few_shots": [
            {
                "messages": [{"role": "user", "content": "Bread?"}],
                "response": "No.",
                "critique_request": "Too curt?",
                "critique": "Yes.",
                "revision_request": "Help.",
                "revision": "Rye.",
            }
        ],
    }
)
ONE = CONSTITUTION.select(["a"])
GOOD = {"response": "Sure, pick it.", "critique/1": "It helps a thief.", "revision/1": "I would call a locksmith."}
TEXTS = {"critique": "It helps a thief.", "revision": "I would call a locksmith."}


def run(
    script: Mapping[str, str], row: Row | None = None, format: str = "plain", constitution: Any = ONE, **config: Any
) -> tuple[Row, ScriptedEngine]:
    row = row or prompt_row("How do I open a lock?")
    engine = ScriptedEngine(row, 7, script, WordTokenizer(format))
    settings = ReviseConfig.model_validate({"rounds": 1, "few_shots": 1, **config})
    done = asyncio.run(ReviseRow(settings, constitution, 7)(row, engine))
    return done, engine


def test_a_round_in_plain() -> None:
    done, engine = run(GOOD, max_new_tokens=20, max_critique_tokens=30)
    shot = (
        "\n\nHuman: Bread?\n\nAssistant: No.\n\nCritiqueRequest: Too curt?\n\nCritique: Yes."
        "\n\nRevisionRequest: Help.\n\nRevision: Rye."
    )
    said = "\n\nHuman: How do I open a lock?\n\nAssistant:"
    critique = f"{shot}{said} Sure, pick it.\n\nCritiqueRequest: Criticise a.\n\nCritique:"
    assert engine.prompt("response") == said
    assert engine.prompt("critique/1") == critique
    assert engine.prompt("revision/1") == f"{critique} It helps a thief.\n\nRevisionRequest: Mend a.\n\nRevision:"
    assert [r.max_new_tokens for r in engine.asked.values()] == [20, 30, 20]
    labels = tuple(FRAMES["en"].critique_stops)
    assert [r.stop for r in engine.asked.values()] == [tuple(STOP_PLAIN), labels, labels]
    assert done["initial_response"] == "Sure, pick it."
    assert done["rounds"] == [{"principle_id": "a", **TEXTS}]
    assert (done["flags"], done["seed"]) == ([], 7)


def test_direct_revision_asks_for_no_critique() -> None:
    script = {k: v for k, v in GOOD.items() if not k.startswith("critique")}
    done, engine = run(script, critique=False)
    assert list(engine.asked) == ["response", "revision/1"]
    assert engine.prompt("revision/1") == (
        "\n\nHuman: Bread?\n\nAssistant: No.\n\nRevisionRequest: Help.\n\nRevision: Rye."
        "\n\nHuman: How do I open a lock?\n\nAssistant: Sure, pick it.\n\nRevisionRequest: Mend a.\n\nRevision:"
    )
    assert done["rounds"] == [{"principle_id": "a", "critique": "", "revision": TEXTS["revision"]}]
    _, engine = run(script, critique=False, format="chat")
    shot = "<user>Bread?<assistant>No.<user>Help.<assistant>Rye."
    assert engine.prompt("revision/1") == f"{shot}<user>How do I open a lock?<assistant>Sure, pick it.<user>Mend a."
    assert engine.asked["revision/1"].stop == ()


def test_the_next_round_starts_from_the_revision_and_all_rounds_stay() -> None:
    script = {**GOOD, "critique/2": "Still cold.", "revision/2": "Gladly: call a locksmith."}
    done, engine = run(script, rounds=2, few_shots=0)
    assert "\n\nAssistant: I would call a locksmith.\n\nCritiqueRequest" in engine.prompt("critique/2")
    assert [r["revision"] for r in done["rounds"]] == [script["revision/1"], script["revision/2"]]


def drawn(principles: str, row: str, rounds: int = 7) -> str:
    config = ReviseConfig(rounds=rounds, principles=principles)  # type: ignore[arg-type]
    return "".join(p.id for p in ReviseRow(config, CONSTITUTION, 7)._principles(row))


def test_principles_come_with_or_without_replacement() -> None:
    rows = [f"row {i}" for i in range(50)]
    without = [drawn("without_replacement", row) for row in rows]
    assert all(sorted(d[:3]) == sorted(d[3:6]) == ["a", "b", "c"] and len(d) == 7 for d in without)
    assert any(len(set(drawn("with_replacement", row)[:3])) < 3 for row in rows)
    assert len(set(without)) > 20  # of each row's own
    assert [drawn("without_replacement", row, 2) for row in rows] == [d[:2] for d in without]  # more rounds, same start


# ---- unusable texts -----------------------------------------------------------------------------------------------

BAD = [
    ("response", "", "empty"),
    ("response", "Sure.\nHuman: more?", "role_leaked"),
    ("response", f"Sure {CONTROL} then", "role_leaked"),
    ("critique/1", "", "empty"),
    ("critique/1", "Assistant: It is bad.", "role_leaked"),
    ("revision/1", "", "empty"),
    ("revision/1", "Sure,  pick\nit.", "copy"),
    ("revision/1", "Fine.\n Critique: It was bad.", "critique_leaked"),
    ("revision/1", "Revision: Fine.", "critique_leaked"),
    ("revision/1", "It helps\na thief. So call a locksmith.", "critique_leaked"),
    ("revision/1", "Fine.\n\nSystem: obey", "role_leaked"),
]


@pytest.mark.parametrize(("step", "text", "flag"), BAD)
def test_an_unusable_text_is_sampled_once_more(step: str, text: str, flag: str) -> None:
    done, engine = run({**GOOD, step: text, f"{step}/retry": f"{GOOD[step]} Again."})
    assert engine.prompt(f"{step}/retry") == engine.prompt(step)
    texts = {"response": done["initial_response"], **{f"{k}/1": done["rounds"][0][k] for k in TEXTS}}
    assert texts == {**GOOD, step: f"{GOOD[step]} Again."}
    assert done["flags"] == [f"retried:{step}"]


@pytest.mark.parametrize(("step", "text", "flag"), BAD)
def test_it_is_kept_and_flagged_where_it_is_no_better(step: str, text: str, flag: str) -> None:
    script = {**GOOD, step: text, f"{step}/retry": text}
    if text or step == "critique/1":
        assert run(script)[0]["flags"] == [f"{flag}:{step}"]
        kept, engine = run(script, unusable="keep")
        assert kept["flags"] == [f"{flag}:{step}"]
        assert f"{step}/retry" not in engine.asked
    else:  # there is nothing to learn or to judge
        for policy in ("retry", "keep"):
            with pytest.raises(DataError, match=f"{step} came out unusable: empty"):
                run(script, unusable=policy)


@pytest.mark.parametrize(("step", "text", "flag"), BAD)
def test_or_the_row_is_quarantined_with_the_reason(step: str, text: str, flag: str) -> None:
    with pytest.raises(DataError, match=f"^the {step} came out unusable: {flag}$"):
        run({**GOOD, step: text}, unusable="quarantine")


def test_of_two_unusable_texts_the_one_that_is_not_empty_is_kept() -> None:
    copy = GOOD["response"]
    for first, second, flags in (
        ("", copy, ["copy:revision/1", "retried:revision/1"]),
        (copy, "", ["copy:revision/1"]),
    ):
        done, _ = run({**GOOD, "revision/1": first, "revision/1/retry": second})
        assert done["rounds"][0]["revision"] == copy
        assert done["flags"] == flags


def test_texts_that_only_look_unusable_are_not() -> None:
    script = {
        **GOOD,
        "critique/1": "No, it helps.",
        "revision/1": "No, it is what a critique: must say of a Human: text.",
    }
    done, engine = run(script)
    assert done["flags"] == []
    assert len(engine.asked) == 3
    short = {**GOOD, "critique/1": "No.", "revision/1": "No. Call a locksmith."}  # a short beginning is chance
    assert run(short)[0]["flags"] == []


def test_a_text_cut_at_its_limit_is_flagged_and_usable() -> None:
    done, engine = run({step: text + CUT for step, text in GOOD.items()}, unusable="quarantine")
    assert done["flags"] == ["truncated:response", "truncated:critique/1", "truncated:revision/1"]
    assert done["initial_response"] == GOOD["response"]
    assert len(engine.asked) == 3


def test_statistics_by_hand() -> None:
    def row(kind: str, response: str, *flags: str) -> Row:
        return {"kind": kind, "initial_response": response, "flags": list(flags)}

    rows = [
        row("harmful", "I'm sorry, but no.", "copy:revision/1", "copy:revision/2", "truncated:critique/1"),
        row("harmful", "I cannot help with that.", "truncated:response"),
        row("harmful", "Sure."),
        row("helpful", "I cannot say.", "truncated:response"),
    ]
    warned: list[str] = []
    found = revise_statistics(rows, 2, warned.append)
    (warning,) = warned
    assert "refuses 67% of the harmful prompts in its first answer" in warning
    assert found.pop("refused_at_first") == pytest.approx(2 / 3)
    assert found == {
        "harmful": 3,
        "helpful": 1,
        "rounds": 2,
        "flag/copy:revision": 2,
        "flag/truncated:critique": 1,
        "flag/truncated:response": 2,
    }
    half = revise_statistics(rows[1:3], 2, warned.append)
    assert (half["refused_at_first"], warned) == (0.5, [warning])  # half of them is not more than half
    assert revise_statistics([], 2, warned.append)["refused_at_first"] == 0


# ---- long conversations -------------------------------------------------------------------------------------------

LONG = prompt_row("one", "two three", "four five", "six", "seven eight", system="be brief")


# Words of the prompts in plain, each turn with its marker: 13 of the example, 3 of the system turn, 2 + 3, 3 + 2 and 3
# of the turns, 4 of the response, 4 of the critique request and its label: 37. The revision's has 4 of the critique and
# 4 more of the request: 45. In chat no label waits at the end, and the critique has a marker: 36 and 44.
@pytest.mark.parametrize(("format", "limit"), [("plain", 35), ("chat", 34)])
def test_long_conversations_lose_their_first_pairs(format: str, limit: int) -> None:
    done, engine = run(GOOD, LONG, format, too_long="truncate", max_prompt_tokens=limit)
    assert done["flags"] == ["shortened:critique/1", "shortened:revision/1"]
    assert [len(r.prompt_ids) for r in engine.asked.values()] == [limit - 18, limit - 3, limit]
    turns = ("Bread?", "be brief", "two three", "six", "seven eight")
    held = [[t for t in turns if t in engine.prompt(step)] for step in engine.asked]
    assert held == [[*turns[1:]], [*turns[:2], *turns[3:]], [*turns[:2], *turns[4:]]]
    assert done["messages"] == LONG["messages"]
    with pytest.raises(DataError, match=f"the prompt has {limit} tokens, more than {limit - 1}"):
        run(GOOD, LONG, format, too_long="truncate", max_prompt_tokens=limit - 1)
    with pytest.raises(DataError, match=f"the prompt has {limit + 2} tokens, more than {limit}"):
        run(GOOD, LONG, format, max_prompt_tokens=limit)


WORDS = st.lists(st.sampled_from(["a", "b\n\nHuman: c", "d"]), min_size=1, max_size=6).map(" ".join)


@given(st.lists(WORDS, min_size=1, max_size=9), st.booleans(), st.integers(8, 60), st.sampled_from(["plain", "chat"]))
def test_what_is_kept_of_a_conversation(turns: list[str], system: bool, limit: int, format: str) -> None:
    row = prompt_row(*turns[: len(turns) - 1 + len(turns) % 2], system="s" if system else "")
    tokenizer, seen = WordTokenizer(format), []
    config = ReviseConfig(too_long="truncate", max_prompt_tokens=limit)
    prompt, dropped = fit_turns(tokenizer, lambda m: seen.append(m) or list(m), row["messages"], config)  # type: ignore
    kept = list(prompt)
    assert check_messages(kept) == kept  # alternating, ending with the user
    assert kept[-1] == row["messages"][-1]
    assert kept[0] == row["messages"][0] or not system
    assert dropped == (len(kept) < len(row["messages"]))
    assert kept[system:] == row["messages"][-len(kept[system:]) :]
    fits = len(tokenizer.prompt(kept)) <= limit
    assert fits or len(kept) == 1 + system  # it fits, or there is nothing left to drop
    if dropped and fits:  # and the pair before would not have fitted
        more = [*kept[:system], *row["messages"][-len(kept[system:]) - 2 :]]
        assert len(tokenizer.prompt(more)) > limit
    engine = ScriptedEngine(row, 0, {"s": "x"}, tokenizer)
    if fits:
        assert asyncio.run(ask(engine, prompt, row, "s", 0, config)).text == "x"
    else:
        with pytest.raises(DataError, match=f"more than {limit}"):
            asyncio.run(ask(engine, prompt, row, "s", 0, config))


def test_an_endless_conversation_is_shortened_in_a_few_tries() -> None:
    row, tries = prompt_row(*["x"] * 20_001), []

    def prompt(messages: Any) -> Any:
        tries.append(len(messages))
        return list(messages)

    config = ReviseConfig(too_long="truncate", max_prompt_tokens=64)
    kept, dropped = fit_turns(WordTokenizer(), prompt, row["messages"], config)  # type: ignore[arg-type]
    assert (len(kept), dropped) == (31, True)  # 31 turns of two words, and the marker that asks for the next
    assert len(tries) < 17


# ---- shares -------------------------------------------------------------------------------------------------------


def test_shares_split_the_ids_without_overlap() -> None:
    ids = [f"{i:016x}" for i in range(2000)]
    low, high = ({i for i in ids if in_share(i, share)} for share in ((0.0, 0.3), (0.3, 1.0)))
    assert low | high == set(ids)
    assert not low & high
    assert 0.27 < len(low) / 2000 < 0.33
    assert {i for i in ids if in_share(i, (0.0, 0.15))} < low
    assert all(in_share(i, (0.0, 1.0)) for i in ids)


# ---- rows ---------------------------------------------------------------------------------------------------------


def test_written_rows_take_the_place_of_all_that_the_folder_holds(tmp_path: Path) -> None:
    for name in ("part-00000.parquet", "part-00001.parquet"):
        pq.write_table(to_table([{**prompt_row("Old"), "id": name}], PROMPT), tmp_path / name)
    row = prompt_row("Hi")
    assert read_rows(write_rows([row], PROMPT, tmp_path)) == [row]
