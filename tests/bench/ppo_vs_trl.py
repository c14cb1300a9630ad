"""How fast PPO iterations are beside TRL's PPOTrainer, and beside what the machine's float32 arithmetic allows.

    python -m tests.bench.ppo_vs_trl [--only 32x48] [--rounds 2] [--keep FOLDER]

Sizes are 32 prompts x 48 new tokens and 16 x 192. Policy, critic, reward and reference are SmolLM2-135M-Instruct in
float32, the threads are the cores, one epoch, one optimizer step an iteration. Each arm runs in a process of its own,
ours and theirs in turn. Iterations count whole, weight sync and logging included, but the first three, which warm up.

Both sides read the same two model folders and the same prompts (HH harmless-base, first human turns of like length) in
the same iterations, draw from the whole distribution at temperature 1, and use fused AdamW. For equal work a response
ends, on both sides alike, with a token that the model hardly ever draws: both look out for it, and all new tokens are
generated. Ends that come all the same are counted (`ended`); rates are of samples and of real tokens. At 16 x 192 ours
takes 21 GiB of memory beside what is there, theirs 16. `ours` is `run_ppo` under Ray with its rollout engine; `trl` is
TRL's trainer as it is, without gradient checkpointing: all prompts in one generation and one scoring pass, as many
responses in one backward pass as memory allows. A collator of ours hands it each iteration's prompts, padded on the
left; time and tokens are noted around `policy.generate`.

The roofline is the best rate of a float32 GEMM (an MLP projection of the model) with the same threads, before and after
our run in the arm's own process. Work that is needed: 2 FLOPs for each weight that a token meets, in 9 forward passes'
worth (rollout 1, reward 1, reference 1, actor 3, critic 3; backward counts twice, old log-probs and values are the
update's own forward pass): the layers' weights at every token, the LM head's at response tokens and only where there is
a head (rollout, reference, actor). Attention scores, padding and embedding lookups count nothing; a prompt's beginning
that others share counts for each. The fraction is this work over GEMM rate times whole iterations.

With --keep, results lie in FOLDER and arms that are there already are not run again. `--arm ours_32x48 FOLDER` runs one
arm in this process; its models lie beside FOLDER. `--only smoke` takes a tiny model: it shows that both sides run, its
rates mean nothing. The last line is one JSON object: ratio_32x48, ratio_16x192 (samples/s, ours over theirs),
trl_32x48_samples_per_s, roofline_fraction (of the worse size) and one for each size, sync_s (mean seconds of the phase
`sync`: weights sent and repacked; the probe is a phase of its own), sync_share (its largest share of an iteration),
the settings, and each arm's rounds.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from cai_ray.artifacts import StageDir
from cai_ray.config import Cluster, Learner, Optim, PPOConfig, Sharding
from cai_ray.models.checkpoints import load_causal_lm, load_scalar_model
from tests.bench import ppo_work as work
from tests.bench.ppo_work import COUNTED, SEED, SIZES, THREADS, WARMUP, Iteration, Size, models, prompts, rates

COMPARED = ("32x48", "16x192")
LIMIT_S = 5400  # for an arm


# ---- ours -----------------------------------------------------------------------------------------------------------


def our_config(size: Size) -> PPOConfig:
    """Our side's configuration; a minibatch is the whole batch."""
    # Actor and critic both keep all of the batch's forward pass for the update.
    how = {"ranks": 1, "dtype": "float32", "microbatch_tokens": size.tokens, "cpus_per_rank": THREADS}
    sharding = Sharding(gradient_checkpointing=False, **how)
    learner = Learner(optim=Optim(lr=work.LR, betas=work.BETAS), sharding=sharding)
    return PPOConfig(
        steps=WARMUP + COUNTED,
        rollout_batch_size=size.batch,
        minibatch_size=size.batch,
        ppo_epochs=1,
        max_prompt_tokens=work.PROMPT_TOKENS[1],
        max_new_tokens=size.new,
        temperature=1.0,
        kl_coef=work.KL,
        clip_range=work.CLIP,
        value_clip_range=work.CLIP,
        gamma=work.GAMMA,
        gae_lambda=work.LAMBDA,
        actor=learner,
        critic=learner,
        checkpoint_every=1000,
    )


