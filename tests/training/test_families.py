"""Model families as tiny random checkpoints: each trains a step, is saved, loads, scores, and generates in vLLM."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from cai_ray.config import Optim, Sharding
from cai_ray.errors import DataError
from cai_ray.models.checkpoints import load_causal_lm
from cai_ray.models.tokenization import Tokenizer
from cai_ray.training import preference, sft
from cai_ray.training.deepspeed import ShardedModel

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_rank")

SIZES = {
    "vocab_size": 49152,  # the tiny model's tokenizer
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 32}
FAMILIES = {
    "llama": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=1),  # biases in attention
    "qwen3": Qwen3Config(**GROUPED),  # norms of queries and keys
    "mistral": MistralConfig(**GROUPED, sliding_window=None),
    "gemma": GemmaConfig(**GROUPED),  # tied, embeddings scaled, norms around 1
    "gpt_neox": GPTNeoXConfig(**SIZES),  # LayerNorm, parallel residuals; published files call its head embed_out
    "phi": PhiConfig(**SIZES),  # a bias in the LM head
    "phi3": Phi3Config(**SIZES, num_key_value_heads=1),
}
Make = Callable[[str], Path]
ROWS = [[1, 17, 905, 33, 408, 2], [1, 4000, 12, 2]]


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes the folder of a family's model."""

    def make(family: str) -> Path:
        out = tmp_path_factory.mktemp(family) / "model"
        shutil.copytree(tiny, out, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(FAMILIES[family])
        with torch.no_grad():
            for parameter in model.parameters():  # also biases and norms, which begin as zeros and ones
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(out)
        return out

    return make


def train(module: Any, step: Callable[[Any], torch.Tensor]) -> ShardedModel:
    """Takes one optimizer step that lowers the loss."""
    sharding = Sharding(zero_stage=0, dtype="float32")
    model = ShardedModel(module, Optim(lr=1e-3, schedule="constant"), sharding, 2, CPU)
    before = step(model.module)
    model.backward(before)
    assert model.step() > 0
    with torch.no_grad():
        assert step(model.module) < before
    return model


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    return torch.tensor([row + [0] * (int(lengths.max()) - len(row)) for row in rows]), lengths


@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_model_trains_a_step_and_comes_back(family: str, folder: Make, tmp_path: Path) -> None:
    start, out = folder(family), tmp_path / "out"
    ids_BT, lengths_B = padded(ROWS)
    real_BT = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
    wanted_BT = real_BT.clone()
    wanted_BT[:, 0] = False
    documents = ids_BT[real_BT][None], lengths_B.tolist(), wanted_BT[real_BT][None], 1.0, False
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(start, dtype="float32").eval()
        logprobs = plain(input_ids=ids_BT, attention_mask=real_BT.long()).logits[:, :-1].log_softmax(-1)
        expected = logprobs.gather(2, ids_BT[:, 1:, None])[..., 0][wanted_BT[:, 1:]]
        ours = sft.load(start, "float32", 0)(*documents)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    model = train(sft.load(start, "float32", 0), lambda module: -module(*documents)[0].mean())
    model.export(Tokenizer.load(start), out)
    again = AutoModelForCausalLM.from_pretrained(out, dtype="float32").eval()
    assert type(again) is type(plain)
    moved = {name: p for name, p in again.named_parameters() if not torch.equal(p, plain.get_parameter(name))}
    assert len(moved) == len(dict(plain.named_parameters()))  # every parameter learned, and was saved
    for name, parameter in model.hf.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter, rtol=0, atol=0)
    load_causal_lm(out, "bfloat16")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_preference_model_trains_a_step_and_scores_as_transformers_does(
    family: str, folder: Make, tmp_path: Path
) -> None:
    start, out = folder(family), tmp_path / "out"
    ids_BT, lengths_B = padded(ROWS)
    (first, *a), (_, *b) = ROWS  # a prompt of one token and two answers
    as_pair = torch.tensor([[first, *a, *b]]), [(1, len(a), len(b))]

    def loss(module: Any) -> torch.Tensor:
        score_a, score_b = module(*as_pair)
        return -torch.nn.functional.logsigmoid(score_a - score_b).sum()

    model = train(preference.load(start, "float32", 1), loss)
    model.export(Tokenizer.load(start), out, {"reward_mean": 0.5, "reward_std": 2.0})
    again = AutoModelForSequenceClassification.from_pretrained(out, dtype="float32").eval()
    assert (again.config.num_labels, again.config.reward_std) == (1, 2.0)
    real_BT = (torch.arange(ids_BT.shape[1]) < lengths_B[:, None]).long()
    with torch.no_grad():
        scores = again(input_ids=ids_BT, attention_mask=real_BT).logits[:, 0]
        ours = preference.load(out, "float32", 2).eval()
        for module in (model.module, ours):
            torch.testing.assert_close(torch.cat(module(*as_pair)), scores, rtol=1e-5, atol=1e-5)


def test_soft_capped_logits_are_a_clear_error(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    model = AutoModelForCausalLM.from_config(Gemma2Config(**GROUPED, final_logit_softcapping=30.0))
    model.save_pretrained(tmp_path / "model")
    module, every = sft.load(tmp_path / "model", "float32", 0), torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(DataError, match="final_logit_softcapping"):
        module(every.long(), [3], every)


GENERATE = """
import json, sys
from pathlib import Path
from cai_ray.config import Cluster
from cai_ray.generation.engine import Engine, Request
cluster = Cluster(max_num_seqs=2, kv_cache_gib=0.1)
engine = Engine(Path(sys.argv[1]), cluster, dtype="float32", max_model_len=64, threads=1)
done = engine.generate([Request([1, 17, 905, 33], max_new_tokens=8, temperature=1.0, seed=i) for i in range(2)])
print(json.dumps([[list(d.ids), list(d.logprobs)] for d in done]), flush=True)
import os
os._exit(0)
"""


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_generates_with_the_log_probs_of_transformers(family: str, folder: Make, tmp_path: Path) -> None:
    start, out = folder(family), tmp_path / "out"
    model = ShardedModel(sft.load(start, "float32", 0), Optim(lr=1e-3), Sharding(dtype="float32"), 2, CPU)
    model.export(Tokenizer.load(start), out)
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, str(out)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    plain = AutoModelForCausalLM.from_pretrained(out, dtype="float32").eval()
    for ids, logprobs in json.loads(done.stdout.splitlines()[-1]):
        row = torch.tensor([[1, 17, 905, 33, *ids]])
        with torch.no_grad():
            every = plain(input_ids=row).logits[0, 3:-1].log_softmax(-1)
        expected = every.gather(1, row[0, 4:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=1e-4, atol=1e-4)
