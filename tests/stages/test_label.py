"""The arithmetic of labels, their examples and the judge gate, on an engine whose answers are known."""

import asyncio
import json
import math
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from cai_ray.artifacts import StageDir, StageKey
from cai_ray.config import Cluster, LabelConfig, Source
from cai_ray.constitution import Constitution, FeedbackFewShot, Principle, load_constitution
from cai_ray.errors import DataError, StageFailed
from cai_ray.generation.data_plane import MapSettings
from cai_ray.generation.engine import Completion
from cai_ray.records import LABELED_PAIR, RESPONSE_PAIR, Row, to_table
from cai_ray.sources import read_comparisons
from cai_ray.stages import label as stage
from cai_ray.stages.label import LabelPair, alternate, final_label, ranked
from cai_ray.stages.shared import EngineSetup, StageInputs
from cai_ray.templates import CHOICES, NUMBERS, SCORES, feedback_prompt, rationale_prompt, rlaif_prompt, score_prompt

ROW: Row = {
    **{"id": "r", "messages": [{"role": "user", "content": "Hello?"}], "kind": "harmful", "source": "s"},
    **{"split": "train", "response_a": "alpha", "response_b": "beta", "seed": 0, "flags": ["truncated:response_a"]},
}
QUESTION = "\nWhich is better? Options:"


def constitution(**changes: Any) -> Constitution:
    principle = Principle(id="p", preference_question=QUESTION, **changes)
    return Constitution(name="c", version="1", principles=(principle,))


class Engine:
    """Answers from a function of (prompt, choices); its tokens are characters."""

    def __init__(self, answer: Any, rationales: tuple[str, ...] = (), format: str = "plain"):
        self.answer, self.rationales = answer, list(rationales)
        self.prompts: list[str] = []
        self.asked: list[Any] = []
        self.tokenizer = SimpleNamespace(
            format=format,
            text=self._ids,
            prompt=lambda p: self._ids(p if isinstance(p, str) else json.dumps(p)),
        )

    @staticmethod
    def _ids(text: str, after: str = "") -> list[int]:
        return [ord(c) for c in text]

    async def ask(self, request: Any) -> Completion:
        self.asked.append(request)
        return Completion([1], [-1.0], self.rationales.pop(0), True, 0)

    async def choose(self, ids: list[int], choices: list[list[int]]) -> list[float]:
        self.prompts.append("".join(map(chr, ids)))
        probs = self.answer(self.prompts[-1], ["".join(map(chr, c)) for c in choices])
        return [math.log(p) if p else -math.inf for p in probs]