def ours(size: Size, folder: Path) -> dict[str, Any]:
    """`run_ppo` with its rollout engine under Ray."""
    policy, reward = models(folder.parent, size.model)
    rows, steps = prompts(size, policy, our_config(size))
    out, gemm = StageDir(folder / "ppo", SEED), work.gemm_flops(size.model)
    train(size, policy, reward, rows, out)
    gemm = max(gemm, work.gemm_flops(size.model))
    lines = [json.loads(line) for line in (out.path / "metrics.jsonl").read_text().splitlines()]
    done = []
    for line, step in zip(lines, steps, strict=True):
        times = {name.removeprefix("time/"): value for name, value in line.items() if name.startswith("time/")}
        new, ended = (round(size.batch * x) for x in (line["rollout/length"], 1 - line["rollout/truncated"]))
        done.append(Iteration(times.pop("step"), sum(map(len, step)), new, ended, times))
    counted = done[WARMUP:]
    found, seconds = rates(size, counted), sum(i.seconds for i in counted)
    fraction = sum(work.needed_flops(size.model, i) for i in counted) / (gemm * seconds)
    share = sum(i.phases["sync"] for i in counted) / seconds
    return found | {"gemm_flops": gemm, "roofline_fraction": fraction, "sync_share": share}


def train(size: Size, policy: Path, reward: Path, rows: list[Any], out: StageDir) -> None:
    """A whole run; Ray ends with it."""
    import ray

    from cai_ray.cluster import start_ray
    from cai_ray.config_files import load_config
    from cai_ray.generation.pool import EnginePool
    from cai_ray.rl.loop import run_ppo
    from cai_ray.rl.setup import Setup

    cluster = Cluster(device="cpu", kv_cache_gib=0.25, max_num_seqs=size.batch)
    config = our_config(size)
    setup = Setup(
        config=config,
        policy=policy,
        rewards=(reward,),
        heldout_reward=None,
        format="auto",
        device="cpu",
        seed=SEED,
        cluster=cluster,
        engine_dtype="float32",
    )
    start_ray(load_config("quickstart").cluster.joined)
    try:
        pool = EnginePool(cluster, "cpu", out.logs)

        def engines() -> list[Any]:
            longest = config.max_prompt_tokens + config.max_new_tokens
            return pool.engines(policy, dtype="float32", max_model_len=longest)

        run_ppo(setup, rows, engines, out, lambda: nullcontext(lambda done, total, words: None))
        pool.release()
    finally:
        ray.shutdown()


# ---- theirs ---------------------------------------------------------------------------------------------------------


def trl_config(size: Size, folder: Path) -> Any:
    """Their side's configuration: no checkpoint, no sample, no tracker, nothing computed twice to save memory."""
    from trl.experimental.ppo import PPOConfig

    return PPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=size.trl_rows,
        gradient_accumulation_steps=size.batch // size.trl_rows,
        num_mini_batches=1,
        num_ppo_epochs=1,
        total_episodes=size.batch * (WARMUP + COUNTED),
        local_rollout_forward_batch_size=size.batch,
        num_sample_generations=0,
        response_length=size.new,
        stop_token="eos",
        temperature=1.0,
        kl_coef=work.KL,
        cliprange=work.CLIP,
        cliprange_value=work.CLIP,
        gamma=work.GAMMA,
        lam=work.LAMBDA,
        optim="adamw_torch_fused",
        learning_rate=work.LR,
        lr_scheduler_type="constant",
        adam_beta1=work.BETAS[0],
        adam_beta2=work.BETAS[1],
        seed=SEED,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def trl(size: Size, folder: Path) -> dict[str, Any]:
    """TRL's PPOTrainer on the same models and prompts."""
    import torch
    from transformers import AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOTrainer

    torch.set_num_threads(THREADS)
    policy_folder, reward_folder = models(folder.parent, size.model)
    rows, steps = prompts(size, policy_folder, our_config(size))
    hf: Any = AutoTokenizer.from_pretrained(policy_folder, padding_side="left")
    policy, reference = (load_causal_lm(policy_folder, "float32") for _ in range(2))
    reward, critic = (load_scalar_model(reward_folder, "float32") for _ in range(2))
    policy.generation_config.use_cache = True  # these loaders switch it off, for training
    inner, given = policy.generate, iter(steps)
    done: list[Iteration] = []
    marks: list[float] = []

    class Notes(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **how: Any) -> None:
            marks.append(time.monotonic())

    def collate(_: Any) -> Any:
        return hf.pad({"input_ids": next(given)}, return_tensors="pt")

    def generate(**how: Any) -> Any:
        begun = time.monotonic()
        made = inner(**how)
        phases = {"rollout": time.monotonic() - begun}
        end_BR = made.sequences[:, how["input_ids"].shape[1] :] == hf.eos_token_id
        new = len(end_BR) + int((end_BR[:, :-1].cumsum(1) == 0).sum())
        done.append(Iteration(0.0, int(how["attention_mask"].sum()), new, int(end_BR.any(1).sum()), phases))
        return made

    policy.generate = generate
    trainer = PPOTrainer(
        args=trl_config(size, folder),
        processing_class=hf,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=critic,
        train_dataset=rows,
        data_collator=collate,
        callbacks=[Notes()],
    )
    trainer.train()
    assert len(marks) == len(steps)
    assert [i.prompt_tokens for i in done] == [sum(map(len, step)) for step in steps]
    for iteration, begun, end in zip(done[1:], marks[:-1], marks[1:], strict=True):
        iteration.seconds = end - begun
    return rates(size, done[WARMUP:])


