"""How fast `sft` and `preference_model` train beside TRL's trainers, and what the loop costs over a bare torch step.

    python -m tests.bench.training [--only sft] [--rounds 2] [--keep FOLDER]

The model is SmolLM2-135M-Instruct in float32, the data are harmless-base comparisons of HH, the threads are the cores.
Each arm runs in a process of its own, ours and theirs in turn; both read the same token ids and log every step; the
first step, which warms up, is not counted. `sft` is `run_training` as a run has it, `sft_trl` is TRL's SFTTrainer with
packing (bfd, 1,024 tokens, four packs a step, loss on the answers, chunked); `pm` and `pm_trl` (RewardTrainer) train on
pairs that share prompts. `loop` and `bare` take the same steps of 16 rows of 256 tokens: `run_training` at ZeRO-0, and
forward, backward, clipping and AdamW in plain torch with the same module. Memory is the training process's peak RSS.

With --keep, results lie in FOLDER and arms that are there already are not run again. The last line is one JSON object:
sft_over_trl, pm_over_trl (rates, ours over theirs), loop_overhead (seconds over the bare step's, minus 1),
memory_over_bare, the settings and each arm's rates.
"""

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tests.conftest import DEFAULT_DATA

THREADS = os.cpu_count() or 1
SEED, LR, MAX_TOKENS, PACK_TOKENS, MICRO_TOKENS = 0, 1e-5, 768, 1024, 4096
SFT_ROWS, SFT_BATCH = 92, 23  # four steps of about 4,000 tokens
PAIRS, PAIR_BATCH, PAIR_TOKENS, PAIRS_AT_ONCE = 64, 16, 384, 4
LOOP_STEPS, LOOP_BATCH, LOOP_TOKENS = 4, 16, 256
ARMS = {"sft": ("sft", "sft_trl"), "pm": ("pm", "pm_trl"), "loop": ("loop", "bare")}
OPTIM = {"lr": LR, "betas": (0.9, 0.95), "max_grad_norm": 1.0}


# ---- data -----------------------------------------------------------------------------------------------------------


def comparisons() -> list[Any]:
    """`LabeledPair` rows of HH's harmless-base test split, sorted by id, all of them of the train split."""
    from cai_ray.config import Source
    from cai_ray.errors import DataError
    from cai_ray.sources import to_comparison

    data = Path(os.environ.get("CAI_RAY_TEST_DATA") or DEFAULT_DATA)
    found = {}
    with gzip.open(data / "hh-rlhf" / "harmless-base_test.jsonl.gz", "rt") as lines:
        for line in lines:
            try:
                row = to_comparison(json.loads(line), Source(path="hh"))
            except DataError:
                continue
            found[row["id"]] = row | {"split": "train"}
    return [found[name] for name in sorted(found)]


def rows_of(arm: str, tokenizer: Any) -> list[Any]:
    """The arm's rows; `Revision` rows teach the chosen response as a helpful sample."""
    pair_arm, low, high = arm.startswith("pm"), 0, PAIR_TOKENS if arm.startswith("pm") else MAX_TOKENS
    if arm in ("loop", "bare"):
        low, high = LOOP_TOKENS, MAX_TOKENS

    def fits(row: Any) -> bool:
        prompt = len(tokenizer.prompt(row["messages"]))
        return all(low <= prompt + len(tokenizer.response(row[k])) < high for k in ("response_a", "response_b"))

    count = {"sft": SFT_ROWS, "pm": PAIRS}.get(arm.split("_")[0], LOOP_STEPS * LOOP_BATCH)
    rows = list(islice(filter(fits, comparisons()), count))
    assert len(rows) == count
    if pair_arm:
        return rows
    return [r | {"kind": "helpful", "initial_response": r["response_a"], "rounds": []} for r in rows]


