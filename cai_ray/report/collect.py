"""Gathers what a run directory says: manifests, metrics, samples, quarantined rows. Reads only; never makes a folder.

A run may be unfinished or still at work, so whatever is missing or torn is counted and named, never an error.
"""

import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from cai_ray.artifacts import Manifest, RunDir
from cai_ray.errors import DataError

STAGES = ("prompts", "revise", "sft", "sample_pairs", "label", "preference_model", "ppo", "evaluate")
LN2 = math.log(2)  # entropy of a coin, nats
CHANCE = 0.95  # labels whose mean entropy exceeds this share of ln 2 say next to nothing
MANY_TRUNCATED = 0.2
BIASED = 0.8  # share of pairs in which the same letter wins
MAX_GAP = 0.05  # nats between trainer and engine

EXPECT = {
    "prompts": "your rows, less duplicates; a tenth is held out",
    "revise": "each revision less harmful than the answer before it",
    "sft": "loss falls on held-out rows",
    "sample_pairs": "two different, finished answers a prompt",
    "label": "entropy well below 0.69 nats, A in about half",
    "preference_model": "held-out accuracy above 50%",
    "ppo": "score rises, KL stays in the tens of nats or below",
    "evaluate": "the policy wins more than half",
}
# Where a model that comes with cai-ray has labelled: it is too small to judge.
EXPECT_OF_SHIPPED = {
    "label": "a judge at chance: half of the gold, entropy near 0.69 nats, one letter nearly always",
    "preference_model": "chance on the judge's pairs",
    "ppo": "score and KL move, which shows that it learns, not what",
    "evaluate": "win rates around a half",
}
# Metric -> how it reads; one that is absent is left out. Win rates are added where there are any.
NUMBERS = {
    "prompts": {"rows": "{:,.0f} prompts", "duplicates": "{:,.0f} duplicates"},
    "revise": {"harmful": "{:,.0f} revised", "rounds": "{:.0f} rounds", "helpful": "{:,.0f} helpful answers"},
    "sft": {"eval/loss_before": "held-out loss {:.3f} before", "eval/loss": "{:.3f} after"},
    "sample_pairs": {"pairs": "{:,.0f} pairs", "equal_responses": "{:,.0f} equal", "truncated": "{:.0%} truncated"},
    "label": {
        "gate/accuracy": "judge right on {:.0%} of gold",
        "mean_entropy": "entropy {:.2f} nats",
        "prefers_first": "A preferred in {:.0%}",
        "prefers_longer": "the longer in {:.0%}",
    },
    "preference_model": {"eval/loss": "held-out loss {:.3f}", "eval/accuracy": "held-out accuracy {:.0%}"},
    "ppo": {
        "objective/score_before": "score {:+.2f} at first",
        "objective/score": "{:+.2f} at last",
        "objective/kl": "KL {:.2f} nats",
    },
    "evaluate": {},
}


@dataclass(frozen=True)
class StageRecord:
    """What one stage left behind."""

    name: str
    state: Literal["done", "unfinished", "not begun", "left out"]
    path: Path
    manifest: Manifest | None
    finished: str  # local time of the manifest, empty without one
    series: dict[str, tuple[list[float], list[float]]]  # metric -> steps, values; finite ones only
    samples: list[dict[str, Any]]
    quarantine: Counter[str]  # reason, numbers in it replaced by N -> rows
    unreadable: int  # lines that are not JSON objects

    @property
    def metrics(self) -> dict[str, Any]:
        """Key metrics: the manifest's, and for what it lacks the last (and as NAME_before the first) of each series."""
        first = {f"{name}_before": values[0] for name, (_, values) in self.series.items() if len(values) > 1}
        last = {name: values[-1] for name, (_, values) in self.series.items()}
        return {**first, **last, **(self.manifest.metrics if self.manifest else {})}

    @property
    def rows(self) -> tuple[Any, Any]:
        """How many rows it read, and how many it made or learned from; None where that is no number of rows."""
        m = self.metrics
        if "train_examples" in m:
            return m["rows"], m["train_examples"] + m["test_examples"]
        return m.get("rows_in", m.get("raw_rows")), m.get("pairs", m.get("rows_out", m.get("rows")))

    @property
    def key_numbers(self) -> str:
        """The numbers to look at first, in words."""
        found = self.metrics
        texts = [text.format(found[k]) for k, text in NUMBERS[self.name].items() if is_number(found.get(k))]
        texts += [f"{model} wins {share} over {other}" for model, other, share in win_rates(found)]
        return ", ".join(texts)


