"""How fast `revise` and `label` are beside vLLM alone.

    python -m tests.bench.generation [--rows 200] [--task label] [--rounds 3]

Each arm runs in a process of its own with the same engine arguments, threads, token ids and sampling: the stage's
program under Ray Data, as a run has it, notes every request that its rows make; `raw` gives `vllm.LLM.generate` all of
them at once, although a critique needs the response before it; `barrier` gives them step after step. Throughput counts
tokens read and written between the first request and the last result, after a few other rows have gone the same way:
the starts of engine and Ray's workers are outside, as in a run whose stages share both. The gain of the prefix cache is
that of a labelling with five examples over the same requests of 48 of its rows without the cache.

With several rounds every arm runs again in turn, and ratios are of mean rates: on a shared machine one round scatters
by a tenth. The last line is one JSON object: label_over_raw, revise_over_raw, revise_over_barrier, label_cache_gain,
each arm's rates, round by round, and the settings.
"""

import argparse
import asyncio
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NEW_TOKENS, ROUNDS, FEW_SHOTS, UNCACHED_ROWS, WARM_UP = 32, 2, 5, 48, 48
THREADS = os.cpu_count() or 1
MAX_LEN = {"revise": 1024, "label": 1024, "shots": 3072}
ARMS = (  # name, task, how
    ("revise", "revise", "stage"),
    ("revise_raw", "revise", "raw"),
    ("revise_barrier", "revise", "barrier"),
    ("label", "label", "stage"),
    ("label_raw", "label", "raw"),
    ("shots", "shots", "stage"),
    ("shots_uncached", "shots", "uncached"),
)
RATIOS = {
    "label_over_raw": ("label", "label_raw"),
    "revise_over_raw": ("revise", "revise_raw"),
    "revise_over_barrier": ("revise", "revise_barrier"),
    "label_cache_gain": ("shots", "shots_uncached"),
}


# ---- the stage's own arm --------------------------------------------------------------------------------------------


@dataclass
class Recorder:
    """An engine that notes what it is asked, and when."""

    engine: Any
    requests: list[Any]
    first: float = 0.0

    @property
    def tokenizer(self) -> Any:
        return self.engine.tokenizer

    async def ask(self, request: Any) -> Any:
        from cai_ray.generation.engine import Request

        self.first = self.first or time.time()
        done = await self.engine.ask(request)
        self.requests.append((request, len(done.ids) if isinstance(request, Request) else 1))
        return done


@dataclass(frozen=True)
class Recorded:
    """A stage's program whose requests are kept, a file a row."""

    program: Any
    folder: Path

    @property
    def schema(self) -> Any:
        return self.program.schema

    async def __call__(self, row: Any, engine: Any) -> Any:
        recorder = Recorder(engine, [])
        done = await self.program(row, recorder)
        note = pickle.dumps((recorder.requests, recorder.first, time.time()))
        await asyncio.get_running_loop().run_in_executor(None, (self.folder / row["id"]).write_bytes, note)
        return done