def config_of(arm: str) -> Any:
    """The stage's configuration for an arm."""
    from cai_ray.config import Optim, PreferenceModelConfig, SftConfig, Sharding

    micro_tokens = PACK_TOKENS if arm.startswith("sft") else MICRO_TOKENS  # TRL's packs go one at a time
    sharding = Sharding(ranks=1, dtype="float32", microbatch_tokens=micro_tokens, cpus_per_rank=THREADS)
    common: dict[str, Any] = {"optim": Optim(**OPTIM), "sharding": sharding, "checkpoint_every": 1000}
    if arm.startswith("pm"):
        return PreferenceModelConfig(batch_size=PAIR_BATCH, max_tokens=MAX_TOKENS, **common)
    if arm in ("loop", "bare"):
        return SftConfig(batch_size=LOOP_BATCH, max_tokens=LOOP_TOKENS, **common)
    return SftConfig(batch_size=SFT_BATCH, max_tokens=MAX_TOKENS, **common)


def examples_of(arm: str) -> list[Any]:
    """The arm's examples, sorted by id as the loop has them."""
    from cai_ray.models import embedded_model
    from cai_ray.models.tokenization import Tokenizer
    from cai_ray.training import preference, sft

    tokenizer, task = Tokenizer.load(embedded_model()), preference if arm.startswith("pm") else sft
    made = [e for row in rows_of(arm, tokenizer) for e in task.examples(row, tokenizer, config_of(arm))]
    return sorted(made, key=lambda e: e.id)


@dataclass
class Mark:
    """The end of a step: when, and tokens and pairs (or rows) trained on until then."""

    time: float
    tokens: int
    rows: int


def rates(marks: Sequence[Mark], peak_gib: float) -> dict[str, float]:
    """Rates over all steps but the first."""
    first, last = marks[0], marks[-1]
    seconds = last.time - first.time
    return {
        "steps": len(marks) - 1,
        "seconds": seconds,
        "tokens_per_s": (last.tokens - first.tokens) / seconds,
        "rows_per_s": (last.rows - first.rows) / seconds,
        "peak_rss_gib": peak_gib,
    }


