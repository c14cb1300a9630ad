"""What both sides of `ppo_vs_trl` work on (sizes, models, prompts), what a side reports, and the roofline."""

import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cai_ray.config import PPOConfig
from cai_ray.models import resolve_model
from cai_ray.models.checkpoints import load_scalar_model, save_pretrained
from cai_ray.models.shapes import find_shape
from cai_ray.models.tokenization import Tokenizer
from cai_ray.records import Row, row_id
from tests.bench.training import comparisons

THREADS = os.cpu_count() or 1
SEED, WARMUP, COUNTED = 0, 3, 3  # iterations: memory is in place after two; TRL gets faster for longer
PROMPT_TOKENS = (40, 64)  # shortest and longest prompt
EOS, PAD = "<empty_output>", "<jupyter_script>"  # tokens that the model hardly ever draws
TURN_END = "<|im_end|>"  # ends the other roles' turns, as in the model's own template
LR, BETAS, KL, CLIP, GAMMA, LAMBDA = 1e-6, (0.9, 0.95), 0.05, 0.2, 1.0, 0.95
GEMM_TOKENS, GEMM_S = 2048, 3.0


@dataclass(frozen=True)
class Size:
    """An iteration, and how much of it is in memory at once."""

    batch: int  # prompts, with one response each
    new: int  # tokens of a response
    tokens: int  # ours: most in a micro-batch; the only one is kept from logprobs and values to the update
    trl_rows: int  # theirs: responses in one backward pass
    model: str = "embedded"


SIZES = {
    "32x48": Size(32, 48, 3584, 16),
    "16x192": Size(16, 192, 4096, 8),
    "smoke": Size(4, 8, 288, 2, "tiny"),
}


def models(root: Path, name: str) -> tuple[Path, Path]:
    """Folders of policy and preference model, made where they are not there.

    The policy is the model with another token for the end of a response; the preference model has learned nothing.
    """
    from transformers import AutoTokenizer

    policy, reward, source = root / f"policy-{name}", root / f"reward-{name}", resolve_model(name)
    if reward.is_dir():
        return policy, reward
    hf: Any = AutoTokenizer.from_pretrained(source)
    assert hf.chat_template.count(f"'{TURN_END}'") == 1
    end = f"('{EOS}' if message['role'] == 'assistant' else '{TURN_END}')"
    hf.chat_template = hf.chat_template.replace(f"'{TURN_END}'", end)
    hf.eos_token, hf.pad_token = EOS, PAD
    hf.save_pretrained(policy)
    for file in ("config.json", "generation_config.json"):
        ids = {"eos_token_id": hf.eos_token_id, "pad_token_id": hf.pad_token_id}
        (policy / file).write_text(json.dumps(json.loads((source / file).read_text()) | ids))
    for weights in source.glob("*.safetensors"):
        (policy / weights.name).symlink_to(weights)
    model, tokenizer = load_scalar_model(policy, "float32", seed=1), Tokenizer.load(policy)
    assert tokenizer.eos_ids == {hf.eos_token_id}
    model.config.reward_mean, model.config.reward_std = 0.25, 2.0
    save_pretrained(model.state_dict().items(), model.config, tokenizer, reward)
    return policy, reward


def prompts(size: Size, policy: Path, config: PPOConfig) -> tuple[list[Any], list[list[list[int]]]]:
    """`Prompt` rows, no more than are needed, and the token ids of each iteration's prompts."""
    from cai_ray.rl.rollouts import prompts_of_steps

    tokenizer, found, (low, high) = Tokenizer.load(policy), {}, PROMPT_TOKENS
    for pair in comparisons():
        turn = pair["messages"][:1]
        key = row_id(turn[0]["content"])
        if key not in found and low <= len(tokenizer.prompt(turn)) <= high:
            found[key] = {"id": key, "messages": turn, "kind": "harmful", "source": "hh", "split": "train"}
    rows = [found[key] for key in sorted(found)][: size.batch * (WARMUP + COUNTED)]
    assert len(rows) == size.batch * (WARMUP + COUNTED)
    steps, *_ = prompts_of_steps(rows, config, SEED, tokenizer)
    return rows, [[tokenizer.prompt(row["messages"]) for row in step] for step in steps]


@dataclass
class Iteration:
    """What one took, and its work; real tokens only."""

    seconds: float
    prompt_tokens: int
    new_tokens: int
    ended: int  # responses that ended of themselves
    phases: dict[str, float] = field(default_factory=dict)


def prompt_rows(texts: Iterable[str], kind: str) -> list[Row]:
    """`Prompt` rows of one user turn each."""
    same = {"kind": kind, "source": "bench", "split": "train"}
    return [{**same, "id": row_id(text), "messages": [{"role": "user", "content": text}]} for text in texts]


def rates(size: Size, counted: Sequence[Iteration]) -> dict[str, Any]:
    """Rates over all counted iterations, and the phases' mean seconds."""
    seconds, new = sum(i.seconds for i in counted), sum(i.new_tokens for i in counted)
    tokens, n = new + sum(i.prompt_tokens for i in counted), len(counted)
    return {
        "iterations": [i.seconds for i in counted],
        "samples_per_s": size.batch * n / seconds,
        "new_tokens_per_s": new / seconds,
        "tokens_per_s": tokens / seconds,
        "tokens_an_iteration": tokens / n,
        "ended": sum(i.ended for i in counted),
        "phases": {name: sum(i.phases[name] for i in counted) / n for name in counted[0].phases},
    }


def gemm_flops(name: str) -> float:
    """Best rate of an MLP projection in float32, FLOP/s."""
    import torch

    torch.set_num_threads(THREADS)
    shape, best = find_shape(name), float("inf")
    x_TH, weight_IH = (torch.randn(n, int(shape.hidden)) for n in (GEMM_TOKENS, int(shape.intermediate)))
    end = time.perf_counter() + GEMM_S
    while (begun := time.perf_counter()) < end:
        torch.nn.functional.linear(x_TH, weight_IH)
        best = min(best, time.perf_counter() - begun)
    return 2 * GEMM_TOKENS * shape.intermediate * shape.hidden / best


def needed_flops(name: str, done: Iteration) -> float:
    """FLOPs of the passes that an iteration cannot do without."""
    shape = find_shape(name)
    head = shape.vocab * shape.hidden
    layers = shape.parameters - head  # the embedding is the head, and counted once
    passes, with_head = 1 + 1 + 1 + 3 + 3, 1 + 1 + 3
    return 2 * (layers * passes * (done.prompt_tokens + done.new_tokens) + head * with_head * done.new_tokens)
