"""The sharded model on one rank: the same steps as plain torch at every ZeRO stage; what it refuses, saves, exports."""

import copy
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from cai_ray.config import Optim, Sharding
from cai_ray.errors import StageFailed
from cai_ray.training import sft
from cai_ray.training.deepspeed import ShardedModel, learning_rate, loading, steps_in
from tests.training.ranks import on_ranks

CPU = torch.device("cpu")
OPTIM = Optim(lr=0.01, schedule="linear", weight_decay=0.1, max_grad_norm=0.5)
STEPS = 4
pytestmark = pytest.mark.usefixtures("one_rank")


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def sharded(model: nn.Module, stage: int, **fields: Any) -> ShardedModel:
    sharding = Sharding(zero_stage=stage, **{"dtype": "float32", **fields})  # type: ignore[arg-type]
    return ShardedModel(model, OPTIM, sharding, STEPS, CPU)


def micro_losses(model: Any, step: int) -> Iterator[Tensor]:
    """Two micro-batches of unequal size; each loss is a part of the step's mean."""
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
    for part in (x[:4], x[4:]):
        yield (model(part)[:, 0] - part.sum(1)).square().sum() / len(x)


def take_step(model: ShardedModel, step: int) -> tuple[float, float]:
    loss = 0.0
    for part in micro_losses(model.module, step):
        model.backward(part)
        loss += float(part.detach())
    return loss, model.step()