def peak_rss_gib(pid: str = "self") -> float:
    """The largest resident set that a process has had."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 2**20 if found else 0.0


# ---- ours -----------------------------------------------------------------------------------------------------------


def ours(arm: str, folder: Path) -> dict[str, float]:
    """`run_training` under Ray, as a stage calls it."""
    import ray

    from cai_ray.artifacts import StageDir
    from cai_ray.cluster import start_ray
    from cai_ray.config_files import load_config
    from cai_ray.models import embedded_model
    from cai_ray.models.tokenization import Tokenizer
    from cai_ray.records import LABELED_PAIR, REVISION
    from cai_ray.stages.shared import write_rows
    from cai_ray.training.batches import step_rows
    from cai_ray.training.launch import Job, run_training

    config, kind = config_of(arm), "preference_model" if arm == "pm" else "sft"
    rows = rows_of(arm, Tokenizer.load(embedded_model()))
    inputs = write_rows(rows, LABELED_PAIR if arm == "pm" else REVISION, folder / "rows")
    out = StageDir(folder / "stage", SEED)
    job = Job(kind, config, embedded_model(), "auto", (inputs,), out.path, SEED, "cpu", 0.0, 600, 600)
    start_ray(load_config("quickstart").cluster.joined)
    peak = 0.0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        log = out.logs / "rank-0.log"
        while not done.wait(0.2):
            pids = re.findall(r"process (\d+)", log.read_text()) if log.is_file() else []
            if pids and Path(f"/proc/{pids[-1]}").is_dir():
                peak = max(peak, peak_rss_gib(pids[-1]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run_training(job, out)
    finally:
        done.set()
        watcher.join()
        ray.shutdown()
    lines = [json.loads(line) for line in (out.path / "metrics.jsonl").read_text().splitlines()]
    times = [line["time"] for line in lines if "train/loss" in line]
    examples, marks = examples_of(arm), []
    tokens = count = 0
    steps = step_rows([e.id for e in examples], SEED, config.epochs, config.batch_size)
    for at, (_, step) in zip(times, steps, strict=True):
        tokens, count = tokens + sum(examples[i].tokens for i in step), count + len(step)
        marks.append(Mark(at, tokens, count))
    return rates(marks, peak)


# ---- theirs ---------------------------------------------------------------------------------------------------------


def trl(arm: str, folder: Path) -> dict[str, float]:
    """TRL's trainer on the same token ids."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    from cai_ray.models import embedded_model
    from cai_ray.models.checkpoints import load_causal_lm, load_scalar_model
    from cai_ray.models.tokenization import Tokenizer

    torch.set_num_threads(THREADS)
    examples, hf = examples_of(arm), Tokenizer.load(embedded_model()).hf
    settings: dict[str, Any] = {
        **{"output_dir": str(folder / "trl"), "use_cpu": True, "bf16": False, "gradient_checkpointing": False},
        **{"learning_rate": LR, "lr_scheduler_type": "constant", "adam_beta1": 0.9, "adam_beta2": 0.95},
        **{"optim": "adamw_torch_fused", "max_grad_norm": 1.0, "num_train_epochs": 1, "seed": SEED},
        **{"logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True},
    }
    total = Mark(0.0, 0, 0)
    marks: list[Mark] = []

    class Notes(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **how: Any) -> None:
            marks.append(Mark(time.time(), total.tokens, total.rows))

    if arm == "sft_trl":
        labels = [[int(i) if m else -100 for i, m in zip(e.ids_T, e.loss_mask_T, strict=True)] for e in examples]
        data = Dataset.from_dict({"input_ids": [e.ids_T.tolist() for e in examples], "labels": labels})
        config = SFTConfig(
            **settings,
            **{"packing": True, "max_length": PACK_TOKENS, "per_device_train_batch_size": 1},
            gradient_accumulation_steps=MICRO_TOKENS // PACK_TOKENS,
        )
        model = load_causal_lm(embedded_model(), "float32")
        trainer: Any = SFTTrainer(model, config, train_dataset=data, processing_class=hf, callbacks=[Notes()])
    else:
        sides = {k: [[*e.prompt_T.tolist(), *getattr(e, n).tolist()] for e in examples] for k, n in SIDES}
        data = Dataset.from_dict(sides)
        config = RewardConfig(
            **settings,
            **{"max_length": MAX_TOKENS, "per_device_train_batch_size": PAIRS_AT_ONCE},
            gradient_accumulation_steps=PAIR_BATCH // PAIRS_AT_ONCE,
        )
        model = load_scalar_model(embedded_model(), "float32")
        hf.pad_token_id = model.config.pad_token_id
        trainer = RewardTrainer(model, config, train_dataset=data, processing_class=hf, callbacks=[Notes()])
    inner = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **how: Any) -> Any:
        mask = inputs.get("attention_mask")
        total.tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
        total.rows += int((inputs["position_ids"] == 0).sum()) if mask is None else len(mask) // 2
        return inner(model, inputs, *args, **how)

    trainer.compute_loss = compute_loss
    trainer.train()
    assert total.rows == len(examples)
    return rates(marks, peak_rss_gib())


SIDES = (("chosen_ids", "a_T"), ("rejected_ids", "b_T"))


def bare(arm: str, folder: Path) -> dict[str, float]:
    """The loop's steps without the loop: forward, backward, clipping and AdamW in plain torch."""
    import torch

    from cai_ray.models import embedded_model
    from cai_ray.training import sft
    from cai_ray.training.batches import step_rows

    torch.set_num_threads(THREADS)
    config = config_of(arm).model_copy(update={"packing": False})
    module = sft.load(embedded_model(), "float32", 0)
    module.train()
    adamw = torch.optim.AdamW(module.parameters(), lr=LR, betas=OPTIM["betas"], weight_decay=0.0, fused=True)
    examples, marks = examples_of(arm), []
    for done, (_, step) in enumerate(step_rows([e.id for e in examples], SEED, 1, LOOP_BATCH), 1):
        batch = [examples[i] for i in step]
        tensors = sft.collate(batch, torch.device("cpu"), config)
        sft.loss(module, batch, tensors, config, sum(e.units for e in batch)).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), OPTIM["max_grad_norm"])
        adamw.step()
        adamw.zero_grad()
        marks.append(Mark(time.time(), done * LOOP_BATCH * LOOP_TOKENS, done * LOOP_BATCH))
    return rates(marks, peak_rss_gib())


