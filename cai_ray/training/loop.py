"""The training loop of one rank under Ray Train; it reads top to bottom as numbered steps.

The row order is a hash, dropout is off and each step is seeded anew: the step count is the whole position in the data,
and a resumed run repeats an uninterrupted one.
"""

import faulthandler
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from cai_ray.artifacts import StageDir, write_atomic
from cai_ray.config import PreferenceModelConfig, SftConfig
from cai_ray.errors import CaiError, DataError, StageFailed
from cai_ray.records import Row, derive_seed
from cai_ray.training.batches import copies, epoch_order, layout, step_rows, total_steps
from cai_ray.training.checkpoints import Checkpoints

if TYPE_CHECKING:
    from cai_ray.models.tokenization import Tokenizer

Kind = Literal["sft", "preference_model"]
EVAL_ROWS = 1024  # held-out rows that are evaluated, the first by a hash of the id: accuracy to 1.6 points
REWARD_ROWS = 8  # with fewer held-out pairs, mean and std of the reward come from training rows
PULSE_S = 2.0


@dataclass(frozen=True)
class Job:
    """All that one training run is told; it travels to every rank."""

    kind: Kind  # sft reads `Revision` rows, preference_model reads `LabeledPair` rows
    config: SftConfig | PreferenceModelConfig
    model: Path  # folder of the model to start from
    format: str  # of prompts: auto | plain | chat
    inputs: tuple[Path, ...]  # folders of parquet rows
    out: Path  # the stage's directory, seen by every rank
    seed: int
    device: str  # cpu | gpu
    max_bad_fraction: float  # more bad rows than this share fail the stage
    start_timeout_s: float
    step_timeout_s: float

    @property
    def resources(self) -> dict[str, int]:
        """What Ray sets aside for one rank; the CPUs are also its OpenMP threads."""
        return {"CPU": self.config.sharding.cpus_per_rank} | ({"GPU": 1} if self.device == "gpu" else {})


def train(told: dict[str, Job]) -> dict[str, float] | CaiError:
    """Ray Train's function: the metrics, from every rank.

    A CaiError is returned, not raised: it has the same cause on every rank, so trying again would only repeat it.
    """
    try:
        return _train(told["job"])
    except CaiError as error:
        return error