@pytest.fixture(autouse=True)
def chosen_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices reach the engine as they are, not token by token."""
    monkeypatch.setattr(stage, "choice_logprobs", lambda engine, ids, choices: engine.choose(ids, choices))


def labelled(config: LabelConfig, engine: Engine, c: Constitution | None = None, row: Row = ROW) -> Row:
    done = asyncio.run(LabelPair(config, c or constitution(), 3)(row, engine))
    assert done["flags"] == row["flags"]
    to_table([done], LABELED_PAIR)  # the schema takes it
    return done


def alpha_wins(prob: float, letter: float = 1.0) -> Any:
    """A judge that prefers alpha by `prob` : 1 - prob, and whatever stands first by `letter` : 1."""

    def answer(prompt: str, choices: list[str]) -> list[float]:
        first = prob if prompt.index("[[[alpha]]]") < prompt.index("[[[beta]]]") else 1 - prob
        return [0.1 * first * letter, 0.1 * (1 - first)]

    return answer


# ---- labels -------------------------------------------------------------------------------------------------------


def test_a_soft_label_is_the_normalised_probability() -> None:
    engine = Engine(alpha_wins(0.8))
    done = labelled(LabelConfig(), engine)
    (vote,) = done["votes"]
    assert done["label_prob"] == vote["prob"] == pytest.approx(0.8)
    assert (vote["logprob_a"], vote["logprob_b"]) == (pytest.approx(math.log(0.08)), pytest.approx(math.log(0.02)))
    assert (vote["principle_id"], vote["swapped"], vote["inverted"], vote.get("score_a")) == ("p", False, False, None)
    assert engine.prompts == [feedback_prompt(ROW["messages"], QUESTION, "alpha", "beta")]


@pytest.mark.parametrize(("format", "end"), [("plain", "The answer is:"), ("score", "Score from 1 to 10:")])
def test_choices_are_encoded_as_they_go_on_from_the_prompt(format: Any, end: str) -> None:
    engine, seen = Engine(lambda p, c: [1 / len(c)] * len(c)), []
    engine.tokenizer.text = lambda text, after="": seen.append(after) or engine._ids(text)
    labelled(LabelConfig(format=format), engine)
    assert seen
    assert all(after.endswith(end) for after in seen)  # a legacy tokenizer would write a second space


def test_both_orders_cancel_a_letter() -> None:
    done = labelled(LabelConfig(swap=True), Engine(alpha_wins(0.8, letter=4.0)))
    # alpha first: 3.2 : 0.2; beta first: 0.8 : 0.8
    assert [v["prob"] for v in done["votes"]] == pytest.approx([3.2 / 3.4, 0.5])
    assert [v["swapped"] for v in done["votes"]] == [False, True]
    assert done["label_prob"] == pytest.approx((3.2 / 3.4 + 0.5) / 2)
    only_letter = labelled(LabelConfig(swap=True), Engine(lambda p, c: [0.9, 0.1]))
    assert only_letter["label_prob"] == pytest.approx(0.5)


@pytest.mark.parametrize("settings", [{}, {"format": "rlaif"}, {"format": "score"}, {"swap": True}])
def test_an_inverted_question_counts_for_the_other_one(settings: dict[str, Any]) -> None:
    def answer(prompt: str, choices: list[str]) -> list[float]:
        if len(choices) == 2:
            return alpha_wins(0.8)(prompt, choices)
        return [0.0] * 8 + [0.5, 0.5] if "[[[alpha]]]" in prompt else [0.5, 0.5] + [0.0] * 8

    straight = labelled(LabelConfig(**settings), Engine(answer))
    inverted = labelled(LabelConfig(**settings), Engine(answer), constitution(inverted=True))
    assert straight["label_prob"] > 0.7
    assert inverted["label_prob"] == pytest.approx(1 - straight["label_prob"])
    for before, after in zip(straight["votes"], inverted["votes"], strict=True):
        assert (before["inverted"], after["inverted"]) == (False, True)
        raw = ("logprob_a", "logprob_b", "score_a", "score_b", "swapped")
        assert [before.get(k) for k in raw] == [after.get(k) for k in raw]  # what the judge said is kept


@pytest.mark.parametrize(
    ("settings", "probs", "expected"),
    [
        ({}, [0.9, 0.4], 0.65),
        ({"hard": True}, [0.9, 0.4], 1.0),  # averaged first: 0.65 and not (1 + 0) / 2
        ({"hard": True}, [0.9, 0.05], 0.0),
        ({"hard": True}, [0.75, 0.25], 0.5),
        ({"clamp": (0.4, 0.6)}, [0.9, 0.4], 0.6),
        ({"clamp": (0.4, 0.6)}, [0.9, 0.2], 0.55),  # and not (0.6 + 0.4) / 2
        ({"clamp": (0.4, 0.6)}, [0.0, 0.1], 0.4),
    ],
)
def test_average_first_then_hard_or_clamp(settings: dict[str, Any], probs: list[float], expected: float) -> None:
    assert final_label(LabelConfig(**settings), sum(probs) / len(probs)) == pytest.approx(expected, abs=1e-15)


def ranked_labels(config: LabelConfig, wins: dict[str, float]) -> dict[str, float]:
    """Labels of the pairs `xy` of one prompt's answers after ranking, from P(x better)."""
    rows = [
        {**ROW, "id": pair, "response_a": pair[0], "response_b": pair[1], "votes": [{"prob": p}], "label_prob": p}
        for pair, p in wins.items()
    ]
    return {r["id"]: r["label_prob"] for r in ranked(config, rows)}


def test_a_ranking_has_no_cycles_and_keeps_what_is_consistent() -> None:
    config = LabelConfig(ranking=True)
    cycle = ranked_labels(config, {"xy": 0.8, "yz": 0.8, "zx": 0.8})  # x beats y beats z beats x: all are equal
    assert cycle == pytest.approx(dict.fromkeys(("xy", "yz", "zx"), 0.5))
    # odds 4 : 1 and 2 : 1 multiply to 8 : 1, which is what Bradley-Terry says of the ends
    consistent = {"xy": 4 / 5, "yz": 2 / 3, "xz": 8 / 9}
    assert ranked_labels(config, consistent) == pytest.approx(consistent, abs=1e-5)
    assert ranked_labels(config, {"xy": 0.7}) == pytest.approx({"xy": 0.7}, abs=1e-5)
    assert ranked_labels(LabelConfig(ranking=True, hard=True), {"xy": 0.7, "xx": 0.9}) == {"xy": 1.0, "xx": 0.5}