# ---- all arms -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Runs every arm in turn and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", choices=ARMS, help="only this comparison")
    parser.add_argument("--rounds", type=int, default=2, help="times that each arm runs")
    parser.add_argument("--keep", type=Path, help="folder of results")
    parser.add_argument("--arm", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        name, folder = options.arm[0], Path(options.arm[1])
        how = bare if name == "bare" else trl if name.endswith("_trl") else ours
        (folder / "result.json").write_text(json.dumps(how(name, folder)))
        return
    with tempfile.TemporaryDirectory() as root:
        kept = options.keep or Path(root) / "kept"
        kept.mkdir(parents=True, exist_ok=True)
        for turn in range(options.rounds):
            for name in (n for key, pair in ARMS.items() if options.only in (None, key) for n in pair):
                result = kept / f"{name}-{turn}.json"
                if not result.is_file():
                    result.write_text(json.dumps(run_arm(name, Path(tempfile.mkdtemp(dir=root)))))
                found = json.loads(result.read_text())
                print(f"{name}: {found['tokens_per_s']:.0f} tokens/s, {found['rows_per_s']:.2f} rows/s", flush=True)
        arms = {
            name: [json.loads(path.read_text()) for path in sorted(kept.glob(f"{name}-[0-9].json"))]
            for pair in ARMS.values()
            for name in pair
        }
    print(json.dumps(summary({name: found for name, found in arms.items() if found})))


def run_arm(name: str, folder: Path) -> dict[str, float]:
    """One arm in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.training", "--arm", name, str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=log, check=False, env=env)
    if done.returncode:
        sys.exit(f"{name} failed:\n" + (folder / "log").read_text()[-3000:])
    return json.loads((folder / "result.json").read_text())


def summary(arms: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """The ratios of the mean rates and the largest peaks."""

    def mean(name: str, key: str) -> float:
        return sum(r[key] for r in arms[name]) / len(arms[name])

    def peak(name: str) -> float:
        return max(r["peak_rss_gib"] for r in arms[name])

    ratios = {}
    if {"sft", "sft_trl"} <= arms.keys():
        ratios["sft_over_trl"] = mean("sft", "tokens_per_s") / mean("sft_trl", "tokens_per_s")
    if {"pm", "pm_trl"} <= arms.keys():
        ratios["pm_over_trl"] = mean("pm", "rows_per_s") / mean("pm_trl", "rows_per_s")
    if {"loop", "bare"} <= arms.keys():
        ratios["loop_overhead"] = mean("bare", "tokens_per_s") / mean("loop", "tokens_per_s") - 1
        ratios["memory_over_bare"] = peak("loop") / peak("bare")
    settings = {"model": "SmolLM2-135M-Instruct", "dtype": "float32", "threads": THREADS, "lr": LR, "zero_stage": 0}
    sizes = {
        **{"sft_rows": SFT_ROWS, "sft_batch": SFT_BATCH, "max_tokens": MAX_TOKENS, "trl_pack_tokens": PACK_TOKENS},
        **{
            "sft_microbatch_tokens": PACK_TOKENS,
            "microbatch_tokens": MICRO_TOKENS,
            "pairs": PAIRS,
            "pair_batch": PAIR_BATCH,
            "pair_tokens": PAIR_TOKENS,
        },
        **{"trl_pairs_at_once": PAIRS_AT_ONCE, "loop_batch": LOOP_BATCH, "loop_tokens": LOOP_TOKENS},
    }
    return {**ratios, "settings": settings | sizes, "arms": arms}


if __name__ == "__main__":
    main()