def stage(task: str, rows: int, folder: Path) -> dict[str, float]:
    """Runs the program under Ray Data; leaves the rows' requests in `folder`."""
    import ray

    from cai_ray.artifacts import StageDir
    from cai_ray.cluster import start_ray
    from cai_ray.config import LabelConfig, ReviseConfig
    from cai_ray.config_files import load_config
    from cai_ray.constitution import load_constitution
    from cai_ray.generation.data_plane import MapSettings, map_rows
    from cai_ray.generation.pool import EnginePool
    from cai_ray.models import embedded_model
    from cai_ray.records import PROMPT, RESPONSE_PAIR
    from cai_ray.stages.label import LabelPair
    from cai_ray.stages.revise import ReviseRow
    from cai_ray.stages.shared import write_rows

    constitution = load_constitution("default")
    if task == "revise":
        limits = {"max_new_tokens": NEW_TOKENS, "max_critique_tokens": NEW_TOKENS, "max_prompt_tokens": 900}
        program: Any = ReviseRow(ReviseConfig(rounds=ROUNDS, few_shots=0, unusable="keep", **limits), constitution, 0)
    else:
        few_shots = FEW_SHOTS if task == "shots" else 0
        program = LabelPair(LabelConfig(few_shots=few_shots, max_prompt_tokens=MAX_LEN[task] - 8), constitution, 0)
        assert len(program.shots) == few_shots
    source = prompts(rows) if task == "revise" else pairs(rows)
    schema = PROMPT if task == "revise" else RESPONSE_PAIR
    inputs = write_rows(source, schema, folder / "inputs")
    config = load_config("quickstart")
    start_ray(config.cluster.joined)
    pool = EnginePool(config.cluster, "cpu", folder / "logs")

    def engines() -> list[Any]:
        return pool.engines(embedded_model(), dtype="float32", max_model_len=MAX_LEN[task])

    def run(inputs: Path, name: str) -> Any:
        (folder / name).mkdir()
        recorded = Recorded(program, folder / name)
        return map_rows(inputs, recorded, engines, StageDir(folder / f"stage-{name}"), settings=settings)

    settings = MapSettings(
        config.cluster.rows_per_block, 1.0, 600, lambda: nullcontext(lambda done, total, words: None)
    )
    run(write_rows([backwards(row) for row in source[:WARM_UP]], schema, folder / "warm-up"), "warm")
    began = time.monotonic()
    counts = run(inputs, "requests")
    wall = time.monotonic() - began
    pool.release()
    ray.shutdown()
    noted = requests_of(folder)
    span = max(last for _, _, last in noted) - min(first for _, first, _ in noted)
    return rates([r for requests, _, _ in noted for r in requests], span) | {
        "wall_s": wall,
        "rows": counts["rows_out"],
        "quarantined": counts["quarantined"],
    }


def prompts(rows: int) -> list[Any]:
    """`Prompt` rows of the starter data, all of which count as harmful here."""
    from cai_ray.config import Source
    from cai_ray.sources import read_rows, to_prompts

    found = {}
    for name in ("red_team", "helpful"):
        source = Source(path=f"starter:{name}")
        for raw in read_rows(source):
            assert isinstance(raw, dict)
            found |= {p["id"]: p for p in to_prompts(raw, "harmful", source)}
    assert len(found) >= rows, f"the starter data holds {len(found)} prompts"
    return sorted(found.values(), key=lambda p: p["id"])[:rows]


def pairs(rows: int) -> list[Any]:
    """`ResponsePair` rows of the starter comparisons."""
    from cai_ray.config import Source
    from cai_ray.sources import read_comparisons

    found, *_ = read_comparisons(Source(path="starter:helpful_comparisons", limit=rows))
    assert len(found) == rows, f"the starter data holds {len(found)} comparisons"
    return found


def backwards(row: Any) -> Any:
    """A row of the same size that shares no prefix with it."""
    return {**row, "messages": [{**m, "content": m["content"][::-1]} for m in row["messages"]]}


def requests_of(folder: Path) -> list[tuple[list[Any], float, float]]:
    """What each row asked, with the times of its first request and of its end."""
    return [pickle.loads(path.read_bytes()) for path in sorted((folder / "requests").iterdir())]


def rates(requests: list[tuple[Any, int]], seconds: float) -> dict[str, float]:
    """Tokens and their rate."""
    read, written = sum(len(r.prompt_ids) for r, _ in requests), sum(n for _, n in requests)
    return {
        "requests": len(requests),
        "tokens_in": read,
        "tokens_out": written,
        "seconds": seconds,
        "tokens_per_s": (read + written) / seconds,
    }


# ---- vLLM alone -----------------------------------------------------------------------------------------------------


