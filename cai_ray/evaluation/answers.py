"""Answers of several models to the same held-out prompts: their rows, their scores, what is said of them."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from cai_ray.evaluation.statistics import looks_like_refusal, mean_interval, win_rate
from cai_ray.records import PROMPT, Row, to_table

ANSWER = pa.schema(
    [*PROMPT, ("model", pa.string()), ("response", pa.string()), ("seed", pa.int64()), ("flags", pa.list_(pa.string()))]
)
SCORED = pa.schema([*ANSWER, ("score", pa.float64())])
BATCH = 8  # answers that are scored together
MAX_TOKENS = 1 << 20  # nothing is cut here: what was sampled fits the model


class Scorer:
    """Scores answers with the preference model, in a Ray Data actor."""

    def __init__(self, reward: str, gpu: bool):
        import torch

        from cai_ray.models.checkpoints import load_scalar_model
        from cai_ray.models.tokenization import Tokenizer

        self._device = torch.device("cuda" if gpu else "cpu")
        self._tokenizer = Tokenizer.load(Path(reward))
        self._model: Any = load_scalar_model(Path(reward), torch.float32).eval()
        self._model.to(self._device)

    def __call__(self, table: pa.Table) -> pa.Table:
        """The table with a `score` column: raw scores, in the preference model's own units."""
        import torch

        from cai_ray.models.scalar import document_scores
        from cai_ray.models.tokenization import preference_input

        tok, rows = self._tokenizer, table.to_pylist()
        inputs = []
        for row in rows:
            prompt, response = tok.prompt(row["messages"]), tok.response(row["response"])
            inputs.append(torch.tensor(preference_input(prompt, response, tok.eos_id, MAX_TOKENS)))
        order = sorted(range(len(rows)), key=lambda i: len(inputs[i]))  # neighbours in length share a batch
        scores = [0.0] * len(rows)
        with torch.inference_mode():
            for first in range(0, len(order), BATCH):
                chosen = order[first : first + BATCH]
                ids_1T = torch.cat([inputs[i] for i in chosen])[None].to(self._device)
                scores_B = document_scores(self._model, ids_1T, [len(inputs[i]) for i in chosen])
                for i, score in zip(chosen, scores_B.tolist(), strict=True):
                    scores[i] = score
        return to_table(({**r, "score": s} for r, s in zip(rows, scores, strict=True)), SCORED)


def summary(rows: list[Row], prefix: str) -> dict[str, Any]:
    """Mean score with its interval, refusals, length and truncation of one model's answers of one kind."""
    if not rows:
        return {}
    mean, low, high = mean_interval([r["score"] for r in rows])
    return {
        f"{prefix}/score": mean,
        f"{prefix}/score_low": low,
        f"{prefix}/score_high": high,
        f"{prefix}/refusals": sum(looks_like_refusal(r["response"]) for r in rows) / len(rows),
        f"{prefix}/words": sum(len(r["response"].split()) for r in rows) / len(rows),
        f"{prefix}/truncated": sum(bool(r["flags"]) for r in rows) / len(rows),
        f"{prefix}/prompts": len(rows),
    }


def wins(answers: list[Row], policy: str, other: str) -> dict[str, float]:
    """How often the policy's answer scores above another model's to the same prompt, with its interval."""
    ours = {r["id"]: r["score"] for r in answers if r["model"] == policy}
    theirs = {r["id"]: r["score"] for r in answers if r["model"] == other}
    both = sorted(ours.keys() & theirs.keys())
    mean, low, high = mean_interval(win_rate([ours[i] for i in both], [theirs[i] for i in both]))
    key = f"{policy}/wins_over_{other}"
    return {key: mean, f"{key}_low": low, f"{key}_high": high}
