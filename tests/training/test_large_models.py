"""A model under ZeRO-3 is never whole in one rank: not while it is read, not while it is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from cai_ray.config import Lora, Optim, Sharding
from cai_ray.errors import DataError
from cai_ray.models.memory import RETURN_MEMORY
from tests.training.ranks import on_ranks, peak_growth

OPTIM, ZERO_3 = Optim(lr=1e-3), Sharding(zero_stage=3, dtype="float32", ranks=2)
CPU = torch.device("cpu")


def make_model(folder: Path, **sizes: int) -> int:
    """Writes a random Llama; returns its bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8192, **sizes))
    model.save_pretrained(folder)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def load_and_export(rank: int, folder: Path, tiny: Path, out: Path) -> None:
    from cai_ray.models import checkpoints
    from cai_ray.models.tokenization import Tokenizer
    from cai_ray.training import sft
    from cai_ray.training.deepspeed import ShardedModel, loading
    from cai_ray.training.lora import add_adapters

    checkpoints.SHARD_BYTES = 1 << 26
    with peak_growth() as load, loading(ZERO_3, OPTIM, CPU):
        module = sft.load(folder, "float32", 0)
        add_adapters(module.hf, Lora(rank=2), folder, 0)  # so that gradients and optimizer state take no memory
    model = ShardedModel(module, OPTIM, ZERO_3, 1, CPU)
    with peak_growth() as export:
        model.export(Tokenizer.load(tiny), out / "model")
    (out / f"{rank}.json").write_text(json.dumps({"load": load[0], "export": export[0]}))


@pytest.mark.full
def test_two_ranks_load_and_save_a_model_in_less_than_three_quarters_of_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in RETURN_MEMORY.items():  # as for the ranks of a run
        monkeypatch.setenv(name, value)
    size = make_model(
        tmp_path / "large", hidden_size=1024, intermediate_size=4096, num_hidden_layers=14, num_attention_heads=8
    )
    on_ranks(2, load_and_export, tmp_path / "large", tiny, tmp_path)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        print(f"rank {rank} of a model of {size / 1e9:.2f} GB: {found}")
        assert found["load"] < 0.75 * size
        assert found["export"] < 0.25 * size  # beside the half that it holds already
    before = safe_open(tmp_path / "large" / "model.safetensors", "pt")
    placed = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(before.keys()) == placed.keys()
    assert len({*placed.values()}) > 4
    for name, file in placed.items():
        after = safe_open(tmp_path / "model" / file, "pt")
        torch.testing.assert_close(after.get_tensor(name), before.get_tensor(name), rtol=0, atol=0)


def load_a_misfit(rank: int, folder: Path) -> None:
    from cai_ray.training import sft
    from cai_ray.training.deepspeed import loading

    with pytest.raises(DataError, match="cannot be loaded"), loading(ZERO_3, OPTIM, CPU):
        sft.load(folder, "float32", 0)


def test_a_model_that_does_not_fit_its_configuration_fails_on_every_rank(tmp_path: Path) -> None:
    make_model(tmp_path, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config: dict[str, Any] = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    on_ranks(2, load_a_misfit, tmp_path)
