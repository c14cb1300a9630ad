"""Writes RUN/report.html: everything a run did on one page that needs nothing else.

Prompts and answers are untrusted and may be harmful: Jinja escapes every one, a content policy in the page forbids
scripts and requests, and they stand behind a closed fold.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cai_ray.artifacts import RunDir, write_atomic
from cai_ray.report.charts import histogram, line_chart
from cai_ray.report.collect import Record, StageRecord, cautions, collect, interval, is_number, win_rates

MAX_SAMPLES = 12  # a stage
MAX_TEXT = 6000  # characters of one text
_COLUMNS = {"score": "{:.2f}", "refusals": "{:.0%}", "words": "{:.0f}", "truncated": "{:.0%}", "prompts": "{:.0f}"}
# Chart title, stage, label -> metric
_LOSSES = {"training": "train/loss", "held-out": "eval/loss"}
_CURVES = (
    ("SL model: loss", "sft", _LOSSES),
    ("Preference model: loss", "preference_model", _LOSSES),
    ("Preference model: accuracy", "preference_model", {"held-out": "eval/accuracy"}),
    ("PPO: score", "ppo", {"score": "objective/score", "held-out model": "objective/heldout_score"}),
    ("PPO: score on held-out prompts", "ppo", {"score": "eval/score", "held-out model": "eval/heldout_score"}),
    ("PPO: KL to the SL model, nats", "ppo", {"KL": "objective/kl"}),
    ("PPO: response length, tokens", "ppo", {"length": "rollout/length"}),
    ("PPO: engine against trainer, nats", "ppo", {"gap": "rollout/logprob_gap"}),
    ("PPO: policy entropy, nats", "ppo", {"entropy": "policy/entropy"}),
)


def write_report(run: RunDir) -> Path:
    """Writes the report of a run, finished or not, and returns its path, RUN/report.html.

    Raises:
        DataError: there is no such directory, a manifest is damaged, or a stage taken over from elsewhere is gone.
    """
    path = run.path / "report.html"
    text = render(collect(run))
    write_atomic(path, text.encode("utf-8", "replace").decode("utf-8"))  # JSON may hold halves of surrogate pairs
    return path


def render(record: Record) -> str:
    """The page."""
    env = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    env.trim_blocks = env.lstrip_blocks = True
    env.filters |= {"seconds": seconds, "size": size, "count": count, "clip": clip}
    return env.get_template("report.html.j2").render(
        run=record,
        head=headline(record),
        cautions=cautions(record),
        charts=charts(record),
        answers=evaluation_rows(record.stage("evaluate").metrics),
        wins=win_rates(record.stage("evaluate").metrics),
        samples=[(s, samples(s)) for s in record.stages if s.samples],
        models=model_folders(record),
    )


def headline(record: Record) -> list[tuple[str, str]]:
    """What identifies the run, as (name, value)."""
    found = list(record.manifests.values())
    chosen = record.config.get("constitution") or {}
    out = []
    for what, stage in (("critique", "revise"), ("feedback", "label")):
        manifest = record.manifests.get(stage)
        sha = f" ({manifest.constitution_sha256[:12]})" if manifest and manifest.constitution_sha256 else ""
        out.append((f"constitution for {what}", str((chosen.get(what) or {}).get("file", "unknown")) + sha))
    days = sorted(s.finished for s in record.stages if s.finished)
    git = [m.git["revision"][:12] + (" with local changes" if m.git.get("dirty") else "") for m in found if m.git]
    return [
        *out,
        ("seed", _distinct(m.seed for m in found)),
        ("manifests", " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "none yet"),
        ("wall time of all stages (of a resumed one, the last attempt)", seconds(sum(m.wall_s for m in found))),
        ("cai-ray", _distinct(m.packages.get("cai-ray", "unknown") for m in found)),
        ("git revision", _distinct(git)),
    ]


def _distinct(values: Iterable[object]) -> str:
    return ", ".join(sorted({str(v) for v in values})) or "unknown"


def charts(record: Record) -> list[Markup]:
    """Every chart for which there are numbers."""
    drawn = []
    for title, stage, lines in _CURVES:
        series = record.stage(stage).series
        drawn.append(line_chart(title, [(label, *series[name]) for label, name in lines.items() if name in series]))
    drawn.insert(1, histogram("Labels: P(A is better)", label_probs(record.stage("label"))))
    return [c for c in drawn if c]


def label_probs(stage: StageRecord) -> list[float]:
    """P(A better) of every labelled pair; empty while the stage is unfinished."""
    import pyarrow.parquet as pq

    values = []
    for path in sorted((stage.path / "data").glob("*.parquet")) if stage.manifest else ():
        # File by file: pq.read_table would import pandas, for longer than all else here takes.
        values += pq.ParquetFile(path).read(columns=["label_prob"])["label_prob"].to_pylist()
    return [p for p in values if is_number(p)]


def evaluation_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Model, kind of prompt, and the columns of `_COLUMNS`, one row per model and kind."""
    found = (re.fullmatch(r"(.+)/(harmful|helpful)/score", key) for key in metrics)
    return [
        [*k.groups(), *(interval(metrics, f"{k[1]}/{k[2]}/{c}", form) for c, form in _COLUMNS.items())]
        for k in found
        if k
    ]


