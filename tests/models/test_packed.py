"""Packed documents: each is read as if it stood alone, in every family, forward and backward."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from cai_ray.errors import DataError
from cai_ray.models import documents as packing
from cai_ray.models.activations import keep_activations
from cai_ray.models.documents import document_states, packed_hidden_states

LENGTHS = [7, 1, 12, 3]
SMALL = {
    **{"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64},
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma": {},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neox": {},
    "phi": {},
    "phi3": {"sliding_window": None},
}


def random_model(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL, **FAMILIES.get(family, {}))
    return AutoModelForCausalLM.from_config(config).float()


def documents(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 50, (n,), generator=generator) for n in LENGTHS]


def packed(model: Any, ids: list[Tensor]) -> list[Tensor]:
    """hidden_TH of each document."""
    return list(packed_hidden_states(model, torch.cat(ids)[None], [[(n, 0)] for n in LENGTHS])[0].split(LENGTHS))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_in_a_pack_is_what_it_is_alone(family: str) -> None:
    model, ids = random_model(family), documents(1)
    alone = [document_states(model, x[None], [len(x)], packed=False) for x in ids]
    gradients = torch.autograd.grad(sum(h.square().sum() for h in alone), list(model.base_model.parameters()))
    together = packed(model, ids)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    packed_gradients = torch.autograd.grad(sum(h.square().sum() for h in together), list(model.base_model.parameters()))
    torch.testing.assert_close(packed_gradients, gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_document_sees_another(family: str) -> None:
    model, ids = random_model(family), documents(1)
    others = [x % 49 + 1 for x in ids]  # another token everywhere
    before = packed(model, ids)
    for changed in range(len(ids)):
        after = packed(model, [*ids[:changed], others[changed], *ids[changed + 1 :]])
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            assert torch.equal(old, new) == (i != changed)


def test_a_long_row_is_read_in_parts_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids_1T, rows = random_model("qwen2"), torch.cat(documents(1))[None], list[int]()
    count = lambda _, args, how: rows.append(how["input_ids"].shape[1])  # noqa: E731
    model.base_model.register_forward_pre_hook(count, with_kwargs=True)

    def read() -> tuple[Tensor, ...]:
        hidden = packed_hidden_states(model, ids_1T, [[(5, 0), (2, 3)], [(1, 0)], [(6, 0), (6, 5)], [(2, 0), (1, 1)]])
        return (hidden, *torch.autograd.grad(hidden.square().sum(), list(model.base_model.parameters())))

    whole = read()
    monkeypatch.setattr(packing, "CPU_TOKENS", 8)
    hidden, *gradients = read()
    torch.testing.assert_close(hidden, whole[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, list(whole[1:]), rtol=1e-4, atol=1e-4)
    next(model.parameters()).ds_id = 0  # type: ignore[attr-defined]  # as DeepSpeed marks those that ranks hold in parts
    read()
    assert rows == [23, 8, 12, 3, 23]


def test_padded_rows_are_read_as_before_by_a_model_that_reads_packs() -> None:
    plain, model = random_model("mistral"), random_model("mistral")
    packed(model, documents(1))
    ids_1T = torch.cat(documents(3))[None]
    expected, got = (document_states(m, ids_1T, LENGTHS, packed=False) for m in (plain, model))
    assert torch.equal(got, expected)


def test_recomputed_activations_change_no_gradient_and_selective_ones_repeat_no_product() -> None:
    grads, products = [], []
    for recompute in (False, "selective", True):
        model = random_model("llama").train()
        keep_activations(model, recompute)
        with FlopCounterMode(display=False) as counted:
            sum(h.square().sum() for h in packed(model, documents(1))).backward()
        grads.append([p.grad for p in model.base_model.parameters()])
        products.append(counted.get_total_flops())
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=0, atol=0)
    assert products[0] == products[1] < 0.8 * products[2]


def test_less_is_kept_between_the_passes() -> None:
    model, ids, kept = random_model("llama").train(), torch.randint(5, 50, (1, 512)), []
    for recompute in (True, "selective", False):
        model.gradient_checkpointing_disable()
        keep_activations(model, recompute)
        with torch.profiler.profile(profile_memory=True) as profile:
            hidden = packed_hidden_states(model, ids, [[(64, 0)]] * 8)
        kept.append(sum(event.self_cpu_memory_usage for event in profile.key_averages()))
        del hidden
    inputs, selective, everything = kept
    assert 1e5 < inputs < selective < 0.7 * everything


def test_a_family_that_mixes_documents_is_refused() -> None:
    model = random_model("llama")
    model.base_model.layers[1].self_attn.forward = lambda hidden_states, **how: (hidden_states, None)
    with pytest.raises(DataError, match=r"1 of 2 layers .* keep packed documents apart"):
        packed(model, documents(1))