@dataclass(frozen=True)
class Record:
    """What a run left behind."""

    path: Path
    config: dict[str, Any]  # resolved; empty before the run wrote it
    config_text: str
    stages: tuple[StageRecord, ...]

    def stage(self, name: str) -> StageRecord:
        """The stage of this name."""
        return self.stages[STAGES.index(name)]

    @property
    def manifests(self) -> dict[str, Manifest]:
        """The finished stages' manifests."""
        return {s.name: s.manifest for s in self.stages if s.manifest}


def is_number(value: object) -> bool:
    """Whether `value` is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def interval(metrics: Mapping[str, Any], key: str, form: str) -> str:
    """A metric with its interval, as `0.61 (0.52 to 0.70)`; a dash where it is absent."""
    if not is_number(metrics.get(key)):
        return "–"
    ends = [form.format(metrics[k]) for k in (f"{key}_low", f"{key}_high") if is_number(metrics.get(k))]
    return form.format(metrics[key]) + (f" ({ends[0]} to {ends[1]})" if len(ends) == 2 else "")


def win_rates(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(model, other model, share of prompts on which the first scores higher, with its interval)."""
    keys = (re.fullmatch(r"(.+)/wins_over_(.+?)(?<!_low)(?<!_high)", k) for k in metrics)
    return [(k[1], k[2], interval(metrics, k[0], "{:.0%}")) for k in keys if k]


def summary_lines(run: RunDir) -> list[tuple[str, str, str]]:
    """One line per finished stage: its name, its key numbers, what to expect of them."""
    record = collect(run)
    judge = record.manifests.get("label")
    expect = EXPECT | (EXPECT_OF_SHIPPED if judge and _shipped_models([judge]) else {})
    return [(s.name, s.key_numbers, expect[s.name]) for s in record.stages if s.manifest]


def collect(run: RunDir) -> Record:
    """Reads a run directory.

    Raises:
        DataError: there is no such directory, a manifest is damaged, or a stage taken over from elsewhere is gone.
    """
    if not run.path.is_dir():
        raise DataError(f"{run.path} is no run directory", "give the folder that `cai-ray run` wrote")
    config = run.path / "config.yaml"
    text = config.read_text("utf-8", "replace") if config.is_file() else ""
    try:
        settings = yaml.safe_load(text) or {}
    except yaml.YAMLError as e:
        raise DataError(f"{config} is damaged: {str(e).splitlines()[0]}", "the run's command writes it anew") from e
    complete = run.stage("evaluate").manifest() is not None
    return Record(run.path.resolve(), settings, text, tuple(_stage(run, name, complete) for name in STAGES))


def _stage(run: RunDir, name: str, complete: bool) -> StageRecord:
    out = run.stage(name)
    manifest, at = out.manifest(), out.path
    finished = time.strftime("%Y-%m-%d %H:%M", time.localtime(out.manifest_path.stat().st_mtime)) if manifest else ""
    begun = "left out" if complete else "unfinished" if (at / "key.json").is_file() else "not begun"
    metrics, samples, bad = (list(json_lines(at / f"{f}.jsonl")) for f in ("metrics", "samples", "quarantine"))
    unique = {json.dumps(row, sort_keys=True): row for row in samples if row is not None}  # a resumed stage repeats
    reasons = Counter(re.sub(r"\d+", "N", str(row.get("reason", "no reason given"))) for row in bad if row)
    torn = sum(row is None for row in [*metrics, *samples, *bad])
    return StageRecord(
        name, "done" if manifest else begun, at, manifest, finished, _series(metrics), [*unique.values()], reasons, torn
    )


def json_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """Objects of a JSON-lines file, which need not exist; None for a line that is none."""
    if not path.is_file():
        return
    with path.open("rb") as f:
        for line in f:  # splitlines() would also cut at the breaks inside a text
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield row if isinstance(row, dict) else None


def _series(lines: list[dict[str, Any] | None]) -> dict[str, tuple[list[float], list[float]]]:
    """Each metric over steps, ascending; a step that was redone after a crash counts as it was the last time."""
    points: dict[str, dict[float, float]] = {}
    for line in lines:
        for key, value in (line or {}).items():
            if key not in ("step", "time") and is_number(value) and line and is_number(line.get("step")):
                points.setdefault(key, {})[line["step"]] = value
    return {key: (sorted(p), [p[step] for step in sorted(p)]) for key, p in points.items()}


