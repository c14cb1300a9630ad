"""A run directory as the stages leave it, with hostile text in every place where users and models write."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cai_ray.artifacts import RunDir, StageDir, StageKey
from cai_ray.records import LABELED_PAIR, to_table

HOSTILE = '</pre></details><script>alert("x")</script><img src=https://evil.example/a onerror=y> {{ 7 * 7 }} $x$ & "'
TURNS = [{"role": "user", "content": f"question {HOSTILE}"}]
HEAD = {"messages": TURNS, "kind": "harmful", "source": "starter:red_team", "split": "train"}
VOTE = {
    "principle_id": "kind-1",
    "swapped": True,
    "logprob_a": -1.0,
    "logprob_b": -0.5,
    "prob": 0.6,
    "rationale": HOSTILE,
}
ROUND = {"principle_id": "kind-1", "critique": f"critique {HOSTILE}", "revision": f"revision {HOSTILE}"}


def commit(out: StageDir, inputs: dict[str, StageDir], metrics: dict, config: dict | None = None, **parts) -> None:
    shas = {name: other.manifest().sha256 for name, other in inputs.items()}
    out.path.mkdir(parents=True, exist_ok=True)
    (out.path / "key.json").write_text("{}")
    out.phases["generate"] = 75.0
    out.commit(StageKey(config or {}, {"seed": 7, **parts}, shas), metrics)


@pytest.fixture
def half_run(tmp_path: Path) -> RunDir:
    """Prompts, revisions and SL model; sample_pairs was begun."""
    run = RunDir(tmp_path / "demo")
    stages = {name: run.stage(name, 7) for name in ("prompts", "revise", "sft", "sample_pairs")}
    prompts, revise, sft, pairs = stages.values()
    prompts.path.mkdir(parents=True)
    prompts.quarantine_path.write_text(
        '{"id": "f:3", "reason": "12 words <script>"}\n{"id": "f:4", "reason": "9 words <script>"}\n'
    )
    commit(
        prompts,
        {},
        {"raw_rows": 42, "rows": 40, "quarantined": 2},
        {"harmful": [{"path": "starter:red_team"}]},
        files={},
    )
    revise.sample({**HEAD, "id": "r1", "initial_response": f"initial {HOSTILE}", "rounds": [ROUND], "flags": []})
    metrics = {"rows_in": 40, "rows_out": 40, "quarantined": 0, "harmful": 30, "helpful": 10, "rounds": 2}
    metrics["flag/truncated:revision"] = 45
    commit(revise, {"prompts": prompts}, metrics, models={"helpful": "embedded@main"}, principles="ab" * 32)
    for step in range(6):
        sft.metrics(step, {"train/loss": 3.0 - step / 4})
    sft.metrics(0, {"eval/loss": 3.1})
    sft.metrics(5, {"eval/loss": 1.9})
    sft.model.mkdir()
    (sft.model / "config.json").write_text("{}")
    commit(sft, {"revise": revise}, {"eval/loss": 1.9}, models={"pretrained": "embedded@main"})
    pairs.path.mkdir()
    (pairs.path / "key.json").write_text("{}")
    (run.path / "config.yaml").write_text("constitution: {critique: {file: default}, feedback: {file: '<i>mine'}}\n")
    return run


@pytest.fixture
def full_run(half_run: RunDir) -> RunDir:
    """All stages done, with a judge at chance."""
    run = half_run
    names = ("prompts", "revise", "sft", "sample_pairs", "label", "preference_model", "ppo", "evaluate")
    prompts, _, sft, pairs, label, pm, ppo, evaluate = (run.stage(name, 7) for name in names)
    pair = {**HEAD, "response_a": f"left {HOSTILE}", "response_b": "right \ud800", "seed": 7, "flags": []}
    with (pairs.path / "samples.jsonl").open("w") as f:
        f.write(json.dumps({**pair, "id": "p1"}) + "\n")  # half of a surrogate pair survives JSON as an escape
    commit(pairs, {"prompts": prompts, "sft": sft}, {"rows_in": 30, "rows_out": 30, "pairs": 90, "truncated": 0.1})
    labeled = [
        {**pair, "response_b": "right", "id": f"p{k}", "label_prob": 0.48 + k / 500, "votes": [VOTE]} for k in range(30)
    ]
    label.data.mkdir(parents=True)
    pq.write_table(to_table(labeled, LABELED_PAIR), label.data / "part-00000.parquet")
    label.sample(labeled[0])
    commit(
        label,
        {"sample_pairs": pairs},
        {"rows_out": 30, "mean_entropy": 0.69, "prefers_first": 0.9, "prefers_letter_a": 0.9},
        principles="cd" * 32,
    )
    for step in range(4):
        pm.metrics(step, {"train/loss": 0.7 - step / 50, "eval/accuracy": 0.5 + step / 100})
    commit(pm, {"label": label}, {"eval/accuracy": 0.53})
    for step in range(25):
        ppo.metrics(step, {"objective/score": step / 10, "objective/kl": step / 5, "rollout/logprob_gap": 0.06})
        ppo.sample(
            {"step": step, "kind": "harmful", "prompt": HOSTILE, "response": f"try {step} {HOSTILE}", "score": 0.1}
        )
    commit(ppo, {"sft": sft, "preference_model": pm}, {"prompts": 40})
    metrics: dict[str, float] = {"rows_in": 8, "rows_out": 8}
    for name, score in (("helpful", -0.5), ("ppo", 1.25)):
        evaluate.sample(
            {**HEAD, "id": "e1", "model": name, "response": f"{name} says {HOSTILE}", "score": score, "flags": []}
        )
        prefix = f"{name}/harmful"
        metrics |= {f"{prefix}/score": score, f"{prefix}/score_low": score - 0.25, f"{prefix}/score_high": score + 0.25}
        metrics |= {f"{prefix}/refusals": 0.5, f"{prefix}/prompts": 4}
    wins = "ppo/wins_over_helpful"
    commit(evaluate, {"ppo": ppo}, {**metrics, wins: 0.75, f"{wins}_low": 0.5, f"{wins}_high": 0.95})
    return run
