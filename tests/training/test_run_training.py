"""Training under Ray Train: curves that do not depend on the layout, crashes that change nothing, what is published."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from cai_ray.artifacts import StageDir
from cai_ray.config import Lora, Mix, Optim, PreferenceModelConfig, SftConfig, Sharding
from cai_ray.errors import ConfigError, DataError, StageFailed
from cai_ray.models.checkpoints import load_causal_lm, save_pretrained
from cai_ray.models.documents import CPU_TOKENS
from cai_ray.models.tokenization import Tokenizer
from cai_ray.records import Row, answers, row_id, stored_rows
from cai_ray.training import launch, sft
from cai_ray.training.batches import epoch_order
from cai_ray.training.deepspeed import steps_in
from cai_ray.training.launch import RECORD, Job, _failed, _Follow, run_training
from cai_ray.training.liveness import Watch, rank_log
from cai_ray.training.loop import Checkpoints
from tests.training.rows import pair, revision

OPTIM = Optim(lr=2e-3, schedule="linear", warmup_fraction=0.2)
Write = Callable[[list[Row]], Path]


def sft_config(ranks: int = 1, stage: int = 0, tokens: int = 512, **fields: Any) -> SftConfig:
    sharding = Sharding(ranks=ranks, zero_stage=stage, dtype="float32", microbatch_tokens=tokens)  # type: ignore[arg-type]
    return SftConfig(**{"batch_size": 6, "max_tokens": 128, "optim": OPTIM, "sharding": sharding, **fields})


def job(
    out: Path, config: SftConfig | PreferenceModelConfig, model: Path, rows: list[Path], waits: tuple = (300.0, 300.0)
) -> Job:
    kind = "sft" if isinstance(config, SftConfig) else "preference_model"
    return Job(kind, config, model, "auto", tuple(rows), out, 7, "cpu", 0.01, *waits)


def lines(out: StageDir) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out.path / "metrics.jsonl").read_text().splitlines()]


def curve(out: StageDir, key: str = "train/loss") -> list[float]:
    return [line[key] for line in lines(out) if key in line]


def stage_dir(path: Path) -> StageDir:
    path.mkdir()
    return StageDir(path, seed=7)


@pytest.fixture
def rows(write_rows: Write) -> Path:
    return write_rows([revision(i) for i in range(20)])  # 15 train rows of two revisions: 5 steps of 6


@pytest.fixture
def run(ray_cluster: None, rows: Path, tiny: Path, tmp_path: Path) -> Callable[..., tuple[StageDir, dict[str, float]]]:
    def start(name: str, config: SftConfig, **how: Any) -> tuple[StageDir, dict[str, float]]:
        out = StageDir(tmp_path / name, 7) if (tmp_path / name).is_dir() else stage_dir(tmp_path / name)
        return out, run_training(job(out.path, config, tiny, [rows]), out, **how)

    return start


ROWS = 2 * 64  # tokens of a micro-batch of about two rows: the longest row here has 61
SPREAD = {"padded-2-ranks-zero-3": sft_config(2, 3, 2 * ROWS, packing=False)}  # what must not change the curve
REST = {
    f"{'packed' if packing else 'padded'}-{ranks}-ranks-zero-{stage}-{tokens}": sft_config(
        ranks, stage, tokens, packing=packing
    )
    for packing, ranks, stage, tokens in [
        *((packing, 1, 0, tokens) for packing in (True, False) for tokens in (64, ROWS, 2 * ROWS, 4096)),
        *((True, 1, stage, ROWS) for stage in (1, 2, 3)),
        *((stage % 2 == 0, 2, stage, ROWS) for stage in (0, 1, 2, 3)),
    ]
}


@pytest.fixture(scope="session")
def curve_of_reference() -> dict[str, Any]:
    """Filled by the first test that needs it."""
    return {}


@pytest.mark.parametrize("name", [*SPREAD, *(pytest.param(name, marks=pytest.mark.full) for name in REST)])
def test_layout_does_not_change_the_curve(name: str, run: Any, curve_of_reference: dict[str, Any]) -> None:
    if not curve_of_reference:  # all rows of a step in one pack on one rank
        out, metrics = run("reference", twenty(sft_config(tokens=4096)))
        assert (metrics["steps"], metrics["train_examples"]) == (20, 30)
        assert metrics["train_examples/round-1"] == metrics["train_examples/round-2"] == 15
        assert [line["step"] for line in lines(out)] == [0, *range(20), 20]  # held-out rows before and after
        before, after = curve(out, "eval/loss")
        assert after < before
        assert metrics["eval/loss"] == after
        for key in ("train/loss", "train/grad_norm", "eval/loss"):
            curve_of_reference[key] = curve(out, key)
        curve_of_reference["weights"] = load_file(out.path / "model" / "model.safetensors")
    out, _ = run(name, twenty((SPREAD | REST)[name]))
    for key in ("train/loss", "train/grad_norm", "eval/loss"):
        assert curve(out, key) == pytest.approx(curve_of_reference[key], rel=1e-5)
    weights, expected = load_file(out.path / "model" / "model.safetensors"), curve_of_reference["weights"]
    assert weights.keys() == expected.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-5)


def twenty(config: SftConfig) -> SftConfig:
    """The same for 20 steps at lr 1e-4."""
    optim = Optim(lr=1e-4, schedule="linear", warmup_fraction=0.2)
    return config.model_copy(update={"epochs": 4, "optim": optim})


def test_a_loss_that_is_not_finite_stops_before_the_step(
    ray_cluster: None, rows: Path, tiny: Path, tmp_path: Path
) -> None:
    model, out = tmp_path / "broken", stage_dir(tmp_path / "sft")
    shutil.copytree(tiny, model)
    state = load_file(model / "model.safetensors")
    state["model.norm.weight"][0] = torch.nan
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    config = sft_config(2, 2, mix=Mix(revisions=(1.0, 0.5)))
    with pytest.raises(StageFailed, match=r"the loss of step 1 is nan; the tokens of its rows are in .*step-000001"):
        run_training(job(out.path, config, model, [rows]), out)
    assert curve(out) == []
    assert not (out.path / "model").exists()
    text = (out.logs / "step-000001.json").read_text()
    saved = json.loads(text)
    assert len(saved) == 6
    assert all(e["id"] and len(e["ids_T"]) == len(e["loss_mask_T"]) > 10 for e in saved)
    assert "What is" not in text


def test_a_truncated_file_of_rows_is_an_error(rows: Path) -> None:
    file = rows / "part-1.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        list(stored_rows(rows, sft.COLUMNS))


def test_chat_without_a_template_is_an_error(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "base"
    shutil.copytree(tiny, model, ignore=shutil.ignore_patterns("chat_template*"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="has no chat template"):
        Tokenizer.load(model, "chat")


@pytest.mark.full
def test_killed_driver_and_killed_rank_end_like_an_uninterrupted_run(run: Any) -> None:
    config = sft_config(checkpoint_every=4, epochs=8)  # 40 steps last long enough to be interrupted twice
    reference, _ = run("whole", config)
    passed_on: list[int] = []

    class Crash(BaseException):
        pass

    def crash(epoch: float, epochs: float | None, words: str) -> None:
        if list((reference.path.parent / "broken" / "checkpoints" / "train").glob("checkpoint_2*/state.json")):
            raise Crash

    with pytest.raises(Crash):
        run("broken", config, on_progress=crash)
    out = StageDir(reference.path.parent / "broken", 7)
    assert not (out.path / "model").exists()
    assert list((out.checkpoints / "train").glob("checkpoint_2*"))

    def kill(epoch: float, epochs: float | None, words: str) -> None:
        passed_on.append(round(epoch * 5))
        if len(passed_on) == 1:
            pids = re.findall(r"process (\d+)", (out.logs / "rank-0.log").read_text())
            os.kill(int(pids[-1]), signal.SIGKILL)

    run("broken", config, on_progress=kill)
    assert curve(out) == curve(reference)
    assert curve(out, "train/lr") == curve(reference, "train/lr")
    assert passed_on == sorted(set(passed_on))  # trackers see no step twice
    weights, expected = (load_file(o.path / "model" / "model.safetensors") for o in (out, reference))
    for key, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=0)


def test_after_a_kill_at_any_moment_the_losses_are_those_of_an_uninterrupted_run(run: Any) -> None:
    today = date.today().isoformat()
    draw = random.Random(today)
    config = sft_config(2, draw.choice((1, 2, 3)), 256, checkpoint_every=4, epochs=5)
    step, rank, delay = draw.randrange(1, 16), draw.randrange(2), draw.random() / 3  # of 25 steps
    print(f"{today}: ZeRO {config.sharding.zero_stage}, rank {rank} is killed {delay:.2f} s after step {step}")
    reference, _ = run("whole", config.model_copy(update={"checkpoint_every": 1000}))
    kills: list[int] = []
    out = StageDir(reference.path.parent / "killed", 7)

    def kill(epoch: float, epochs: float | None, words: str) -> None:
        if round(epoch * 5) >= step and not kills:
            time.sleep(delay)
            kills.append(process_of(out, rank))
            os.kill(kills[0], signal.SIGKILL)

    run("killed", config, on_progress=kill)
    assert kills
    assert kills[0] != process_of(out, rank)  # another process has finished the work
    for key in ("train/loss", "train/lr", "train/grad_norm", "eval/loss"):
        assert curve(out, key) == curve(reference, key)
    weights, expected = (load_file(o.path / "model" / "model.safetensors") for o in (out, reference))
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)


@pytest.mark.full
@pytest.mark.parametrize("moment", ["written", "copied"])
def test_a_rank_that_dies_amid_its_checkpoint_leaves_none_that_is_loaded(moment: str, run: Any) -> None:
    config = sft_config(2, 2, 256, checkpoint_every=4, epochs=5)
    reference, _ = run("whole", config.model_copy(update={"checkpoint_every": 1000}))
    out = stage_dir(reference.path.parent / "killed")
    scratch = Path(tempfile.gettempdir()) / f"{Checkpoints(out.path, 0, config)._scratch}8"
    cut, ended = [], threading.Event()

    def watch() -> None:
        while not cut and not ended.wait(0.001):
            copies = sorted(out.checkpoints.glob("train/checkpoint_2*"))
            for folder in [scratch] if moment == "written" else copies[1:]:
                if list(folder.glob("shards/*")) and steps_in(folder) is None:
                    cut.append(folder)
                    os.kill(process_of(out, 0), signal.SIGKILL)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run("killed", config)
    ended.set()
    watcher.join()
    assert cut
    assert set(re.findall(r"continues after step (\d+)", (out.logs / "rank-0.log").read_text())) <= {"4"}
    assert curve(out) == curve(reference)
    weights, expected = (load_file(o.path / "model" / "model.safetensors") for o in (out, reference))
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)


def process_of(out: StageDir, rank: int) -> int:
    return int(re.findall(r"process (\d+)", (out.logs / f"rank-{rank}.log").read_text())[-1])


@pytest.mark.full
@pytest.mark.parametrize("record_too", [False, True])
def test_the_best_checkpoints_and_the_last_are_kept_and_a_damaged_one_is_passed_over(
    record_too: bool, run: Any
) -> None:
    class Crash(BaseException):
        pass

    def crash(epoch: float, epochs: float | None, words: str) -> None:
        if epoch == 2:
            time.sleep(3)  # until the last checkpoint has arrived
            raise Crash

    def kept(out: StageDir) -> dict[int, Path]:
        states = out.checkpoints.glob("train/checkpoint_2*/state.json")
        return {json.loads(state.read_text())["steps_done"]: state.parent for state in states}

    config = sft_config(checkpoint_every=2, keep_checkpoints=2, epochs=2)
    reference, _ = run("whole", config)
    losses = {line["step"]: line["eval/loss"] for line in lines(reference) if line.get("eval/loss") and line["step"]}
    assert {*sorted(losses, key=lambda step: losses[step])[:2], 10} == set(kept(reference))
    with pytest.raises(Crash):
        run("broken", config, on_progress=crash)
    out = StageDir(reference.path.parent / "broken", 7)
    *_, second, last = sorted(kept(out))
    largest = max((kept(out)[last] / "shards").iterdir(), key=lambda p: p.stat().st_size)
    os.truncate(largest, 1000)
    if record_too:
        os.truncate(out.checkpoints / "train" / RECORD, 100)
    run("broken", config)
    assert f"continues after step {second}" in (out.logs / "rank-0.log").read_text()
    assert curve(out) == curve(reference)


@pytest.mark.full
def test_a_clock_too_asks_for_checkpoints(run: Any) -> None:
    out, _ = run("minutes", sft_config(checkpoint_minutes=1e-9, checkpoint_every=1000))
    assert json.loads(next(out.checkpoints.glob("train/checkpoint_2*/state.json")).read_text())["steps_done"] == 5


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_another_number_of_ranks_goes_on_to_rounding(stage: int, run: Any) -> None:
    class Crash(BaseException):
        pass

    def crash(epoch: float, epochs: float | None, words: str) -> None:
        if epoch >= 0.6:
            time.sleep(3)
            raise Crash

    with pytest.raises(Crash):
        run("broken", sft_config(1, stage, checkpoint_every=1, epochs=8), on_progress=crash)
    out, _ = run("broken", sft_config(2, stage, 256, epochs=8))
    (step,) = re.findall(r"continues after step (\d+)", (out.logs / "rank-0.log").read_text())
    assert int(step) < 40  # it has something left to do
    reference, _ = run("whole", sft_config(2, stage, 256, epochs=8))
    assert curve(out) == pytest.approx(curve(reference), rel=1e-4)


def test_a_preference_model_learns_and_carries_its_reward_scale(
    ray_cluster: None, write_rows: Write, tiny: Path, tmp_path: Path
) -> None:
    from cai_ray.models.checkpoints import load_scalar_model

    rows, out = write_rows([pair(i) for i in range(40)]), stage_dir(tmp_path / "preference_model")
    sharding = Sharding(ranks=1, dtype="float32", microbatch_tokens=1024)
    config = PreferenceModelConfig(batch_size=10, max_tokens=128, optim=OPTIM, sharding=sharding, epochs=2)
    metrics = run_training(job(out.path, config, tiny, [rows]), out)
    before, after = curve(out, "eval/loss")
    assert after < before
    assert {"eval/accuracy", "eval/accuracy/s0", "eval/accuracy/s1", "eval/calibration_error"} <= metrics.keys()
    assert curve(out, "eval/accuracy_response_only") == [metrics["eval/accuracy_response_only"]]  # once, after training
    assert metrics["train_examples/s0"] + metrics["train_examples/s1"] == metrics["train_examples"] == 30
    saved = load_scalar_model(out.path / "model", "float32").config
    assert (saved.reward_mean, saved.reward_std) == (metrics["reward_mean"], metrics["reward_std"])
    assert saved.reward_std > 0
    assert saved.pad_token_id != saved.eos_token_id


@pytest.mark.full
def test_adapters_lie_beside_the_merged_model(run: Any, tiny: Path) -> None:
    from peft import PeftModel

    from cai_ray.models.checkpoints import load_causal_lm

    out, metrics = run("lora", sft_config(2, 3, 256, lora=Lora(rank=4), optim=Optim(lr=0.01)))
    before, after = curve(out, "eval/loss")
    assert after < before
    assert metrics["eval/loss"] == after
    base, merged = (load_causal_lm(folder, "float32").eval() for folder in (tiny, out.path / "model"))
    ids = torch.arange(100, 140).reshape(2, 20)
    with torch.no_grad():
        expected, adapted = merged(ids).logits, PeftModel.from_pretrained(base, out.path / "adapter")(ids).logits
    torch.testing.assert_close(adapted, expected, rtol=1e-5, atol=1e-5)
    assert {"model/config.json", "adapter/adapter_config.json"} <= {entry["path"] for entry in out.outputs()}


@pytest.mark.full
def test_ranks_that_pass_unequally_many_parts_learn_the_same(
    ray_cluster: None, write_rows: Write, tiny: Path, tmp_path: Path
) -> None:
    def long(i: int) -> Row:
        row = revision(i)
        ask = {"role": "user", "content": f"What is {i} plus {i}?" + " Take your time." * (60 + 60 * (i % 4))}
        return {**row, "id": row_id([ask]), "messages": [ask]}

    rows, tokenizer = [long(i) for i in range(12)], Tokenizer.load(tiny)
    folder = write_rows(rows)
    lengths = [len(tokenizer.hf(row["messages"][0]["content"])["input_ids"]) for row in rows]
    assert 3 * min(lengths) < CPU_TOKENS < 3 * max(lengths)  # three documents a rank: some fit one part
    found = []
    for name, layout in {"plain": (1, 0, 1024), "zero-2": (2, 2, 8192)}.items():
        out = stage_dir(tmp_path / name)
        run_training(job(out.path, sft_config(*layout, max_tokens=1024), tiny, [folder]), out)
        found.append((curve(out), curve(out, "train/grad_norm")))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)


@pytest.mark.full
def test_ranks_and_stage_do_not_change_a_preference_model(
    ray_cluster: None, write_rows: Write, tiny: Path, tmp_path: Path
) -> None:
    rows, found = write_rows([pair(i) for i in range(24)]), []
    for name, layout in {"plain": (1, 0, 4096), "zero-3": (2, 3, 256)}.items():
        sharding = Sharding(ranks=layout[0], zero_stage=layout[1], dtype="float32", microbatch_tokens=layout[2])  # type: ignore[arg-type]
        config = PreferenceModelConfig(batch_size=6, max_tokens=128, optim=OPTIM, sharding=sharding)
        out = stage_dir(tmp_path / name)
        metrics = run_training(job(out.path, config, tiny, [rows]), out)
        found.append(
            (curve(out), curve(out, "eval/loss"), metrics["reward_std"], metrics["eval/accuracy_response_only"])
        )
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)
    assert found[1][2:] == pytest.approx(found[0][2:], rel=1e-3)


def test_rows_without_a_train_split_are_an_error_that_is_not_retried(
    ray_cluster: None, write_rows: Write, tiny: Path, tmp_path: Path
) -> None:
    rows, out = write_rows([revision(i, split="test") for i in range(4)]), stage_dir(tmp_path / "sft")
    with pytest.raises(DataError, match="no training rows"):
        run_training(job(out.path, sft_config(), tiny, [rows]), out)


@pytest.mark.full
def test_a_rank_that_hangs_is_named_and_the_one_that_waits_for_it_is_not(
    ray_cluster: None, rows: Path, tiny: Path, tmp_path: Path
) -> None:
    out = stage_dir(tmp_path / "hangs")

    def stop(epoch: float, epochs: float | None, words: str) -> None:
        os.kill(process_of(out, 1), signal.SIGSTOP)

    with pytest.raises(StageFailed, match=r"training ranks 1 have not answered for 30 s"):
        run_training(job(out.path, sft_config(2, 2, 256, epochs=20), tiny, [rows], (300.0, 30.0)), out, stop)


@pytest.mark.full
def test_a_lost_node_is_named(ray_cluster: None, rows: Path, tiny: Path, tmp_path: Path) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    started = [Path(sys.executable).with_name("ray"), "start", f"--address={address}", "--num-cpus=6", "--block"]
    with subprocess.Popen(started, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as node:
        out = stage_dir(tmp_path / "lost")

        def lose(epoch: float, epochs: float | None, words: str) -> None:
            for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
                process.kill()

        try:
            while sum(n["Alive"] for n in ray.nodes()) < 2:
                time.sleep(0.5)
            config = sft_config(2, 2, 256, epochs=20)  # 5 CPUs a rank: one on each node
            sharding = config.sharding.model_copy(update={"cpus_per_rank": 5})
            config = config.model_copy(update={"sharding": sharding})
            with pytest.raises(StageFailed, match="nodes lost meanwhile: "):
                run_training(job(out.path, config, tiny, [rows], (150.0, 40.0)), out, lose)
        finally:
            node.kill()


def test_lack_of_memory_is_explained(tmp_path: Path, tiny: Path) -> None:
    class Failed(Exception):
        worker_failures: ClassVar = {1: RuntimeError("a trace\ntorch.OutOfMemoryError: CUDA out of memory. Tried …")}

    config = sft_config(2, 2, 256)
    error = _failed(Failed(), job(tmp_path, config, tiny, []))
    assert "rank 1: torch.OutOfMemoryError: CUDA out of memory" in error.message
    assert re.search(
        r"weights 0\.01 \+ gradients 0\.01/2 \+ optimizer 0\.\d+/2 \+ activations .* = \d+\.\d GiB", error.message
    )
    for dial in ("microbatch_tokens (it is 256)", "gradient_checkpointing=true", "zero_stage (it is 2)"):
        assert dial in error.fix
    Failed.worker_failures = {1: RuntimeError("another\nreason")}
    assert "memory of a rank" not in str(_failed(Failed(), job(tmp_path, config, tiny, [])))


@pytest.mark.full
def test_a_rank_that_runs_out_of_memory_says_so(
    ray_cluster: None, write_rows: Write, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system refuses the memory that the last step needs, whose row is far longer than the others."""
    monkeypatch.setattr(launch, "MAX_FAILURES", 0)  # the limit is on one process, and not on the next
    model = load_causal_lm(tiny, "float32")
    model.config.intermediate_size = 8192  # 134 MB for each of the MLP's results over 4,000 tokens
    model = type(model)(model.config)
    save_pretrained(model.state_dict().items(), model.config, Tokenizer.load(tiny), tmp_path / "wide")
    rows = [{**revision(i), "split": "train"} for i in range(400)]
    of = {name: row for row in rows for name, *_ in answers(row, "last")}
    ids, out, limited = sorted(of), stage_dir(tmp_path / "sft"), []
    of[ids[epoch_order(ids, 7, 0)[-1]]]["rounds"][-1]["revision"] = "Yes. " * 2000

    def limit(epoch: float, epochs: float | None, words: str) -> None:
        if (pid := process_of(out, 0)) not in limited:
            limited.append(pid)
            process = psutil.Process(pid)
            process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + 2**27,) * 2)  # type: ignore[arg-type]

    config = sft_config(tokens=5000, batch_size=2, max_tokens=5000, rounds="last")
    with pytest.raises(StageFailed, match=r"rank 0: .*memory.*\n.*memory of a rank: .*activations") as error:
        run_training(job(out.path, config, tmp_path / "wide", [write_rows(rows)]), out, limit)
    assert "microbatch_tokens (it is 5000)" in error.value.fix
    assert lines(out)[-1]["step"] == 198  # of 0 to 199