def test_answers_that_nothing_joins_keep_their_labels_and_are_flagged() -> None:
    rows = [
        {**ROW, "id": pair, "response_a": pair[0], "response_b": pair[1], "votes": [{"prob": 0.9}], "label_prob": 0.9}
        for pair in ("vw", "xy")
    ]
    done = ranked(LabelConfig(ranking=True), rows)
    assert [(r["label_prob"], r["flags"][-1]) for r in done] == [(0.9, "unranked")] * 2


def test_a_long_conversation_loses_its_earliest_turns_when_asked_to() -> None:
    old, late = "old " * 200, {"role": "user", "content": "Hello?"}
    messages = [{"role": "user", "content": old}, {"role": "assistant", "content": "Yes."}, late]
    row, engine = {**ROW, "messages": messages}, Engine(alpha_wins(0.8))
    with pytest.raises(DataError, match="more than 600"):
        asyncio.run(LabelPair(LabelConfig(max_prompt_tokens=600), constitution(), 3)(row, engine))
    config = LabelConfig(max_prompt_tokens=600, too_long="truncate", principles_per_pair=2)
    done = asyncio.run(LabelPair(config, constitution(), 3)(row, engine))
    assert engine.prompts == [feedback_prompt([late], QUESTION, "alpha", "beta")] * 2
    assert done["flags"] == [*ROW["flags"], "shortened:question"]
    assert done["messages"] == messages
    assert row["flags"] == ROW["flags"]


@pytest.mark.parametrize(
    ("settings", "verdict"),
    [
        ({"format": "cot"}, "\n\nHuman:\nSo the answer is:"),
        ({"format": "rlaif", "chain_of_thought": True}, "\n\nChosen response:"),
    ],
)
def test_several_rationales_are_sampled_scored_and_averaged(settings: dict[str, Any], verdict: str) -> None:
    by_rationale = {"good": 0.9, "bad": 0.3, "so so": 0.6, "back": 0.2}

    def answer(prompt: str, choices: list[str]) -> list[float]:
        assert prompt.endswith(verdict)
        assert choices == list(NUMBERS if settings["format"] == "rlaif" else CHOICES)
        p = by_rationale[prompt.removesuffix(verdict).rsplit(": ", 1)[1]]
        return [p, 1 - p]

    engine = Engine(answer, ("good", "bad", "so so", "back"))
    done = labelled(LabelConfig(**settings, samples_per_pair=2, swap=True), engine)
    assert [v["rationale"] for v in done["votes"]] == ["good", "bad", "so so", "back"]
    assert [v["swapped"] for v in done["votes"]] == [False, False, True, True]
    assert [v["prob"] for v in done["votes"]] == pytest.approx([0.9, 0.3, 0.4, 0.8])
    assert done["label_prob"] == pytest.approx(0.6)
    assert len({request.seed for request in engine.asked}) == 4
    stops = set.intersection(*(set(request.stop) for request in engine.asked))
    assert stops >= {"\n\nHuman:", verdict.rsplit("\n", 1)[1]}  # neither a turn nor a verdict of its own


def test_a_verdict_has_room_behind_the_longest_question_and_rationale() -> None:
    question = len(rationale_prompt(ROW["messages"], QUESTION, "alpha", "beta"))
    config = LabelConfig(format="cot", max_prompt_tokens=question, max_rationale_tokens=16)
    engine = Engine(alpha_wins(0.8), ("r" * 12,))
    labelled(config, engine)
    assert question + 16 < len(engine.prompts[0]) <= config.max_tokens - 8  # of which the choice needs some
    with pytest.raises(DataError, match="more than"):
        labelled(config, Engine(alpha_wins(0.8), ("r" * 16,)))


def test_principles_are_drawn_anew_for_each_vote() -> None:
    default = load_constitution("default")
    done = labelled(LabelConfig(principles_per_pair=6), Engine(alpha_wins(0.8)), default)
    assert len(done["votes"]) == 6
    assert len({v["principle_id"] for v in done["votes"]}) > 2