def alone(task: str, how: str, folder: Path) -> dict[str, float]:
    """The same requests through `vllm.LLM.generate`: all at once, step after step, or without a prefix cache."""
    from cai_ray.config_files import load_config
    from cai_ray.generation.engine import Engine, _set_environment
    from cai_ray.models import embedded_model
    from cai_ray.models.tokenization import Tokenizer

    _set_environment("cpu", THREADS)
    import torch
    from vllm import LLM
    from vllm.inputs import TokensPrompt

    torch.set_num_threads(THREADS)
    cluster = load_config("quickstart").cluster
    llm = LLM(
        model=str(embedded_model()),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=MAX_LEN[task],
        max_num_seqs=cluster.max_num_seqs,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        enable_prefix_caching=how != "uncached",
        enforce_eager=True,
        kv_cache_memory_bytes=int(cluster.kv_cache_gib * 2**30),
        enable_chunked_prefill=False,
        max_num_batched_tokens=max(2048, MAX_LEN[task]),
    )
    asker: Any = SimpleNamespace(tokenizer=Tokenizer.load(embedded_model()))  # whose EOS end a text
    rows = [[r for r, _ in requests] for requests, _, _ in requests_of(folder)]
    if how == "uncached":
        rows = rows[:UNCACHED_ROWS]
    warm_up = [TokensPrompt(prompt_token_ids=list(row[0].prompt_ids)[::-1]) for row in rows[:WARM_UP]]
    llm.generate(warm_up, [Engine._params(asker, row[0]) for row in rows[:WARM_UP]], use_tqdm=False)
    steps = zip(*rows, strict=True) if how == "barrier" else [[r for row in rows for r in row]]
    done: list[tuple[Any, int]] = []
    began = time.monotonic()
    for step in steps:
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=list(r.prompt_ids)) for r in step],
            [Engine._params(asker, r) for r in step],
            use_tqdm=False,
        )
        done += [(r, len(o.outputs[0].token_ids)) for r, o in zip(step, outputs, strict=True)]
    return rates(done, time.monotonic() - began)


# ---- all arms -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Runs every arm in turn and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=200, help="prompts, and comparisons")
    parser.add_argument("--task", choices=("revise", "label", "shots"), help="only this one's arms")
    parser.add_argument("--rounds", type=int, default=1, help="times that each arm runs")
    parser.add_argument("--arm", nargs=3, metavar=("TASK", "HOW", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        task, how, folder = options.arm[0], options.arm[1], Path(options.arm[2])
        found = stage(task, options.rows, folder) if how == "stage" else alone(task, how, folder)
        (folder / f"{how}.json").write_text(json.dumps(found))
        return
    arms = [arm for arm in ARMS if options.task in (None, arm[1])]
    results: dict[str, list[dict[str, float]]] = {name: [] for name, _, _ in arms}
    with tempfile.TemporaryDirectory() as root:
        for turn, (name, task, how) in ((t, arm) for t in range(options.rounds) for arm in arms):
            folder = Path(root) / f"{task}-{turn}"
            folder.mkdir(exist_ok=True)
            command = [sys.executable, "-m", "tests.bench.generation", "--rows", str(options.rows), "--arm"]
            with (folder / f"{how}.log").open("w") as log:
                done = subprocess.run([*command, task, how, str(folder)], stdout=log, stderr=log, check=False)
            if done.returncode:
                sys.exit(f"{name} failed:\n" + (folder / f"{how}.log").read_text()[-3000:])
            results[name].append(found := json.loads((folder / f"{how}.json").read_text()))
            print(f"{name}: {found['tokens_per_s']:.0f} tokens/s, {found['seconds']:.0f} s", flush=True)
    rate = {name: sum(r["tokens_per_s"] for r in rounds) / len(rounds) for name, rounds in results.items()}
    settings = {"rows": options.rows, "rounds": options.rounds, "new_tokens": NEW_TOKENS}
    settings |= {"revision_rounds": ROUNDS, "few_shots": FEW_SHOTS}
    print(
        json.dumps(
            {
                **{name: rate[a] / rate[b] for name, (a, b) in RATIOS.items() if a in rate},
                "settings": settings | {"model": "SmolLM2-135M-Instruct", "dtype": "float32", "threads": THREADS},
                "arms": results,
            }
        )
    )


if __name__ == "__main__":
    main()
