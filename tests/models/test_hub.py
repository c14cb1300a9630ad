import subprocess
import sys
import threading
import time

import pytest
import torch

from cai_ray.models import embedded_model, hub, tiny_model
from cai_ray.models.checkpoints import load_causal_lm
from cai_ray.models.tokenization import Tokenizer


def test_importing_models_is_cheap():
    check = "import sys, cai_ray.models; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'ray')))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@torch.no_grad()
def test_the_embedded_model_knows_a_capital():
    # A wrong tensor name or rotary order leaves a model that runs and talks nonsense.
    tok, model = Tokenizer.load(embedded_model()), load_causal_lm(embedded_model(), "float32")
    ids = tok.text("The capital of France is")
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    assert tok.decode([int(logits[-1].argmax())]) == "Paris"
    assert torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:])) < 4


def test_digits_are_split_one_by_one():
    tok = Tokenizer.load(embedded_model())
    assert tok.hf.convert_ids_to_tokens(tok.text("in 2024.")) == ["in", "Ġ", "2", "0", "2", "4", "."]


def test_the_tiny_model_is_what_its_description_says(tiny):
    model = load_causal_lm(tiny, "float32")
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (2, 64, 32)
    assert (config.num_attention_heads, config.vocab_size, config.tie_word_embeddings) == (2, 49152, True)
    messages = [{"role": "user", "content": "Hi"}]
    assert Tokenizer.load(tiny).prompt(messages) == Tokenizer.load(embedded_model()).prompt(messages)
    assert model.generation_config.eos_token_id == 2


def test_the_tiny_model_is_the_same_wherever_it_is_made(tiny, tmp_path):
    torch.manual_seed(99)
    state = torch.get_rng_state()
    hub._make_tiny(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    assert torch.equal(torch.get_rng_state(), state)


def test_several_makers_make_it_once(tmp_path):
    calls, results = [], []

    def make(folder):
        calls.append(folder)
        time.sleep(0.2)
        (folder / "model").write_text("whole")

    def work():
        results.append((hub._make_once(tmp_path / "cache" / "m", make) / "model").read_text())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["whole"] * 4
    assert len(calls) == 1


def test_a_maker_that_fails_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        hub._make_once(tmp_path / "m", fail)
    assert {p.name for p in tmp_path.iterdir()} <= {"m.lock"}
    assert (hub._make_once(tmp_path / "m", lambda folder: None)).is_dir()


def test_without_cache_and_package_the_hub_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_cache", lambda: tmp_path)
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    monkeypatch.setattr(hub, "hub_snapshot", lambda name: tmp_path / name)
    assert embedded_model() == tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    (tmp_path / f"tiny-{hub._LAYOUT}").mkdir()
    assert tiny_model() == tmp_path / f"tiny-{hub._LAYOUT}"