def test_scores_of_each_response_make_the_label() -> None:
    def answer(prompt: str, choices: list[str]) -> list[float]:
        assert choices == list(SCORES)
        # alpha: 4 or 10, as likely; beta: 4. All other continuations take nine tenths.
        return [0, 0, 0, 0.05, 0, 0, 0, 0, 0, 0.05] if "alpha" in prompt else [0, 0, 0, 0.1, 0, 0, 0, 0, 0, 0]

    engine = Engine(answer)
    done = labelled(LabelConfig(format="score"), engine)
    (vote,) = done["votes"]
    # the means are 7 and 4: 2 * 6/9 - 1 and 2 * 3/9 - 1; alpha is higher in half of the cases and equal in the rest
    assert (vote["score_a"], vote["score_b"]) == (pytest.approx(1 / 3), pytest.approx(-1 / 3))
    assert done["label_prob"] == vote["prob"] == pytest.approx(0.75)
    assert "logprob_a" not in vote
    assert engine.prompts == [score_prompt(ROW["messages"], QUESTION, r) for r in ("alpha", "beta")]


def test_a_judge_without_any_probability_makes_a_bad_row() -> None:
    with pytest.raises(DataError, match="no preference to read"):
        labelled(LabelConfig(), Engine(lambda p, c: [0.0, 0.0]))


@pytest.mark.parametrize("format", ["auto", "chat", "cot", "rlaif", "score"])
def test_a_chat_model_is_asked_in_messages(format: Any) -> None:
    engine = Engine(lambda p, c: [1 / len(c)] * len(c), ("because",), format="chat")
    labelled(LabelConfig(format=format), engine)
    messages = json.loads(engine.prompts[0])
    assert [m["role"] for m in messages] == ["user", "assistant"]
    assert messages[-1]["content"].endswith(":")


# ---- examples -----------------------------------------------------------------------------------------------------

SHOTS = tuple(
    FeedbackFewShot(
        messages=({"role": "user", "content": f"Question {i}?"},),
        response_a=f"good {i}",
        response_b=f"bad {i}",
        answer="A",
        score_a=9,
        score_b=1,
    )
    for i in range(4)
)


def with_shots(shots: tuple[FeedbackFewShot, ...] = SHOTS) -> Constitution:
    principles = tuple(Principle(id=f"p{i}", preference_question=f"Which, {i}? Options:") for i in range(9))
    return Constitution(name="c", version="1", principles=principles, feedback_few_shots=shots)


def test_rows_share_their_examples_and_so_the_prefix() -> None:
    engine, config, c = Engine(alpha_wins(0.8)), LabelConfig(few_shots=4), with_shots()
    rows = [{**ROW, "id": f"r{i}"} for i in range(12)]
    votes = [labelled(config, engine, c, row)["votes"][0] for row in rows]
    assert len({v["principle_id"] for v in votes}) > 3  # their questions differ
    heads = {prompt[: prompt.rindex("Consider the following")] for prompt in engine.prompts}
    (head,) = heads
    assert sorted(re.findall(r"The answer is: \((.)\)", head)) == ["A", "A", "B", "B"]
    for i in range(4):
        at = head.index(f"Question {i}?")
        letter = re.search(r"The answer is: \((.)\)", head[at:])[1]
        assert f"({letter}) [[[good {i}]]]" in head[at:]
    assert len(set(re.findall(r"Which, \d", head))) > 1  # a principle is drawn for each example
    other = Engine(alpha_wins(0.8))
    asyncio.run(LabelPair(config, c, 4)(ROW, other))
    assert not other.prompts[0].startswith(head)  # another run, other draws


def test_examples_of_the_other_formats() -> None:
    engine = Engine(alpha_wins(0.8))
    labelled(LabelConfig(format="rlaif", few_shots=4), engine, with_shots())
    assert sorted(re.findall(r"Chosen response: (\d)", engine.prompts[0])) == ["1", "1", "2", "2"]
    unscored = SHOTS[0].model_copy(update={"score_a": None, "score_b": None})
    engine = Engine(lambda p, c: [0.1] * 10)
    labelled(LabelConfig(format="score", few_shots=4), engine, with_shots((unscored, *SHOTS)))
    shown = re.findall(r"\[\[\[(good|bad) \d\]\]\]\n\nScore from 1 to 10: (\d)", engine.prompts[0])
    assert sorted(shown) == [("bad", "1"), ("bad", "1"), ("good", "9"), ("good", "9")]


