"""One engine in this process: `cai-ray chat` and `cai-ray critique`."""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from cai_ray import pipeline
from cai_ray.artifacts import RunDir
from cai_ray.config import Cluster, ModelSpec, ReviseConfig, Sampling
from cai_ray.constitution import load_constitution
from cai_ray.errors import ConfigError
from cai_ray.models.shapes import find_shape
from cai_ray.records import Message, check_messages, row_id
from cai_ray.sources import prompt_row

CONTEXT_TOKENS = 2048


def local_engine(folder: Path) -> Any:
    """An `Engine` in this process, which the stages' programs can `ask` as they ask an engine actor."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # people talk here
    import torch

    from cai_ray.generation.engine import Engine

    gpu, longest = torch.cuda.is_available(), int(min(CONTEXT_TOKENS, find_shape(str(folder)).max_positions))
    device, dtype = ("gpu", "bfloat16") if gpu else ("cpu", "float32")
    return Engine(folder, Cluster(max_num_seqs=4), dtype=dtype, max_model_len=longest, device=device)


def model_folder(name: str) -> Path:
    """The folder of a run's policy (or its SL model when it has no policy yet), or of any model.

    Raises:
        ConfigError: a run directory without a finished model.
    """
    path = Path(name).expanduser()
    if (path / "config.yaml").is_file():
        run = RunDir(path)
        for stage in ("ppo", "sft"):
            out = run.stage(stage)
            if out.manifest():
                return out.model
        raise ConfigError(f"{name} has no finished model yet", "continue the run, or name another")
    return pipeline.model_folder(ModelSpec(path=name))


def chat_loop(model: str, max_new_tokens: int, temperature: float, seed: int) -> None:
    """Reads a person's turns from standard input and prints the model's, until an empty line or the end."""
    from cai_ray.stages.shared import ask

    folder = model_folder(model)
    print(f"loading {folder} …", file=sys.stderr)
    engine = local_engine(folder)
    limits = Sampling.model_construct(  # unchecked, for 0 is a temperature here
        max_prompt_tokens=engine.max_model_len, max_new_tokens=max_new_tokens, temperature=temperature
    )
    messages: list[Message] = []
    while text := _read_turn():
        # The new turn alone: the model may have answered nothing, and the conversation goes on.
        messages = [*messages, *check_messages([{"role": "user", "content": text}])]
        if len(engine.tokenizer.prompt(messages)) + max_new_tokens > engine.max_model_len:
            print(f"the conversation has reached {engine.max_model_len} tokens; start again", file=sys.stderr)
            return
        done = asyncio.run(ask(engine, messages, {"id": row_id(messages)}, "chat", seed, limits))
        print(done.text, flush=True)
        messages = [*messages, {"role": "assistant", "content": done.text}]


def _read_turn() -> str:
    try:
        return input("you> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def critique_once(prompt: str, response: str | None, constitution: str, model: str, seed: int) -> None:
    """Prints one critique-revision round of one prompt, as `revise` would do it, and the SFT pair that results."""
    from cai_ray.stages.revise import ReviseRow

    chosen = load_constitution(constitution)
    row = prompt_row([{"role": "user", "content": prompt}], "harmful", "terminal")
    folder = model_folder(model)
    print(f"loading {folder} …", file=sys.stderr)
    engine, config = local_engine(folder), ReviseConfig(rounds=1)
    # All the room that the engine has: few-shots alone can be a thousand tokens of a small English vocabulary.
    config = config.model_copy(update={"max_prompt_tokens": engine.max_model_len - config.max_new_tokens})
    done = asyncio.run(ReviseRow(config, chosen, seed)(row, engine, response))
    step = done["rounds"][0]
    (principle,) = (p for p in chosen.principles if p.id == step["principle_id"])
    for title, text in (
        ("prompt", prompt),
        ("response", done["initial_response"]),
        (f"principle {principle.id}", f"{principle.critique_request}\n{principle.revision_request}"),
        ("critique", step["critique"]),
        ("revision", step["revision"]),
        ("SFT pair", f"user: {prompt}\nassistant: {step['revision']}"),
    ):
        print(f"── {title} ──\n{text}\n")