def samples(stage: StageRecord) -> list[tuple[str, list[tuple[str, str]]]]:
    """(heading, [(label, text)]) of at most MAX_SAMPLES examples, from the first to the last, evenly.

    Answers of several models to one prompt come together. The heading holds no text of users or models.
    """
    groups: dict[Any, list[dict[str, Any]]] = {}
    for number, row in enumerate(stage.samples):
        groups.setdefault(row.get("id") if "model" in row else number, []).append(row)
    chosen = list(groups.values())
    if len(chosen) > MAX_SAMPLES:
        chosen = [chosen[k * (len(chosen) - 1) // (MAX_SAMPLES - 1)] for k in range(MAX_SAMPLES)]
    out = []
    for rows in chosen:
        facts = [f"{k} {rows[0][k]}" for k in ("step", "kind", "source", "id") if rows[0].get(k) is not None]
        out.append((", ".join(facts), [*_prompt(rows[0]), *(part for row in rows for part in _answers(row))]))
    return out


def _prompt(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    turns = row.get("messages") or ([{"role": "user", "content": row["prompt"]}] if "prompt" in row else [])
    return [(str(turn["role"]), str(turn["content"])) for turn in turns]


def _answers(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    parts = [("first response", row.get("initial_response"))]
    for number, turn in enumerate(row.get("rounds") or (), 1):
        parts.append((f"critique {number} by {turn.get('principle_id')}", turn.get("critique")))
        parts.append((f"revision {number}", turn.get("revision")))
    parts += [("response A", row.get("response_a")), ("response B", row.get("response_b"))]
    if is_number(row.get("label_prob")):
        parts.append(("label", f"P(A better) = {row['label_prob']:.3f}"))
    for vote in row.get("votes") or ():
        order = ", asked in the other order" if vote.get("swapped") else ""
        text = f"P(A better) = {vote.get('prob', float('nan')):.3f}{order}\n{vote.get('rationale') or ''}"
        parts.append((f"vote by {vote.get('principle_id')}", text.strip()))
    score = f", score {row['score']:.2f}" if is_number(row.get("score")) else ""
    parts.append((f"{row.get('model', 'response')}{score}", row.get("response")))
    if row.get("flags"):
        parts.append(("flags", ", ".join(row["flags"])))
    return [(label, str(text)) for label, text in parts if text is not None]


def model_folders(record: Record) -> list[tuple[str, str, int]]:
    """(stage, folder, bytes) of every model that the run made; a folder of another run has its whole path."""
    out = []
    for stage in record.stages:
        snapshots = sorted((stage.path / "snapshots").glob("*"), key=lambda p: (len(p.name), p))  # step-9, step-10
        for folder in (stage.path / "model", *snapshots):
            if (folder / "config.json").is_file():
                at = folder.resolve()
                shown = at.relative_to(record.path) if at.is_relative_to(record.path) else at
                out.append((stage.name, str(shown), sum(f.stat().st_size for f in at.rglob("*") if f.is_file())))
    return out


def seconds(value: float) -> str:
    """A duration in words."""
    minutes, rest = divmod(round(value), 60)
    if minutes == 0:
        return f"{value:.1f} s" if value < 10 else f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(value: float) -> str:
    """Bytes in words."""
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def count(value: Any) -> str:
    """A number of rows, or a dash."""
    return f"{value:,.0f}" if is_number(value) else "–"


def clip(text: str) -> str:
    """A text of bounded length; what is missing is said."""
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} … ({len(text) - MAX_TEXT:,} characters more)"
