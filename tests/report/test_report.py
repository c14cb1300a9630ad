import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cai_ray.artifacts import RunDir
from cai_ray.errors import DataError
from cai_ray.pipeline import NAMES
from cai_ray.report import summary_lines, write_report
from cai_ray.report.charts import histogram, line_chart, ticks
from cai_ray.report.collect import STAGES, cautions, collect
from tests.report.conftest import commit


class Page(HTMLParser):
    """Tags, attributes, the text outside of every fold, and whether tags close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.open_text, self._open = [], [], "", []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open and ("details" not in self._open or "summary" in self._open):
            self.open_text += data


@pytest.fixture
def page(full_run: RunDir) -> tuple[str, Page]:
    text = write_report(full_run).read_text("utf-8")
    return text, Page(text)


def test_stages_are_the_pipelines():
    assert (*STAGES, "report") == NAMES


def test_hostile_text_stays_text(page):
    text, parsed = page
    assert "script" not in parsed.tags
    assert "img" not in parsed.tags
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert "{{ 7 * 7 }}" in text  # a template in a model's answer is not run
    assert text.count("alert(&#34;x&#34;)") > 10
    assert "&lt;i&gt;mine" in text


def test_the_page_needs_nothing_else(page):
    text, parsed = page
    assert not [v for name, v in parsed.attributes if name in ("src", "href", "data", "action", "srcset", "xlink:href")]
    assert not {"link", "iframe", "object", "embed", "base", "form", "a"} & set(parsed.tags)
    assert "url(" not in text
    assert "@import" not in text
    policy = next(v for n, v in parsed.attributes if v and "default-src" in v)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_prompts_and_answers_are_folded(page):
    _, parsed = page
    for word in (
        "question",
        "initial </pre>",
        "critique </pre>",
        "revision </pre>",
        "left",
        "try 24",
        "ppo says",
        "onerror",
    ):
        assert word not in parsed.open_text
    assert "may be harmful" in parsed.open_text
    assert ("open", None) not in parsed.attributes


def test_every_sample_is_shown_inside_the_folds(page):
    text, _ = page
    for word in (
        "question",
        "initial",
        "critique",
        "revision",
        "left",
        "right",
        "try 0",
        "try 24",
        "ppo says",
        "helpful says",
    ):
        assert f">{word} " in text
    assert "ppo: 12 of 25 samples" in text
    assert "P(A better) = 0.600, asked in the other order" in text


def test_numbers_and_charts(page):
    text, parsed = page
    opened = " ".join(parsed.open_text.split())
    for figure in (
        "SL model: loss",
        "Labels: P(A is better)",
        "Preference model: accuracy",
        "PPO: score",
        "KL to the SL model",
    ):
        assert figure in opened
    assert parsed.tags.count("svg") == 7
    assert "held-out loss 3.100 before, 1.900 after" in opened
    assert "1.25 (1.00 to 1.50)" in opened
    assert "ppo scores higher than helpful on 75% (50% to 95%) of the prompts" in opened
    assert "sft/model" in opened
    assert "2 × N words" in opened
    assert "1 min 15 s" in text
    assert re.search(r"[0-9a-f]{64}", text)


def test_cautions_say_what_is_wrong(full_run: RunDir):
    found = "\n".join(cautions(collect(full_run)))
    for words in (
        "judge is near chance: the labels' mean entropy is 0.69",
        "prefers answer A in 90%",
        "near chance on held-out pairs: accuracy 53%",
        "up to 0.060 nats",
        "revise (revisions) 75%",
        "prompts quarantined 2 rows",
        "not human labels",
        "proves the mechanics, not the quality",
    ):
        assert words in found
    assert "not finished" not in found
    assert "another" not in found


def test_rows_of_pairs_are_pairs_and_not_prompts(full_run: RunDir):
    assert collect(full_run).stage("sample_pairs").rows == (30, 90)


def test_both_orders_are_advised_to_those_who_ask_in_one(full_run: RunDir):
    label = full_run.stage("label").manifest_path
    assert "label.swap=true" in "\n".join(cautions(collect(full_run)))
    manifest = json.loads(label.read_text())
    manifest["metrics"] |= {"position_bias": 0.9}
    label.write_text(json.dumps(manifest))
    found = "\n".join(cautions(collect(full_run)))
    assert "prefers answer A in 90%" in found
    assert "label.swap=true" not in found


def test_the_gold_of_the_gate_makes_no_data_a_starter_s(full_run: RunDir):
    for name, config in (("prompts", {"harmful": [{"path": "mine"}]}), ("label", {"gold": "starter:judge_gold"})):
        path = full_run.stage(name).manifest_path
        path.write_text(json.dumps({**json.loads(path.read_text()), "config": config}))
    assert "not human labels" not in "\n".join(cautions(collect(full_run)))


def test_warnings_of_stages_are_cautions_and_escaped(full_run: RunDir):
    label = full_run.stage("label")
    label.manifest_path.unlink()
    label.warn("THE JUDGE IS NOT ABOVE CHANCE <b>")
    commit(label, {"sample_pairs": full_run.stage("sample_pairs")}, {"gate/accuracy": 0.53}, principles="cd" * 32)
    assert label.manifest().metrics["warnings"] == ["THE JUDGE IS NOT ABOVE CHANCE <b>"]
    assert cautions(collect(full_run))[0] == "THE JUDGE IS NOT ABOVE CHANCE <b>"
    assert "THE JUDGE IS NOT ABOVE CHANCE &lt;b&gt;" in write_report(full_run).read_text("utf-8")
    assert collect(full_run).stage("label").key_numbers == "judge right on 53% of gold"


def test_no_caution_without_cause(tmp_path: Path, full_run: RunDir):
    label = full_run.stage("label").manifest_path
    manifest = json.loads(label.read_text())
    manifest["metrics"] |= {"mean_entropy": 0.3, "prefers_letter_a": 0.5}
    label.write_text(json.dumps(manifest))
    assert not [c for c in cautions(collect(full_run)) if "judge" in c]


def test_a_replaced_stage_breaks_the_chain(full_run: RunDir):
    path = full_run.stage("label").manifest_path
    path.write_text(path.read_text().replace('"key": "', '"key": "00'))
    assert "preference_model was made from another label" in "\n".join(cautions(collect(full_run)))


def test_an_unfinished_run_says_what_is_missing(half_run: RunDir):
    before = set(half_run.path.rglob("*"))
    parsed = Page(write_report(half_run).read_text("utf-8"))
    opened = " ".join(parsed.open_text.split())
    assert "not finished: sample_pairs (unfinished), label (not begun), preference_model (not begun)" in opened
    assert "Evaluation" not in opened
    assert set(half_run.path.rglob("*")) - before == {half_run.path / "report.html"}  # reading makes no folders


def test_an_empty_run_and_none(tmp_path: Path):
    assert "prompts (not begun)" in write_report(RunDir(tmp_path)).read_text("utf-8")
    with pytest.raises(DataError, match="no run directory"):
        write_report(RunDir(tmp_path / "absent"))


def test_torn_repeated_and_odd_lines(half_run: RunDir):
    sft = half_run.stage("sft")
    sft.metrics(5, {"train/loss": 0.5, "perf/mfu": float("nan")})  # the step was redone
    with (sft.path / "metrics.jsonl").open("a") as f:
        f.write('[1]\n{"step": 6, "tra')
    revise = half_run.stage("revise")
    (revise.path / "samples.jsonl").write_text((revise.path / "samples.jsonl").read_text() * 2)
    record = collect(half_run)
    assert record.stage("sft").series["train/loss"] == ([0, 1, 2, 3, 4, 5], [3.0, 2.75, 2.5, 2.25, 2.0, 0.5])
    assert "perf/mfu" not in record.stage("sft").series
    assert record.stage("sft").unreadable == 2
    assert len(record.stage("revise").samples) == 1
    assert "sft: 2 lines" in "\n".join(cautions(record))


def test_a_stage_that_nothing_reads_is_left_out(full_run: RunDir):
    full_run.discard("revise")
    assert "left out: nothing in this run reads it" in write_report(full_run).read_text("utf-8")


def test_a_stage_of_another_run_shows_its_place(half_run: RunDir, tmp_path: Path):
    other = RunDir(tmp_path / "other")
    other.take_over("sft", half_run.stage("sft"))
    assert str(half_run.path / "sft" / "model") in write_report(other).read_text("utf-8")


def test_summary_lines(full_run: RunDir):
    lines = {stage: (numbers, expect) for stage, numbers, expect in summary_lines(full_run)}
    assert list(lines) == list(STAGES)
    assert lines["label"] == ("entropy 0.69 nats, A preferred in 90%", "entropy well below 0.69 nats, A in about half")
    assert lines["ppo"][0] == "score +0.00 at first, +2.40 at last, KL 4.80 nats"
    assert lines["evaluate"][0] == "ppo wins 75% (50% to 95%) over helpful"
    assert not [line for line in summary_lines(full_run) if "[" in "".join(line)]  # the terminal would read markup


@pytest.mark.parametrize(("judge", "expected"), [("org/big@main", "entropy well"), ("tiny@main", "a judge at")])
def test_what_to_expect_of_labels_is_what_the_judge_can_do(tmp_path: Path, judge: str, expected: str):
    run = RunDir(tmp_path)
    commit(run.stage("revise"), {}, {}, models={"helpful": "embedded@main"})
    commit(run.stage("label"), {}, {"mean_entropy": 0.4}, models={"feedback": judge})
    assert summary_lines(run)[1][2].startswith(expected)


def test_a_damaged_configuration_is_one_message(full_run: RunDir):
    (full_run.path / "config.yaml").write_text("run: [", "utf-8")
    with pytest.raises(DataError, match=r"config\.yaml is damaged"):
        collect(full_run)


def test_ticks_are_round_and_inside():
    assert ticks(0, 1) == [0, 0.5, 1]
    assert ticks(-0.3, 9.7) == [0, 5]
    assert ticks(0, 24, count=5) == [0, 5, 10, 15, 20]
    assert ticks(1e-5, 4e-5) == pytest.approx([1e-5, 2e-5, 3e-5, 4e-5])


def test_charts_of_little_data():
    assert line_chart("t", []) == ""
    assert line_chart("t", [("a", [], [])]) == ""
    assert histogram("t", []) == ""
    assert line_chart("<b>", [("a", [3], [0.0])]).count("<circle") == 1
    assert "<b>" not in line_chart("<b>", [("a", [3], [0.0])])


def test_histogram_counts_each_value_once():
    heights = [float(h) for h in re.findall(r'<rect[^>]* height="([\d.]+)"', histogram("t", [0.0, 0.04, 0.5, 1.0]))]
    assert len(heights) == 20
    assert [k for k, h in enumerate(heights) if h] == [0, 10, 19]
    assert heights[0] == pytest.approx(2 * heights[10], abs=0.2)


def test_imports_neither_torch_nor_ray(full_run: RunDir):
    code = (
        "import sys; from pathlib import Path; from cai_ray.artifacts import RunDir; from cai_ray.report import *\n"
        f"run = RunDir(Path({str(full_run.path)!r})); write_report(run); summary_lines(run)\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'vllm', 'deepspeed', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
