"""The training loop of one rank under Ray Train; it reads top to bottom as numbered steps.

The row order is a hash, dropout is off and each step is seeded anew: the step count is the whole position in the data,
and a resumed run repeats an uninterrupted one.
"""

import hashlib
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist

from cai_ray.artifacts import StageDir, write_atomic
from cai_ray.config import Training
from cai_ray.errors import DataError, StageFailed
from cai_ray.models.tokenization import Tokenizer
from cai_ray.records import derive_seed, stored_rows
from cai_ray.training import preference, sft
from cai_ray.training.batches import copies, epoch_order, layout, step_rows, total_steps
from cai_ray.training.deepspeed import ShardedModel, init_distributed, model_to_train, steps_in
from cai_ray.training.launch import RUN_NAME, Job

EVAL_ROWS = 1024  # held-out rows that are evaluated, the first by a hash of the id: accuracy to 1.6 points
REWARD_ROWS = 8  # with fewer held-out pairs, mean and std of the reward come from training rows


def train(job: Job, pulse: Callable[[], None]) -> dict[str, float]:
    """The metrics, from every rank; `pulse` is its sign of life.

    Raises:
        CaiError: with the same cause on every rank.
    """
    # 1. This rank: where its tensors live, its threads, its place among the others.
    out, config, device = StageDir(job.out, job.seed), job.config, torch.device("cpu")
    if job.device == "gpu":
        device = torch.device("cuda", torch.cuda.current_device())  # chosen by Ray Train
    else:
        torch.set_num_threads(config.sharding.cpus_per_rank)
    init_distributed(device, job.step_timeout_s)
    main = dist.get_rank() == 0

    # 2. Rows to examples. Every rank tokenises all rows and holds them as int32: 5 GB for a billion tokens.
    tasks: dict[str, ModuleType] = {"sft": sft, "preference_model": preference}
    tokenizer, task = Tokenizer.load(job.model, job.format), tasks[job.kind]
    trained, held_out, counts = _examples(job, task, tokenizer, out if main else None, pulse)
    ids = [e.id for e in trained]

    # 3. The model, and where an earlier attempt left it.
    pulse()
    head, lora = (derive_seed(job.seed, name, job.kind) for name in ("head", "lora"))
    load, steps = partial(task.load, job.model, seed=head), total_steps(len(trained), config.epochs, config.batch_size)
    model = model_to_train(load, config, job.model, lora, steps, device)
    checkpoints = Checkpoints(job.out, model.rank, config)
    if newest := checkpoints.newest():
        model.load(newest)
        print(f"continues after step {model.steps_done}", flush=True)
    if main:
        out.forget_from(model.steps_done)
    passes = _Passes(job, task, model, pulse)

    # 4. Held-out rows before the first step, or as the checkpoint saw them: the line of metrics was just dropped.
    if model.steps_done == 0 or config.keep_checkpoints > 1:
        passes.evaluate(held_out, out)

    # 5. The steps.
    for epoch, rows in step_rows(ids, job.seed, config.epochs, config.batch_size, start=model.steps_done):
        step, batch = model.steps_done, [trained[i] for i in rows]
        line = passes.step(batch, out.logs / f"step-{step + 1:06d}.json") | {"train/epoch": epoch}
        if main:
            out.metrics(step, line)
        if checkpoints.due(model.steps_done):
            checkpoints.save(model, passes.evaluate(held_out, out)[1] if config.keep_checkpoints > 1 else {})

    # 6. Held-out rows after the last step, and the reward's scale.
    after, summary = passes.evaluate(held_out, out)
    updates = {}
    if job.kind == "preference_model":
        blind = preference.leaks(held_out, passes.scores)
        if main and blind:
            out.metrics(model.steps_done, blind)
        summary |= blind
        if len(held_out) < REWARD_ROWS:
            after = passes.scores([trained[i] for i in epoch_order(ids, job.seed, 0)[:EVAL_ROWS]])
        updates = reward_scale([s for pair in after for s in pair])

    # 7. The model's folder.
    pulse()
    if config.lora:
        model.export_adapter(out.path / "adapter")
    model.export(tokenizer, out.path / "model", updates)
    return {**counts, "steps": model.steps_done, **summary, **updates}


class Checkpoints:
    """When to write a checkpoint, and which to go on from.

    A rank writes its part on its own disk, and Ray Train brings it to the stage's directory while training goes on. One
    counts when all ranks' parts have arrived whole. Ray Train keeps the record, and removes what is not wanted.

    Args:
        out: the stage's directory.
        rank: this process's rank.
        config: how often.
    """

    def __init__(self, out: Path, rank: int, config: Training):
        own = hashlib.sha256(f"{out} {rank}".encode()).hexdigest()[:16]
        self._scratch = f"cai-ray-checkpoint-{own}-"
        for left in Path(tempfile.gettempdir()).glob(self._scratch + "*"):  # by a rank that was killed here
            shutil.rmtree(left, ignore_errors=True)
        self._run, self._rank = out / "checkpoints" / RUN_NAME, rank
        self._every, self._limit = config.checkpoint_every, 60 * config.checkpoint_minutes
        self._last = time.monotonic()

    def newest(self) -> Path | None:
        """The last checkpoint whose files are all whole, as rank 0 sees it; others off the record are removed."""
        known = {Path(c.checkpoint.path).name for c in ray.train.get_all_reported_checkpoints()}
        found: list[Path | None] = [None]
        if self._rank == 0:
            steps = {folder: steps_in(folder) or 0 for folder in self._run.glob("checkpoint_*") if folder.is_dir()}
            found = [max((f for f in steps if steps[f]), key=lambda f: steps[f], default=None)]
            for folder in steps:  # Ray Train removes what it has on record, and counts on that until then
                if folder.name not in known and folder != found[0]:
                    shutil.rmtree(folder)
        dist.broadcast_object_list(found)
        return found[0]

    def due(self, steps_done: int) -> bool:
        """Whether to write one now, by steps or because the last is too long ago; only rank 0's clock counts."""
        overdue = [self._rank == 0 and time.monotonic() - self._last > self._limit]
        dist.broadcast_object_list(overdue)
        return steps_done % self._every == 0 or overdue[0]

    def save(self, model: ShardedModel, metrics: Mapping[str, float]) -> None:
        """Writes this rank's part and hands it to Ray Train, which copies it in the background.

        Args:
            model: what to write.
            metrics: held-out metrics, by which checkpoints are kept.
        """
        folder = Path(tempfile.gettempdir()) / f"{self._scratch}{model.steps_done}"
        model.save(folder)
        ray.train.report(
            {"steps_done": model.steps_done, **metrics},
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )
        self._last = time.monotonic()