# ---- watching and following, without Ray ----------------------------------------------------------------------------


def test_ranks_that_never_start_or_fall_silent_are_named(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    logs = [rank_log(StageDir(tmp_path), rank) for rank in (0, 1)]
    watch = Watch(logs, start_s=0.0, step_s=1000.0)
    logs[0].write_text("up")
    time.sleep(0.01)
    with pytest.raises(StageFailed, match="ranks 1 have not started for 0 s"):
        watch()
    logs[1].write_text("up")
    watch()  # both have been seen now, and the limit of a step is long
    watch = Watch(logs, start_s=1000.0, step_s=0.0)
    for rank, log in enumerate(logs):
        os.utime(log, ns=(0, rank + 1))
    watch()
    os.utime(logs[0], ns=(0, 99))
    time.sleep(0.01)
    with pytest.raises(StageFailed, match="ranks 1 have not answered for 0 s"):
        watch()


def test_following_passes_on_every_step_once(tmp_path: Path) -> None:
    seen: list[int] = []
    out = StageDir(tmp_path)
    out.on_metrics = lambda step, values: seen.append(step)

    def write(steps: list[int], end: str = "\n", mode: str = "a") -> None:
        with (tmp_path / "metrics.jsonl").open(mode) as file:
            file.write("".join(json.dumps({"step": s, "time": 0.0, "eval/loss": 1.0}) + end for s in steps))

    follow = _Follow(out, 1.0, None)
    follow()
    write([0, 1])
    write([2], end="")
    follow()
    assert seen == [0, 1]  # a line that is being written waits
    write([], mode="a")
    (tmp_path / "metrics.jsonl").open("a").write("\n")
    follow()
    assert seen == [0, 1, 2]
    (tmp_path / "metrics.jsonl").unlink()  # the ranks restart at step 1: the file is written anew
    write([0, 1, 2, 3])
    follow()
    assert seen == [0, 1, 2, 3]
    _Follow(out, 1.0, None)()  # a later attempt's driver does not repeat what an earlier one passed on
    assert seen == [0, 1, 2, 3]