def cautions(record: Record, unfinished: bool = True) -> list[str]:
    """What limits the run's numbers, in plain words; with `unfinished` also that some are still to come."""
    out = []
    if unfinished and (
        waiting := [f"{s.name} ({s.state})" for s in record.stages if s.state in ("unfinished", "not begun")]
    ):
        out.append(f"The run is not finished: {', '.join(waiting)}. Everything below is what exists so far.")
    out += [text for s in record.stages for text in s.metrics.get("warnings", ())]
    out += [*_label_cautions(record.stage("label").metrics), *_model_cautions(record)]
    if cut := [f"{where} {share:.0%}" for where, share in truncated(record) if share > MANY_TRUNCATED]:
        out.append(f"Many texts were cut off at their token limit: {', '.join(cut)}. Raise max_new_tokens there.")
    for s in record.stages:
        if bad := max(sum(s.quarantine.values()), s.metrics.get("quarantined", 0)):
            out.append(f"{s.name} quarantined {bad} rows; its quarantine.jsonl has their reasons.")
        if s.unreadable:
            out.append(f"{s.name}: {s.unreadable} lines of its files could not be read and are missing here.")
        out += [
            f"{s.name} was made from another {name} than the one that lies here; run again to bring them together."
            for name, sha in (s.manifest.inputs if s.manifest else {}).items()
            if name in record.manifests and record.manifests[name].sha256 != sha
        ]
    return [*out, *_data_cautions(record)]


def _label_cautions(metrics: Mapping[str, Any]) -> Iterator[str]:
    entropy, first = metrics.get("mean_entropy", 0.0), metrics.get("prefers_letter_a", 0.5)
    if entropy > CHANCE * LN2:
        yield (
            f"The judge is near chance: the labels' mean entropy is {entropy:.2f} nats, a coin has {LN2:.2f}. "
            "The preference model can learn little from them; a larger feedback model is the usual remedy."
        )
    if max(first, 1 - first) > BIASED:
        both = "position_bias" in metrics
        yield (
            f"The judge prefers answer {'A' if first > 0.5 else 'B'} in {max(first, 1 - first):.0%} of its votes, "
            "so it may be choosing the letter and not the text"
            f"{', which both orders together even out' if both else '; label.swap=true asks in both orders'}."
        )


def _model_cautions(record: Record) -> Iterator[str]:
    accuracy = record.stage("preference_model").metrics.get("eval/accuracy")
    if accuracy is not None and accuracy < 0.55:
        yield f"The preference model is near chance on held-out pairs: accuracy {accuracy:.0%}."
    gaps = record.stage("ppo").series.get("rollout/logprob_gap", ([], []))[1]
    stale = (record.config.get("ppo") or {}).get("staleness")  # the gap is then what the policy has moved
    if gaps and max(gaps) > MAX_GAP and not stale:
        yield f"Engine and trainer disagreed by up to {max(gaps):.3f} nats a token; PPO's ratios are as far off."


def _data_cautions(record: Record) -> Iterator[str]:
    sections = json.dumps([m.config for m in record.manifests.values()] or record.config)
    if re.search(r'"starter:(?!judge_gold")', sections):  # the gold of the judge's gate teaches nothing
        yield "The starter prompts and comparisons were written for cai-ray: they are not human labels, no benchmark."
    if _shipped_models(record.manifests.values()):
        yield (
            "A model that comes with cai-ray took part (135 million parameters or fewer). Such a run proves the "
            "mechanics, not the quality: do not read its scores or win rates as evidence about the method."
        )


def _shipped_models(manifests: Iterable[Manifest]) -> bool:
    return any(i.startswith(("embedded@", "tiny@")) for m in manifests for i in m.models.values())


def truncated(record: Record) -> list[tuple[str, float]]:
    """The share of sampled texts that reached the length limit, by stage, and by step or model."""
    revise, evaluate = record.stage("revise").metrics, record.stage("evaluate").metrics
    rounds = revise.get("harmful", 0) * revise.get("rounds", 0)
    texts = {"response": revise.get("rows_out", 0), "critique": rounds, "revision": rounds}
    return [
        *((f"revise ({k}s)", revise.get(f"flag/truncated:{k}", 0) / n) for k, n in texts.items() if n),
        ("sample_pairs", record.stage("sample_pairs").metrics.get("truncated", 0)),
        ("ppo", record.stage("ppo").metrics.get("rollout/truncated", 0)),
        *((f"evaluate ({k[:-10]})", share) for k, share in evaluate.items() if k.endswith("/truncated")),
    ]