def _train(job: Job) -> dict[str, float]:
    # 1. This rank: its log, its threads, its place among the others.
    import ray.train
    import torch
    import torch.distributed as dist

    out, config, sharding = StageDir(job.out, job.seed), job.config, job.config.sharding
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    pulse = _own_log(rank_log(out, rank), job.step_timeout_s)
    print(f"rank {rank} of {world}: process {os.getpid()} on {platform.node()}", flush=True)
    from cai_ray.models.tokenization import Tokenizer
    from cai_ray.training import preference, sft
    from cai_ray.training.deepspeed import ShardedModel, init_distributed, loading
    from cai_ray.training.lora import add_adapters

    device = torch.device("cpu")
    if job.device == "gpu":
        device = torch.device("cuda", torch.cuda.current_device())  # chosen by Ray Train
    else:
        torch.set_num_threads(sharding.cpus_per_rank)
    init_distributed(device, job.step_timeout_s)

    # 2. Rows to examples. Every rank tokenises all rows and holds them as int32: 5 GB for a billion tokens.
    tasks: dict[str, ModuleType] = {"sft": sft, "preference_model": preference}
    tokenizer, task = Tokenizer.load(job.model, job.format), tasks[job.kind]
    trained, held_out, counts = _examples(job, task, tokenizer, out if rank == 0 else None, pulse)
    ids = [e.id for e in trained]
    steps = total_steps(len(trained), config.epochs, config.batch_size)

    # 3. The model, and where an earlier attempt left it.
    pulse()
    adapters = None
    with loading(sharding, config.optim, device):
        module = task.load(job.model, sharding.dtype, derive_seed(job.seed, "head", job.kind))
        if config.lora:
            adapters = add_adapters(module.hf, config.lora, job.model, derive_seed(job.seed, "lora", job.kind))
    model = ShardedModel(module, config.optim, sharding, steps, device)
    checkpoints = Checkpoints(job.out, rank, config)
    if newest := checkpoints.newest():
        model.load(newest)
        print(f"continues after step {model.steps_done}", flush=True)
    if rank == 0:
        out.forget_from(model.steps_done)

    def micro_batches(batch: Sequence[Any], rows: Sequence[int]) -> Iterator[tuple[list[int], list[Any], Any]]:
        """This rank's micro-batches of `rows`, indices into `batch`: (indices, examples, tensors)."""
        packed = getattr(config, "packing", True)  # a preference model always packs
        for micro in layout(rows, [e.length for e in batch], world, sharding.microbatch_tokens, packed)[rank]:
            pulse()
            chosen = [batch[i] for i in micro]
            yield micro, chosen, task.collate(chosen, tokenizer.pad_id, device, config)

    def scores(batch: Sequence[Any]) -> list[Any]:
        """`task.score` of every example, on every rank."""
        mine: dict[int, Any] = {}
        model.module.eval()
        with torch.no_grad():
            for micro, chosen, tensors in micro_batches(batch, range(len(batch))):
                mine.update(zip(micro, task.score(model.module, chosen, tensors), strict=True))
        model.module.train()
        parts: list[dict[int, Any]] = [{}] * world
        dist.all_gather_object(parts, mine)
        return [score for _, score in sorted({i: s for part in parts for i, s in part.items()}.items())]

    def evaluate() -> tuple[list[Any], dict[str, float]]:
        """Scores of the held-out rows, and the metrics that come of them, which rank 0 writes."""
        found = scores(held_out)
        summary = task.summary(held_out, found) if held_out else {}
        if rank == 0 and summary:
            out.metrics(model.steps_done, summary)
        return found, summary

    # 4. Held-out rows before the first step, or as the checkpoint saw them: the line of metrics was just dropped.
    if model.steps_done == 0 or config.keep_checkpoints > 1:
        evaluate()

    # 5. The steps.
    done = model.steps_done
    for epoch, rows in step_rows(ids, job.seed, config.epochs, config.batch_size, start=done):
        began, lr = time.monotonic(), model.lr
        torch.manual_seed(derive_seed(job.seed, str(done), "step"))
        total = sum(trained[i].units for i in rows)
        loss = torch.zeros((), device=device)
        for _, chosen, tensors in micro_batches(trained, rows):
            part = task.loss(model.module, chosen, tensors, config, total)
            model.backward(part)
            loss += part.detach()
        told = torch.stack([loss, loss.new_tensor(checkpoints.overdue())])
        dist.all_reduce(told)
        loss, overdue = told
        try:
            if not loss.isfinite():
                raise StageFailed(f"the loss of step {done + 1} is {float(loss)}", "lower optim.lr or look at its rows")
            norm = model.step()
        except StageFailed as error:  # on every rank alike, and before the weights change
            saved = out.logs / f"step-{done + 1:06d}.json"
            if rank == 0:
                save_batch(saved, [trained[i] for i in rows])
            raise StageFailed(f"{error.message}; the tokens of its rows are in {saved}", error.fix) from None
        line = {"train/loss": float(loss), "train/lr": lr, "train/grad_norm": norm, "train/epoch": epoch}
        line["perf/tokens_per_s"] = sum(trained[i].tokens for i in rows) / (time.monotonic() - began)
        if rank == 0:
            out.metrics(done, line)
        done = model.steps_done
        if done % config.checkpoint_every == 0 or overdue:
            checkpoints.save(model, evaluate()[1] if config.keep_checkpoints > 1 else {})

    # 6. Held-out rows after the last step, and the reward's scale.
    after, summary = evaluate()
    updates = {}
    if job.kind == "preference_model":
        blind = preference.leaks(held_out, scores)
        if rank == 0 and blind:
            out.metrics(done, blind)
        summary |= blind
        if len(held_out) < REWARD_ROWS:
            after = scores([trained[i] for i in epoch_order(ids, job.seed, 0)[:EVAL_ROWS]])
        updates = reward_scale([s for pair in after for s in pair])

    # 7. The model's folder.
    pulse()
    if adapters:
        model.export_adapter(adapters, out.path / "adapter")
    model.export(tokenizer, out.path / "model", updates)
    return {**counts, "steps": done, **summary, **updates}


def rank_log(out: StageDir, rank: int) -> Path:
    """A rank's log file; its time of change is also the rank's sign of life."""
    return out.logs / f"rank-{rank}.log"