def test_rationales_keep_the_order_of_their_letters() -> None:
    default = load_constitution("default")
    program = LabelPair(LabelConfig(format="cot", few_shots=9), default, 3)
    assert program.shots == default.cot_few_shots
    for seed in range(4):
        shots = LabelPair(LabelConfig(few_shots=3), default, seed).shots
        assert [s.question for s in shots] == [s.question for s in default.feedback_few_shots[:3]]


# ---- the gate -----------------------------------------------------------------------------------------------------


def run_here(inputs: Path, program: Any, engines: Any, out: StageDir, *, settings: MapSettings) -> dict[str, int]:
    """Stands in for the data plane: the program on every row, in this process; finished rows are kept."""
    rows = pq.read_table(inputs).to_pylist()
    if not list(out.data.glob("*.parquet")):
        engine = engines()[0]
        done = [asyncio.run(program(row, engine)) for row in rows]
        out.data.mkdir(parents=True)
        pq.write_table(to_table(done, LABELED_PAIR), out.data / "part-00000.parquet")
    return {"rows_in": len(rows), "rows_out": len(rows), "quarantined": 0}


@pytest.fixture
def run_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(stage, "map_rows", run_here)
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    pq.write_table(to_table([{**ROW, "id": f"r{i}"} for i in range(3)], RESPONSE_PAIR), pairs / "part-00000.parquet")
    warned: list[str] = []

    def run(engine: Engine, **settings: Any) -> tuple[StageDir, Any, list[str]]:
        out = StageDir(tmp_path / "label", 3)
        out.on_warning = warned.append
        key = StageKey({}, {}, {})
        pool = SimpleNamespace(
            engines=lambda model, **how: [engine] if how["format"] == engine.tokenizer.format else []
        )
        (tmp_path / "config.json").write_text("{}")
        show = MapSettings(8, 0.01, 60, nullcontext)  # type: ignore[arg-type]
        setup = EngineSetup(pool, tmp_path, "plain", "float32", 512)
        inputs = StageInputs(key, (pairs,), {"feedback": setup}, show, Cluster(), "cpu", 1, constitution())
        return out, stage.label(LabelConfig(**settings), inputs, out), warned

    return run


GOLD = {r["response_a"] for r in read_comparisons(Source(path="starter:judge_gold"))[0]}


def knows(share: float) -> Any:
    """A judge that is right on this share of the gold comparisons, each time by 0.9."""
    right = set(sorted(GOLD)[: round(share * len(GOLD))])

    def answer(prompt: str, choices: list[str]) -> list[float]:
        a, b = re.findall(r" \([AB]\) \[\[\[(.*?)\]\]\](?=\n)", prompt, re.DOTALL)
        p = 0.9 if (a in GOLD) == bool({a, b} & right) else 0.1
        return [p, 1 - p]

    return answer


def test_half_of_the_gold_stands_the_other_way_round() -> None:
    comparisons, *_ = read_comparisons(Source(path="starter:judge_gold"))
    rows, gold = alternate(comparisons, seed=5)
    assert sorted(gold.values()) == [0.0] * 34 + [1.0] * 34
    by_id = {r["id"]: r for r in comparisons}
    for row in rows:
        chosen = row["response_a"] if gold[row["id"]] == 1.0 else row["response_b"]
        assert chosen == by_id[row["id"]]["response_a"]
    assert alternate(comparisons[::-1], seed=5) == (rows, gold)
    assert alternate(comparisons, seed=6)[1] != gold


def test_a_good_judge_passes_and_is_measured(run_label: Any) -> None:
    _, manifest, warned = run_label(Engine(knows(0.75)), judge_gate="stop")
    found = manifest.metrics
    # 51 of 68: (0.75 + 0.028246) / 1.056492 = 0.736633, half-width 0.101133 by Wilson's formula
    assert (found["gate/comparisons"], found["gate/accuracy"]) == (68, 0.75)
    assert found["gate/accuracy_low"] == pytest.approx(0.6355, abs=1e-3)
    assert found["gate/accuracy_high"] == pytest.approx(0.8378, abs=1e-3)
    assert found["gate/calibration_error"] == pytest.approx(0.15)  # says 0.9, is right in 0.75
    assert (found["gate/quarantined"], found["rows_out"], found["few_shots"]) == (0, 3, 0)
    assert warned == []
    assert "warnings" not in found
    assert "position_bias" not in found
    assert {o["path"] for o in manifest.outputs} == {"data/part-00000.parquet"}  # gold is no label


