"""A step's rollouts: which prompts, how they are sampled, and how they are kept."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cai_ray.config import PPOConfig
from cai_ray.errors import DataError, StageFailed
from cai_ray.generation.actor import BAD
from cai_ray.generation.engine import Request
from cai_ray.models.tokenization import Tokenizer
from cai_ray.records import PROMPT, Row, derive_seed, to_table
from cai_ray.rl.batches import row_lengths
from cai_ray.templates import STOP_PLAIN

_INT, _TEXT = pa.int32(), pa.string()
_HEAD = [("row", _INT), ("id", _TEXT), ("prompt_id", _TEXT), ("step", _INT), ("kind", _TEXT)]  # row: 0 ... B - 1
REQUESTS = pa.schema([*_HEAD, PROMPT.field("messages"), ("seed", pa.int64())])
ROLLOUTS = pa.schema(
    [
        *_HEAD,
        PROMPT.field("messages"),
        ("prompt", pa.string()),  # the user's last turn, for a reader
        ("response", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),  # EOS included
        ("rollout_logprobs", pa.list_(pa.float32())),
        ("ended", pa.bool_()),
        ("version", pa.int32()),  # of the engine's weights: the step
    ]
)


# ---- prompts --------------------------------------------------------------------------------------------------------


def prompts_of_steps(
    prompts: Sequence[Row], config: PPOConfig, seed: int, tokenizer: Tokenizer
) -> tuple[list[list[Row]], list[dict[str, str]], int]:
    """The prompts of every step; which could not be used (id, reason); how many were looked at, as the run reaches.

    The order of an epoch is a hash of (seed, id, epoch). A step's prompts depend on nothing but the arguments, so the
    step's number is the prompt cursor. With `helpful_fraction` each kind has epochs of its own, and the share holds
    over steps to within one prompt.

    Raises:
        DataError: no prompt of a kind that is wanted fits.
    """
    limit, share = config.max_prompt_tokens, config.helpful_fraction
    reasons: dict[str, str] = {}

    def fits(row: Row) -> bool:
        if (key := row["id"]) not in reasons:
            try:
                size = len(tokenizer.prompt(row["messages"]))
                reasons[key] = f"the prompt has {size} tokens, more than {limit}" if size > limit else ""
            except DataError as e:
                reasons[key] = e.message
        return not reasons[key]

    size = config.rollout_batch_size // config.samples_per_prompt
    if share is None:
        every = _endless(prompts, seed, fits)
        steps = [list(islice(every, size)) for _ in range(config.steps)]
    else:
        kinds = ([p for p in prompts if p["kind"] == kind] for kind in ("helpful", "harmful"))
        helpful, harmful = (_endless(rows, seed, fits) for rows in kinds)
        before = [math.floor(step * size * share + 0.5) for step in range(config.steps + 1)]  # helpful ones
        counts = [end - begin for begin, end in pairwise(before)]
        steps = [[*islice(helpful, count), *islice(harmful, size - count)] for count in counts]
    return steps, [{"id": key, "reason": why} for key, why in sorted(reasons.items()) if why], len(reasons)


def _endless(rows: Sequence[Row], seed: int, fits: Callable[[Row], bool]) -> Iterator[Row]:
    epoch, found = 0, True
    while found:
        found = False
        for row in sorted(rows, key=lambda r: (derive_seed(seed, r["id"], f"ppo/order/{epoch}"), r["id"])):
            if fits(row):
                found = True
                yield row
        epoch += 1
    raise DataError(
        f"none of {len(rows)} prompts fits into ppo.max_prompt_tokens",
        "raise ppo.max_prompt_tokens, or give prompts of every kind that ppo.helpful_fraction asks for, "
        "and held-out ones where ppo.evaluate_every asks for them",
    )


def requests(prompts: Sequence[Row], config: PPOConfig, seed: int, step: int) -> pa.Table:
    """What the engines are asked in a step (schema REQUESTS); each response's seed is (seed, id, step, sample)."""
    seen: Counter[str] = Counter()
    rows = []
    for prompt in (p for p in prompts for _ in range(config.samples_per_prompt)):
        sample, key = seen[prompt["id"]], prompt["id"]  # a prompt that comes twice in a step is one more sample
        seen[key] += 1
        own = derive_seed(seed, key, f"ppo/{step}/{sample}")
        name = {"id": f"{key}-{sample}", "prompt_id": key, "step": step}
        rows.append({**prompt, **name, "row": len(rows), "seed": own})
    return to_table(rows, REQUESTS)


@dataclass(frozen=True)
class RollOut:
    """What an engine does with one request: one response with its tokens and their log-probs."""

    config: PPOConfig

    schema = ROLLOUTS

    async def __call__(self, row: Row, engine: Any) -> Row:
        """The request's `ROLLOUTS` row."""
        tokenizer = engine.tokenizer
        request = Request(
            prompt_ids=tokenizer.prompt(row["messages"]),
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            seed=row["seed"],
            stop=tuple(STOP_PLAIN) if tokenizer.format == "plain" else (),
        )
        done = await engine.ask(request)
        if not done.ids:  # a turn marker at once: a reward needs a token to stand on, so the marker stays this time
            done = await engine.ask(replace(request, stop=()))
        return {
            **row,
            "prompt": row["messages"][-1]["content"],
            "response": done.text,
            "prompt_ids": request.prompt_ids,
            "response_ids": done.ids,
            "rollout_logprobs": done.logprobs,
            "ended": done.ended,
            "version": done.version,
        }


def keep_rollouts(path: Path, asked: int, *parts: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
    """Joins what the engines returned and writes it, whole or not at all; without parts reads what was written.

    Args:
        path: parquet file of the step.
        asked: responses that were asked for.
        parts: what engines returned: tables of schema ROLLOUTS and a column that names what is wrong with a row.

    Returns the batch in the order of its rows, and what the controller may see of it.

    Raises:
        StageFailed: responses are missing.
    """
    if parts:
        batch = pa.concat_tables(parts)
        reasons = [reason for reason in batch[BAD].to_pylist() if reason]
        batch = batch.select(ROLLOUTS.names).sort_by("row")
        if reasons or batch["row"].to_pylist() != list(range(asked)):
            raise StageFailed(
                f"{asked} responses were asked for, {len(batch) - len(reasons)} came; {reasons[0] if reasons else ''}",
                "the engines' logs say more; the same command continues",
            )
        temporary = path.with_name(f".{path.name}.tmp")
        pq.write_table(batch, temporary)
        temporary.replace(path)
    else:
        batch = pq.read_table(path, schema=ROLLOUTS)
    prompts, responses = (sum(row_lengths(batch, name)) for name in ("prompt_ids", "response_ids"))
    return batch, {
        "ids": batch["id"].to_pylist(),
        "tokens": prompts + responses,
        "response_tokens": responses,
        "versions": sorted(set(batch["version"].to_pylist())),
    }