def reward_scale(scores: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation of the reward, as config.json keeps them.

    Raises:
        StageFailed: the scores do not vary or are not finite; PPO would divide by that.
    """
    import numpy as np

    mean, std = float(np.mean(scores)), float(np.std(scores, ddof=1))
    if not 0 < std < float("inf"):
        raise StageFailed(
            f"the preference model gives {len(scores)} answers a standard deviation of {std}",
            "train it longer or with another rate: it does not tell answers apart",
        )
    return {"reward_mean": mean, "reward_std": std}


def save_batch(path: Path, batch: Sequence[Any]) -> None:
    """Writes the examples of a step as JSON, a list of their fields: ids, token ids, masks, labels; no text."""
    import numpy as np

    rows = [{k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(e).items()} for e in batch]
    write_atomic(path, json.dumps(rows))


def print_to(path: Path) -> None:
    """Sends all that this process prints to the end of a file."""
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)


def stacks(log: Path) -> Path:
    """Where a rank that hangs notes what each of its threads was doing."""
    return log.with_suffix(".stack")


def _own_log(path: Path, limit_s: float) -> Callable[[], None]:
    """`print_to(path)`; returns a function that touches the file as a sign of life.

    Without one for nearly `limit_s` the rank notes its stacks, before the driver gives it up.
    """
    print_to(path)
    os.utime(path)
    last, notes = time.monotonic(), stacks(path).open("w")
    faulthandler.dump_traceback_later(0.8 * limit_s, file=notes)

    def pulse() -> None:
        nonlocal last
        if time.monotonic() - last > PULSE_S:  # each row and micro-batch calls this; the watchdog is a new thread
            os.utime(path)
            faulthandler.dump_traceback_later(0.8 * limit_s, file=notes)
            last = time.monotonic()

    return pulse


def _examples(
    job: Job, task: ModuleType, tokenizer: "Tokenizer", out: StageDir | None, pulse: Callable[[], None]
) -> tuple[list[Any], list[Any], dict[str, float]]:
    """(train examples, held-out examples, counts); a row that cannot be read goes to the quarantine of `out`."""
    made: dict[str, list[Any]] = {"train": [], "test": []}
    bad: list[dict[str, str]] = []
    rows = without = 0
    for row in _rows(job.inputs, task.COLUMNS):
        pulse()
        rows += 1
        try:
            new = task.examples(row, tokenizer, job.config)
        except DataError as error:
            bad.append({"id": row["id"], "reason": error.message})
            continue
        without += not new
        if row["split"] == "test":
            made["test"] += new
        else:
            made["train"] += [copy for e in new for copy in copies(e, job.seed)]
    if out:
        known = out.quarantine_path.read_text("utf-8") if out.quarantine_path.is_file() else ""
        lines = [json.dumps(b, ensure_ascii=False) + "\n" for b in bad]
        write_atomic(out.quarantine_path, known + "".join(line for line in lines if line not in known))
    if len(bad) > job.max_bad_fraction * rows:
        raise StageFailed(
            f"{len(bad)} of {rows} rows are bad, the first for: {bad[0]['reason']}",
            f"see quarantine.jsonl in {job.out}",
        )
    trained, held_out = (sorted(made[split], key=lambda e: e.id) for split in ("train", "test"))
    if not trained:
        raise DataError(
            f"no training rows in {[str(p) for p in job.inputs]}: {rows} rows, {len(held_out)} held-out examples",
            "give rows whose split is train",
        )
    if len({e.id for e in trained}) != len(trained):
        raise DataError("two training rows have the same id", "give each input folder once")
    held_out = [held_out[i] for i in epoch_order([e.id for e in held_out], seed=0, epoch=0)[:EVAL_ROWS]]
    counts: dict[str, float] = {
        "rows": rows,
        "quarantined": len(bad),
        "rows_without_example": without,
        "train_examples": len(trained),
        "test_examples": len(held_out),
        "truncated": sum(e.truncated for e in trained),
        **{f"train_examples/{name}": n for name, n in sorted(Counter(e.source for e in trained).items())},
    }
    return trained, held_out, counts


def _rows(folders: Sequence[Path], columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.dataset

    for folder in folders:
        try:
            data = pyarrow.dataset.dataset(folder, format="parquet")
            for batch in data.to_batches(columns=list(columns), batch_size=1024):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"the rows in {folder} cannot be read: {error}", "write them again") from None