# ---- all arms -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Runs every arm in turn and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", choices=SIZES, help="only this size")
    parser.add_argument("--rounds", type=int, default=2, help="times that each arm runs")
    parser.add_argument("--keep", type=Path, help="folder of results")
    parser.add_argument("--arm", nargs=2, metavar=("NAME", "FOLDER"), help="one arm in this process")
    options = parser.parse_args()
    if options.arm:
        (side, _, size), folder = options.arm[0].partition("_"), Path(options.arm[1]).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        signal.signal(signal.SIGALRM, too_late)
        signal.alarm(LIMIT_S)
        (folder / "result.json").write_text(json.dumps({"ours": ours, "trl": trl}[side](SIZES[size], folder)))
        return
    names = [f"{side}_{size}" for size in ([options.only] if options.only else COMPARED) for side in ("ours", "trl")]
    arms: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as root:
        kept = options.keep or Path(root) / "kept"
        kept.mkdir(parents=True, exist_ok=True)
        for name, turn in ((n, t) for t in range(options.rounds) for n in names):
            result = kept / f"{name}-{turn}.json"
            if not result.is_file():
                result.write_text(json.dumps(run_arm(name, Path(root))))
            arms[name].append(found := json.loads(result.read_text()))
            print(f"{name}: {found['samples_per_s']:.3f} samples/s, {found['tokens_per_s']:.0f} tokens/s", flush=True)
    print(json.dumps(summary(arms)))


def too_late(number: int, frame: Any) -> None:
    """Ends an arm by way of what it has to tidy up."""
    raise TimeoutError(f"the arm takes more than {LIMIT_S} s")


def run_arm(name: str, root: Path) -> dict[str, Any]:
    """One arm in a process of its own."""
    env = os.environ | {"OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    env |= {"CUDA_VISIBLE_DEVICES": "", "TRL_EXPERIMENTAL_SILENCE": "1"}
    with tempfile.TemporaryDirectory(dir=root) as path, (Path(path) / "log").open("w+") as log:
        command = [sys.executable, "-m", "tests.bench.ppo_vs_trl", "--arm", name, path]
        before = least = psutil.virtual_memory().available
        with subprocess.Popen(command, stdout=log, stderr=log, env=env) as arm:
            end = time.monotonic() + LIMIT_S + 120  # the arm ends itself before that
            while arm.poll() is None:
                if time.monotonic() > end:
                    arm.kill()
                time.sleep(0.5)
                least = min(least, psutil.virtual_memory().available)
        log.seek(0)
        if arm.returncode:
            sys.exit(f"{name} failed:\n" + log.read()[-3000:])
        return json.loads((Path(path) / "result.json").read_text()) | {"memory_gib": (before - least) / 2**30}


def summary(arms: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Ratios of mean rates, and what is asked of our side alone."""

    def mean(key: str, side: str) -> dict[str, float]:
        found = {name.removeprefix(side): results for name, results in arms.items() if name.startswith(side)}
        return {size: sum(r[key] for r in results) / len(results) for size, results in found.items()}

    rate, theirs = mean("samples_per_s", "ours_"), mean("samples_per_s", "trl_")
    fractions = mean("roofline_fraction", "ours_")
    syncs = [r["phases"]["sync"] for name, results in arms.items() if name.startswith("ours_") for r in results]
    settings = {
        "model": "SmolLM2-135M-Instruct",
        "dtype": "float32",
        "threads": THREADS,
        "counted": COUNTED,
        "lr": work.LR,
    }
    settings |= {"prompt_tokens": work.PROMPT_TOKENS, "ppo_epochs": 1, "eos": work.EOS, "gemm_tokens": work.GEMM_TOKENS}
    return {
        **{f"ratio_{size}": rate[size] / theirs[size] for size in rate},
        **{f"trl_{size}_samples_per_s": value for size, value in theirs.items()},
        "roofline_fraction": min(fractions.values()),
        **{f"roofline_fraction_{size}": value for size, value in fractions.items()},
        "sync_s": sum(syncs) / len(syncs),
        "sync_share": max(mean("sync_share", "ours_").values()),
        "settings": settings | {"sizes": {size: asdict(SIZES[size]) for size in rate}},
        "arms": arms,
    }


if __name__ == "__main__":
    main()