def weights(model: ShardedModel) -> list[Tensor]:
    return [p.clone() for _, p in model.full_parameters()]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_steps_are_those_of_plain_torch(stage: int) -> None:
    model, plain = sharded(small_model(), stage), small_model()
    decayed, rest = [p for p in plain.parameters() if p.ndim > 1], [p for p in plain.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}])
    for step in range(STEPS):
        for group in adamw.param_groups:
            group["lr"], group["betas"] = 0.01 * (1 - step / STEPS), (0.9, 0.95)
        adamw.zero_grad()
        expected = torch.stack(list(micro_losses(plain, step))).sum()
        expected.backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        adamw.step()
        assert take_step(model, step) == pytest.approx((float(expected.detach()), float(norm)), rel=1e-5)
        assert float(norm) > 0.5  # clipping took part
    torch.testing.assert_close(weights(model), [p.detach() for p in plain.parameters()], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stage", [0, 3])
def test_matrices_decay_also_where_they_are_cut_as_they_are_read(stage: int, tiny: Path) -> None:
    sharding = Sharding(zero_stage=stage, dtype="float32")
    with loading(sharding, OPTIM, CPU):
        module = sft.load(tiny, "float32", 0)
    model = ShardedModel(module, OPTIM, sharding, STEPS, CPU)
    before = {name: p.clone() for name, p in model.full_parameters()}
    ids_1T = torch.arange(20, 24)[None]
    logprobs_N, _ = model.module(ids_1T, [4], torch.tensor([[False, True, True, True]]))
    model.backward(logprobs_N.sum() * 0)
    model.step()
    assert {p.ndim for p in before.values()} == {1, 2}
    for name, p in model.full_parameters():
        kept = 1 - OPTIM.lr * OPTIM.weight_decay if p.ndim > 1 else 1
        torch.testing.assert_close(p, before[name] * kept, rtol=1e-6, atol=0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_changes_no_weight(stage: int) -> None:
    model = sharded(small_model(), stage)
    take_step(model, 0)
    before = weights(model)
    model.backward(sum(micro_losses(model.module, 1), torch.zeros(())) * math.nan)
    with pytest.raises(StageFailed, match="step 2 is not finite"):
        model.step()
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_loaded_model_goes_on_as_if_nothing_had_happened(stage: int, tmp_path: Path) -> None:
    model = sharded(small_model(), stage)
    for step in range(2):
        take_step(model, step)
    model.save(tmp_path)
    again = sharded(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), stage)
    again.load(tmp_path)
    assert (again.steps_done, again.lr) == (2, model.lr)
    for step in range(2, STEPS):
        assert take_step(again, step) == take_step(model, step)
    torch.testing.assert_close(weights(again), weights(model), rtol=0, atol=0)


def two_steps_of_two_ranks(rank: int, stage: int, folder: Path) -> None:
    model = sharded(small_model(), stage)
    for step in range(2):
        model.backward(list(micro_losses(model.module, step))[rank])
        model.step()
    model.save(folder)


@pytest.mark.parametrize("stage", [*(pytest.param(n, marks=pytest.mark.full) for n in (0, 1, 2)), 3])
def test_another_number_of_ranks_goes_on_with_the_same_moments(stage: int, tmp_path: Path) -> None:
    on_ranks(2, two_steps_of_two_ranks, stage, tmp_path)
    model, again = sharded(small_model(), stage), sharded(small_model(), stage)
    for step in range(2):
        take_step(model, step)
    again.load(tmp_path)
    for step in range(2, STEPS):
        assert take_step(again, step) == pytest.approx(take_step(model, step), rel=1e-5)
    torch.testing.assert_close(weights(again), weights(model), rtol=1e-5, atol=1e-7)


def test_a_checkpoint_of_another_stage_or_dtype_is_refused(tmp_path: Path) -> None:
    sharded(small_model(), 2).save(tmp_path)
    with pytest.raises(StageFailed, match=r"dtype float32, this run has bfloat16.*\n?.*set it back"):
        sharded(small_model(), 2, dtype="bfloat16").load(tmp_path)
    sharded(small_model(), 0).save(tmp_path)
    with pytest.raises(StageFailed, match=r"zero_stage 0, this run has 2"):
        sharded(small_model(), 2).load(tmp_path)


@pytest.mark.parametrize("spoil", ["cut", "remove", "unfinished"])
def test_a_damaged_checkpoint_is_known_as_one(spoil: str, tmp_path: Path) -> None:
    model = sharded(small_model(), 2)
    take_step(model, 0)
    model.save(tmp_path)
    assert steps_in(tmp_path) == 1
    largest = max((tmp_path / "shards").iterdir(), key=lambda p: p.stat().st_size)
    if spoil == "cut":
        os.truncate(largest, largest.stat().st_size - 1)
    else:
        (largest if spoil == "remove" else tmp_path / "state.json").unlink()
    assert steps_in(tmp_path) is None


def test_a_users_deepspeed_options_replace_ours_and_leave_the_rest() -> None:
    given = {"zero_optimization": {"reduce_bucket_size": 12345, "stage": "auto"}, "steps_per_print": 7}
    config = sharded(small_model(), 2, deepspeed=given).module._config
    assert (config.zero_config.reduce_bucket_size, config.steps_per_print) == (12345, 7)
    assert (config.zero_optimization_stage, config.gradient_clipping) == (2, 0.5)
    assert config.zero_config.allgather_bucket_size == 50_000_000


@pytest.mark.parametrize(
    ("stage", "fields"), [(2, ("offload_optimizer",)), (3, ("offload_optimizer", "offload_parameters"))]
)
def test_offloading_changes_no_step(stage: int, fields: tuple[str, ...]) -> None:
    plain, offloaded = sharded(small_model(), stage), sharded(small_model(), stage, **dict.fromkeys(fields, True))
    config = offloaded.module._config.zero_config
    assert config.offload_optimizer.device == "cpu"
    assert (config.offload_param is not None) == ("offload_parameters" in fields)
    for step in range(STEPS):
        assert take_step(offloaded, step) == pytest.approx(take_step(plain, step), rel=1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_states_that_rest_between_steps_change_none(stage: int, tmp_path: Path) -> None:
    plain, resting = sharded(small_model(), stage), sharded(small_model(), stage)
    for step in range(STEPS):
        resting.offload()
        x = torch.ones(1, 4)
        torch.testing.assert_close(resting.module(x), plain.module(x), rtol=0, atol=0)  # weights are at hand
        resting.reload()
        assert take_step(resting, step) == take_step(plain, step)
        resting.offload()
        resting.save(tmp_path / str(step))  # from where they rest
        resting.reload()
        take_step(resting, step + 1)
        resting.load(tmp_path / str(step))
    resting.offload()
    torch.testing.assert_close(weights(resting), weights(plain), rtol=0, atol=0)


@pytest.mark.parametrize("stage", [2, 3])
def test_rotary_frequencies_stay_exact_in_bfloat16(stage: int, tiny: Path) -> None:
    from cai_ray.models.checkpoints import load_causal_lm

    sharding = Sharding(zero_stage=stage, dtype="bfloat16")  # type: ignore[arg-type]
    with loading(sharding, OPTIM, CPU):
        module = sft.load(tiny, "bfloat16", 0)
    model, plain = ShardedModel(module, OPTIM, sharding, STEPS, CPU), load_causal_lm(tiny, "float32")
    found = {name: buffer for name, buffer in model.hf.named_buffers() if name.endswith("inv_freq")}
    assert found
    for name, buffer in found.items():
        torch.testing.assert_close(buffer, plain.get_buffer(name), rtol=0, atol=0)


def test_bfloat16_keeps_float32_master_weights() -> None:
    linear = nn.Linear(4, 1, bias=False)
    nn.init.ones_(linear.weight)
    model = sharded(linear, 0, dtype="bfloat16")
    model._optim = Optim(lr=3e-4)  # below 1, bfloat16 numbers are 0.0039 apart: one step is lost in them, ten are not
    x, seen = torch.ones(1, 4, dtype=torch.bfloat16), []
    for _ in range(10):
        model.backward(model.module(x).sum())
        model.step()
        seen += weights(model)
    assert seen[0].dtype == torch.bfloat16
    assert (seen[0] == 1).all()
    assert (seen[-1] < 1).all()


@pytest.mark.parametrize("stage", [0, 3])
def test_export_is_a_model_folder_with_tied_weights_once(
    stage: int, tiny: Path, tokenizer: Any, tmp_path: Path
) -> None:
    from cai_ray.models.checkpoints import load_causal_lm

    module = sft.load(tiny, "float32", 0)
    expected = copy.deepcopy(module.hf.state_dict())
    model = sharded(module, stage, gradient_checkpointing=True)
    model.export(tokenizer, tmp_path / "model", {"reward_mean": 1.5})
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(expected) - {"lm_head.weight"}
    loaded = load_causal_lm(tmp_path / "model", "float32")
    assert loaded.config.reward_mean == 1.5
    torch.testing.assert_close(dict(loaded.state_dict()), dict(expected), rtol=0, atol=0)


def test_schedules_by_hand() -> None:
    warm = Optim(lr=1.0, schedule="linear", warmup_fraction=0.2)  # 10 steps: 2 of warm-up, then 8 down to 0
    assert [learning_rate(warm, i, 10) for i in range(4)] == pytest.approx([1 / 3, 2 / 3, 1.0, 7 / 8])
    assert learning_rate(warm, 9, 10) == pytest.approx(1 / 8)
    assert learning_rate(Optim(lr=1.0, schedule="cosine"), 5, 10) == pytest.approx(0.5)
    assert [learning_rate(Optim(lr=2.0), i, 3) for i in range(3)] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("stage", [0, 3])
def test_utilisation_is_six_flops_a_parameter_and_token_of_a_known_peak(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sharded(small_model(), stage)  # 4 x 8 + 8 + 8 + 1 parameters
    assert model.mfu(1000, 2.0) == {}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    model.device = torch.device("cuda")
    assert model.mfu(1000, 2.0) == {"mfu": pytest.approx(6 * 49 * 1000 / 2 / 989e12)}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 PCIe")
    assert model.mfu(1000, 2.0) == {"mfu": pytest.approx(6 * 49 * 1000 / 2 / 756e12)}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Another")
    assert model.mfu(1000, 2.0) == {}