@dataclass
class _Passes:
    """Forward and backward passes over any examples, which all ranks share; every rank calls each method alike."""

    job: Job
    task: ModuleType  # training.sft or training.preference
    model: ShardedModel
    pulse: Callable[[], None]
    evaluated: tuple[int, Any] | None = None  # after how many steps, and what came of it

    def micro_batches(self, batch: Sequence[Any]) -> Iterator[tuple[list[int], list[Any], Any]]:
        """This rank's: (indices into `batch`, their examples, the tensors)."""
        packed = getattr(self.job.config, "packing", True)  # a preference model always packs
        lengths, most = [e.tokens for e in batch], self.job.config.sharding.microbatch_tokens
        for micro in layout(range(len(batch)), lengths, self.model.world_size, most, packed)[self.model.rank]:
            self.pulse()
            chosen = [batch[i] for i in micro]
            yield micro, chosen, self.task.collate(chosen, self.model.device, self.job.config)

    def scores(self, batch: Sequence[Any]) -> list[Any]:
        """`task.score` of every example, on every rank."""
        mine: dict[int, Any] = {}
        module = self.model.module
        module.eval()
        with torch.no_grad():
            for micro, chosen, tensors in self.micro_batches(batch):
                mine.update(zip(micro, self.task.score(module, chosen, tensors), strict=True))
        module.train()
        parts: list[dict[int, Any]] = [{}] * self.model.world_size
        dist.all_gather_object(parts, mine)
        return [score for _, score in sorted({i: s for part in parts for i, s in part.items()}.items())]

    def evaluate(self, held_out: Sequence[Any], out: StageDir) -> tuple[list[Any], dict[str, float]]:
        """Scores of the held-out rows, once after each step, and the metrics that come of them, which rank 0 writes."""
        if self.evaluated is None or self.evaluated[0] != self.model.steps_done:
            found = self.scores(held_out)
            summary = self.task.summary(held_out, found) if held_out else {}
            if self.model.rank == 0 and summary:
                out.metrics(self.model.steps_done, summary)
            self.evaluated = self.model.steps_done, (found, summary)
        return self.evaluated[1]

    def step(self, batch: Sequence[Any], saved: Path) -> dict[str, float]:
        """One optimizer step over `batch`; its metrics.

        Raises:
            StageFailed: the loss or the gradient is not finite, on every rank alike and before the weights change; the
                batch is in `saved`, as a JSON list of the examples' fields.
        """
        model, begun, lr = self.model, time.monotonic(), self.model.lr
        torch.manual_seed(derive_seed(self.job.seed, str(model.steps_done), "step"))
        total = sum(e.units for e in batch)
        loss = torch.zeros((), device=model.device)
        for _, chosen, tensors in self.micro_batches(batch):
            part = self.task.loss(model.module, chosen, tensors, self.job.config, total)
            model.backward(part)
            loss += part.detach()
        dist.all_reduce(loss)
        try:
            if not loss.isfinite():
                raise StageFailed(
                    f"the loss of step {model.steps_done + 1} is {float(loss)}", "lower optim.lr or look at its rows"
                )
            norm = model.step()
        except StageFailed as error:
            if model.rank == 0:  # ids, token ids, masks, labels; no text
                write_atomic(saved, json.dumps([vars(e) for e in batch], default=lambda array: array.tolist()))
            raise StageFailed(f"{error.message}; the tokens of its rows are in {saved}", error.fix) from None
        tokens, seconds = sum(e.tokens for e in batch), time.monotonic() - begun
        perf = {"tokens_per_s": tokens / seconds, **model.mfu(tokens / model.world_size, seconds)}
        line = {"train/loss": float(loss), "train/lr": lr, "train/grad_norm": norm}
        return line | {f"perf/{name}": value for name, value in perf.items()}


def reward_scale(scores: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation of the reward, as config.json keeps them.

    Raises:
        StageFailed: the scores do not vary or are not finite; PPO would divide by that.
    """
    mean, std = float(np.mean(scores)), float(np.std(scores, ddof=1))
    if not 0 < std < float("inf"):
        raise StageFailed(
            f"the preference model gives {len(scores)} answers a standard deviation of {std}",
            "train it longer or with another rate: it does not tell answers apart",
        )
    return {"reward_mean": mean, "reward_std": std}


def _examples(
    job: Job, task: ModuleType, tokenizer: Tokenizer, out: StageDir | None, pulse: Callable[[], None]
) -> tuple[list[Any], list[Any], dict[str, float]]:
    """(train examples, held-out examples, counts); a row that cannot be read goes to the quarantine of `out`."""
    made: dict[str, list[Any]] = {"train": [], "test": []}
    bad: list[dict[str, str]] = []
    rows = without = 0
    for row in (row for folder in job.inputs for row in stored_rows(folder, task.COLUMNS)):
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
