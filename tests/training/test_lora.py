"""Adapters: what is trained, the merged model, the folder that peft loads, at every ZeRO stage."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cai_ray.config import Lora, Optim, PreferenceModelConfig, SftConfig, Sharding
from cai_ray.errors import ConfigError
from cai_ray.models.checkpoints import load_causal_lm, load_scalar_model
from cai_ray.training import preference, sft
from cai_ray.training.deepspeed import ShardedModel, loading
from cai_ray.training.lora import add_adapters
from tests.training.rows import pair, revision

pytestmark = pytest.mark.usefixtures("one_rank")
CPU = torch.device("cpu")
IDS = torch.arange(20, 52).reshape(2, 16)


def train(task: Any, stage: int, lora: Lora, base: Path, tokenizer: Any, out: Path) -> ShardedModel:
    """Two steps, then both exports."""
    optim, sharding = Optim(lr=0.01), Sharding(zero_stage=stage, dtype="float32")  # type: ignore[arg-type]
    config: Any = SftConfig() if task is sft else PreferenceModelConfig()
    batch = [e for i in range(4) for e in task.examples((revision if task is sft else pair)(i), tokenizer, config)]
    with loading(sharding, optim, CPU):
        module = task.load(base, "float32", 5)
        add_adapters(module.hf, lora, base, 6)
    model = ShardedModel(module, optim, sharding, 2, CPU)
    for _ in range(2):
        tensors = task.collate(batch, CPU, config)
        model.backward(task.loss(model.module, batch, tensors, config, sum(e.units for e in batch)))
        model.step()
    model.export_adapter(out / "adapter")
    model.export(tokenizer, out / "model")
    return model


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_peft_reads_the_adapter_and_gives_the_merged_models_logits(
    stage: int, tiny: Path, tokenizer: Any, tmp_path: Path
) -> None:
    from peft import PeftModel

    train(sft, stage, Lora(rank=4, alpha=8), tiny, tokenizer, tmp_path)
    base, merged = (load_causal_lm(folder, "float32").eval() for folder in (tiny, tmp_path / "model"))
    with torch.no_grad():
        start, expected = base(IDS).logits, merged(IDS).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")(IDS).logits
    torch.testing.assert_close(adapted, expected, rtol=1e-5, atol=1e-5)
    assert (expected - start).abs().max() > 1e-3  # it has learned something
    before, after = load_file(tiny / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("stage", [0, 3])
def test_a_preference_models_head_is_trained_whole(stage: int, tiny: Path, tokenizer: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    train(preference, stage, Lora(target_modules=("q_proj", "v_proj")), tiny, tokenizer, tmp_path)
    merged, fresh = load_scalar_model(tmp_path / "model", "float32").eval(), load_scalar_model(tiny, "float32", seed=5)
    head: Any = merged.get_submodule("score")
    assert not torch.equal(head.weight, fresh.get_submodule("score").weight)  # type: ignore[arg-type]
    base = load_scalar_model(tiny, "float32", seed=9).eval()  # another head: the adapter brings its own
    with torch.no_grad():
        expected, adapted = merged(IDS).logits, PeftModel.from_pretrained(base, tmp_path / "adapter")(IDS).logits
    torch.testing.assert_close(adapted, expected, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (16, 32, "SEQ_CLS")
    assert config["base_model_name_or_path"] == str(tiny)


@pytest.mark.parametrize(("name", "message"), [("nonesuch", "nonesuch"), ("lm_head", "reaches lm_head")])
def test_target_modules_that_cannot_be_trained_are_refused(name: str, message: str, tiny: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        add_adapters(load_causal_lm(tiny, "float32"), Lora(target_modules=(name,)), tiny, 0)


def test_a_checkpoint_holds_adapters_too(tiny: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = train(sft, 2, Lora(rank=4), tiny, tokenizer, tmp_path / "first")
    model.save(tmp_path / "checkpoint")
    module, optim = sft.load(tiny, "float32", 5), Optim(lr=0.01)
    add_adapters(module.hf, Lora(rank=4), tiny, 7)
    again = ShardedModel(module, optim, Sharding(zero_stage=2, dtype="float32"), 2, CPU)
    again.load(tmp_path / "checkpoint")
    again.export(tokenizer, tmp_path / "again")
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("first/model", "again"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