@pytest.mark.parametrize("letter", [0.9, 0.1])
def test_a_judge_that_likes_a_letter_is_at_chance_and_the_run_says_so(run_label: Any, letter: float) -> None:
    _, manifest, warned = run_label(Engine(lambda p, c: [letter, 1 - letter]))
    assert manifest.metrics["gate/accuracy"] == 0.5
    assert manifest.metrics["gate/prefers_first"] == round(letter)
    (text,) = warned
    assert manifest.metrics["warnings"] == [text]
    assert "THE JUDGE IS NOT ABOVE CHANCE: ON 68 GOLD COMPARISONS ITS ACCURACY IS 0.50" in text
    assert "(95% INTERVAL 0.38 TO 0.62)" in text
    assert manifest.metrics["rows_out"] == 3


def test_a_judge_in_the_chat_format_is_given_its_own_template(run_label: Any) -> None:
    chat = Engine(lambda p, c: [0.5, 0.5], format="chat")
    assert run_label(chat, format="chat")[1].metrics["rows_out"] == 3
    assert len(chat.prompts) == 68 + 3


def test_stop_stops_before_any_label_and_warn_goes_on_without_asking_again(run_label: Any, tmp_path: Path) -> None:
    engine = Engine(knows(0.56))  # 38 of 68: 0.559, the interval begins at 0.44
    with pytest.raises(StageFailed, match=r"ACCURACY IS 0\.56 \(95% INTERVAL 0\.44 TO 0\.67\)") as caught:
        run_label(engine, judge_gate="stop")
    assert "label.judge_gate=warn" in caught.value.fix
    assert not (tmp_path / "label" / "manifest.json").exists()
    assert not list((tmp_path / "label" / "data").glob("*"))
    assert len(engine.prompts) == 68
    _, manifest, warned = run_label(engine, judge_gate="warn")
    assert len(engine.prompts) == 68 + 3
    assert len(warned) == len(manifest.metrics["warnings"]) == 1


def test_off_asks_nothing(run_label: Any, tmp_path: Path) -> None:
    engine = Engine(lambda p, c: [0.5, 0.5])
    _, manifest, warned = run_label(engine, judge_gate="off")
    assert len(engine.prompts) == 3
    assert not [k for k in manifest.metrics if k.startswith("gate/")]
    assert warned == []


def test_scores_pass_the_gate_too(run_label: Any) -> None:
    def answer(prompt: str, choices: list[str]) -> list[float]:
        response = re.findall(r"Response: \[\[\[(.*?)\]\]\](?=\n)", prompt, re.DOTALL)[-1]
        return [0.0] * 8 + ([0.5, 0.5] if response in GOLD else [0.5, 0.0])

    _, manifest, _ = run_label(Engine(answer), format="score", judge_gate="stop")
    assert manifest.metrics["gate/accuracy"] == 1.0
    assert "gate/position_bias" not in manifest.metrics


def test_gold_is_asked_as_the_labels_are_and_bad_gold_is_counted(run_label: Any, tmp_path: Path) -> None:
    gold = tmp_path / "gold.jsonl"
    rows = [{"prompt": f"Which {i}?", "chosen": f"this {i}", "rejected": f"that {i}"} for i in range(4)]
    gold.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"prompt": "x", "chosen": "y"}\n', "utf-8")
    engine = Engine(lambda p, c: [0.5, 0.5])
    settings = {"format": "rlaif", "swap": True, "principles_per_pair": 2, "gold": Source(path=str(gold))}
    _, manifest, _ = run_label(engine, **settings)
    assert len(engine.prompts) == (4 + 3) * 2 * 2
    asked = [(f"this {i}", f"that {i}") for i in range(4)]
    expected = {rlaif_prompt([{"role": "user", "content": f"Which {i}?"}], QUESTION, *asked[i]) for i in range(4)}
    assert expected <= set(engine.prompts[:16])
    assert (manifest.metrics["gate/comparisons"], manifest.metrics["gate/quarantined"]) == (4, 1)
    assert manifest.metrics["gate/position_bias"] == 0.5  # both letters are as likely: ties
