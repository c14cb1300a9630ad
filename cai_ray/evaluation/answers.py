"""Answers of several models to the same held-out prompts: their rows, their scores, what is said of them."""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa

from cai_ray.errors import DataError
from cai_ray.evaluation.judge import wilson_interval
from cai_ray.evaluation.statistics import count_words, looks_like_refusal, mean_interval, win_rate
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
        """The table with `score`, raw, in the preference model's own units, and why a row has none in `reason`."""
        import torch

        from cai_ray.models.documents import document_scores
        from cai_ray.models.tokenization import preference_input

        tok, rows = self._tokenizer, table.to_pylist()
        inputs = {}
        for i, row in enumerate(rows):
            try:
                prompt, response = tok.prompt(row["messages"]), tok.response(row["response"])
                inputs[i] = torch.tensor(preference_input(prompt, response, tok.eos_id, MAX_TOKENS))
            except DataError as e:  # its chat template is not that of the model that answered
                row["reason"] = e.message
        order = sorted(inputs, key=lambda i: len(inputs[i]))  # neighbours in length share a batch
        with torch.inference_mode():
            for first in range(0, len(order), BATCH):
                chosen = order[first : first + BATCH]
                ids_1T = torch.cat([inputs[i] for i in chosen])[None].to(self._device)
                scores_B = document_scores(self._model, ids_1T, [len(inputs[i]) for i in chosen])
                for i, score in zip(chosen, scores_B.tolist(), strict=True):
                    rows[i]["score"] = score
        return to_table(rows, SCORED.append(pa.field("reason", pa.string())))


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
        f"{prefix}/words": sum(count_words(r["response"]) for r in rows) / len(rows),
        f"{prefix}/truncated": sum(bool(r["flags"]) for r in rows) / len(rows),
        f"{prefix}/prompts": len(rows),
    }


def wins(answers: list[Row], policy: str, other: str) -> dict[str, float]:
    """How often the policy's answer scores above another model's to the same prompt, with its interval."""
    ours = {r["id"]: r["score"] for r in answers if r["model"] == policy}
    theirs = {r["id"]: r["score"] for r in answers if r["model"] == other}
    both = sorted(ours.keys() & theirs.keys())
    won = win_rate([ours[i] for i in both], [theirs[i] for i in both])
    mean = sum(won) / len(won) if won else math.nan
    low, high = wilson_interval(mean, len(won))  # ties count as halves
    key = f"{policy}/wins_over_{other}"
    return {key: mean, f"{key}_low": low, f"{key}_high": high}
