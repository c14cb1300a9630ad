import errno
import json
import os
import shutil

import huggingface_hub
import pytest
import safetensors.torch
import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    T5Config,
    ViTConfig,
)

from cai_ray.errors import DataError
from cai_ray.models import checkpoints, resolve_model
from cai_ray.models.checkpoints import fingerprint, load_causal_lm, load_scalar_model, save_pretrained, weight_shapes
from cai_ray.models.tokenization import Tokenizer


@pytest.fixture
def copy_of_tiny(tiny, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny, folder)
    return folder


def test_names_folders_and_the_hub(tiny, copy_of_tiny, monkeypatch, tmp_path):
    assert resolve_model("tiny") == tiny
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model(str(copy_of_tiny)) == copy_of_tiny
    assert resolve_model("~/copy") == copy_of_tiny
    asked = []

    def download(name, **kwargs):
        asked.append((name, kwargs))
        return str(copy_of_tiny)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("owner/name", "v1") == copy_of_tiny
    ((name, kwargs),) = asked
    assert (name, kwargs["revision"]) == ("owner/name", "v1")
    good = ["chat_template.jinja", "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    bad = ["README.md", "consolidated.safetensors", "model.py", "onnx/model.safetensors", "pytorch_model.bin"]
    patterns = {key: kwargs[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(huggingface_hub.utils.filter_repo_objects(good + bad, **patterns)) == good


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "~/nowhere", "runs/demo/sft/model"])
def test_a_missing_folder_is_named(path):
    with pytest.raises(DataError, match=path):
        resolve_model(path)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError, r"'owner/name' at revision 'v1' is gated(.|\n)*HF_TOKEN"),
        (RepositoryNotFoundError, r"'owner/name' at revision 'v1' is neither"),
        (HfHubHTTPError, r"could not be downloaded \(HfHubHTTPError\)"),
        (LocalEntryNotFoundError, "not in the hub cache"),
        (ConnectionError, r"\(ConnectionError\)"),
        (*HfHubHTTPError.__bases__[:1], r"could not be downloaded \("),  # of the HTTP library: a connection that broke
    ],
)
def test_what_the_hub_refuses_is_explained(monkeypatch, error, message):
    def refuse(*args, **kwargs):
        raise error.__new__(error)  # its own constructor wants an HTTP response

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(DataError, match=message):
        resolve_model("owner/name", "v1")


def test_a_download_that_fills_the_disk_says_so(monkeypatch):
    def fill(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fill)
    with pytest.raises(DataError, match=r"\(No space left on device\)(.|\n)*HF_HOME"):
        resolve_model("owner/name")


def test_a_folder_named_from_here_is_the_same_elsewhere(copy_of_tiny, monkeypatch):
    monkeypatch.chdir(copy_of_tiny.parent)
    assert resolve_model(copy_of_tiny.name) == copy_of_tiny


def test_another_layouts_copy_of_the_weights_is_left_alone(copy_of_tiny):
    before, shapes = fingerprint(copy_of_tiny), weight_shapes(copy_of_tiny)
    save_file({"layers.0.attention.wq.weight": torch.zeros(2, 2)}, copy_of_tiny / "consolidated.safetensors")
    assert (fingerprint(copy_of_tiny), weight_shapes(copy_of_tiny)) == (before, shapes)


def test_want_of_memory_is_not_called_a_broken_model(copy_of_tiny, monkeypatch):
    def load(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    with pytest.raises(torch.OutOfMemoryError):
        load_causal_lm(copy_of_tiny, "float32")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_incomplete_folders_are_refused(copy_of_tiny, name):
    (copy_of_tiny / name).unlink()
    with pytest.raises(DataError, match=name.replace("model", r"\*")):
        resolve_model(str(copy_of_tiny))


def test_pickled_weights_are_refused(copy_of_tiny):
    torch.save(load_file(copy_of_tiny / "model.safetensors"), copy_of_tiny / "pytorch_model.bin")
    (copy_of_tiny / "model.safetensors").unlink()
    for use in (lambda: resolve_model(str(copy_of_tiny)), lambda: load_causal_lm(copy_of_tiny, "float32")):
        with pytest.raises(DataError, match="can run code"):
            use()


def test_corrupt_and_missing_weights_are_refused(copy_of_tiny):
    weights = copy_of_tiny / "model.safetensors"
    content = weights.read_bytes()
    state = safetensors.torch.load(content)  # not from the file, which is mapped into memory and overwritten below
    for broken in (content[: len(content) // 2], b"\xff" * 64, b""):
        weights.write_bytes(broken)
        with pytest.raises(DataError, match="cannot be loaded"):
            load_causal_lm(copy_of_tiny, "float32")
    lost = state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, weights, metadata={"format": "pt"})
    for load in (load_causal_lm, load_scalar_model):
        with pytest.raises(DataError, match=r"lacks weights.*layers\.1\.mlp\.up_proj"):
            load(copy_of_tiny, "float32")
    save_file({**state, "model.layers.1.mlp.up_proj.weight": lost[:5]}, weights, metadata={"format": "pt"})
    with pytest.raises(DataError, match="cannot be loaded"):
        load_causal_lm(copy_of_tiny, "float32")


def test_a_shard_that_is_cut_short_or_gone_is_refused(tiny, copy_of_tiny):
    (copy_of_tiny / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(copy_of_tiny, max_shard_size="200KB")
    shards = sorted(copy_of_tiny.glob("*.safetensors"))
    assert len(shards) > 2
    load_causal_lm(copy_of_tiny, "float32")
    content = shards[1].read_bytes()
    shards[1].unlink()
    with pytest.raises(DataError, match="cannot be loaded"):
        load_causal_lm(copy_of_tiny, "float32")
    shards[1].write_bytes(content[:-100])
    with pytest.raises(DataError, match="cannot be loaded"):
        load_causal_lm(copy_of_tiny, "float32")


def test_weights_of_another_model_are_refused(tiny, copy_of_tiny, write_json):
    config = json.loads((tiny / "config.json").read_text())
    for changes, message in (
        ({"num_hidden_layers": 1}, r"does not name.*layers\.1"),  # would be left aside without a word
        ({"num_hidden_layers": 3}, r"lacks weights.*layers\.2"),
        ({"hidden_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1}, "cannot be loaded"),
        ({"vocab_size": 300}, "cannot be loaded"),
        ({"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}, "lacks weights"),
    ):
        write_json(copy_of_tiny / "config.json", {**config, **changes})
        for load in (load_causal_lm, load_scalar_model):
            with pytest.raises(DataError, match=message):
                load(copy_of_tiny, "float32")


@pytest.mark.parametrize(
    ("config", "models"),
    [
        (T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2), ("causal", "scalar")),
        (BartConfig(vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1), ("causal", "scalar")),
        (ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2), ("causal", "scalar")),
        (BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2), ("scalar",)),
    ],
    ids=lambda x: getattr(x, "model_type", ""),
)
def test_an_architecture_that_cannot_serve_is_named(tiny, tmp_path, config, models):
    folder = tmp_path / "other"
    shutil.copytree(tiny, folder)
    AutoModel.from_config(config).save_pretrained(folder)
    loads = {"causal": load_causal_lm, "scalar": load_scalar_model}
    for name in models:
        with pytest.raises(DataError, match=r"decoder-only"):
            loads[name](folder, "float32")


def test_a_language_model_loads_without_dropout_and_cache(copy_of_tiny, write_json):
    config = json.loads((copy_of_tiny / "config.json").read_text())
    write_json(copy_of_tiny / "config.json", {**config, "attention_dropout": 0.5})
    model = load_causal_lm(copy_of_tiny, "bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.config.attention_dropout == 0.0
    assert {m.attention_dropout for m in model.modules() if hasattr(m, "attention_dropout")} == {0.0}
    assert model.config.use_cache is False
    assert model.config._attn_implementation == "sdpa"


def test_fingerprints_see_every_change_that_matters(copy_of_tiny, tiny):
    before = fingerprint(copy_of_tiny)
    assert before == fingerprint(tiny)
    assert len(before) == 64
    (copy_of_tiny / "README.md").write_text("words")
    assert fingerprint(copy_of_tiny) == before
    seen = {before}
    weights = copy_of_tiny / "model.safetensors"
    content = weights.read_bytes()
    for changed in (content[:-1] + bytes([content[-1] ^ 1]), content[:20] + b"X" + content[21:], content + b"\0"):
        weights.write_bytes(changed)
        seen.add(fingerprint(copy_of_tiny))
    weights.write_bytes(content)
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        with (copy_of_tiny / name).open("a") as file:
            file.write(" ")
        seen.add(fingerprint(copy_of_tiny))
    assert len(seen) == 8


def test_a_fresh_head_is_drawn_by_seed(tiny):
    one, same, other = (load_scalar_model(tiny, "float32", seed=s) for s in (3, 3, 4))
    assert torch.equal(one.score.weight, same.score.weight)
    assert not torch.equal(one.score.weight, other.score.weight)
    draw = torch.randn(1, 64, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(one.score.weight, draw / 65**0.5)
    assert one.score.weight.requires_grad
    assert one.score.weight.std().item() == pytest.approx(1 / 65**0.5, rel=0.3)


def test_the_padding_token_of_a_scalar_model_differs_from_eos(tiny):
    assert json.loads((tiny / "config.json").read_text())["pad_token_id"] == 2  # as shipped: EOS
    assert load_scalar_model(tiny, "float32").config.pad_token_id == 0


def test_a_model_without_a_spare_token_cannot_score(tmp_path, write_json, tiny, tokenizer_folder):
    folder = tmp_path / "model"
    shutil.copytree(tokenizer_folder("only-eos"), folder)
    shutil.copy(tiny / "model.safetensors", folder)
    write_json(folder / "config.json", {"vocab_size": 257, "model_type": "llama"})
    with pytest.raises(DataError, match="padding"):
        load_scalar_model(folder, "float32")


def test_a_saved_language_model_is_what_it_was(tiny, tmp_path):
    tok, out = Tokenizer.load(tiny), tmp_path / "deep" / "model"
    model = load_causal_lm(tiny, "float32")
    save_pretrained(model.state_dict().items(), model.config, tok, out)
    again = AutoModelForCausalLM.from_pretrained(out)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    with safe_open(out / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  (not a dict)
        assert file.metadata()["format"] == "pt"
    config = json.loads((out / "config.json").read_text())
    assert (config["architectures"], config["dtype"], config["use_cache"]) == (["LlamaForCausalLM"], "float32", True)
    generation = again.generation_config
    assert (generation.temperature, generation.top_p, generation.top_k) == (1.0, 1.0, 0)
    assert (generation.eos_token_id, generation.pad_token_id, config["pad_token_id"]) == ([2], 0, 0)
    assert Tokenizer.load(out).hf.chat_template == tok.hf.chat_template
    assert resolve_model(str(out)) == out
    assert model.config.use_cache is False  # the caller's configuration is untouched
    assert [p.name for p in out.parent.iterdir()] == ["model"]


def test_a_saved_scalar_model_keeps_its_head(tiny, tmp_path):
    model = load_scalar_model(tiny, "float32", seed=7)
    save_pretrained(model.state_dict().items(), model.config, Tokenizer.load(tiny), tmp_path / "pm")
    again = load_scalar_model(tmp_path / "pm", "float32", seed=8)
    assert torch.equal(again.score.weight, model.score.weight)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pm")
    assert torch.equal(plain.score.weight, model.score.weight)
    assert (plain.config.num_labels, plain.config.pad_token_id) == (1, 0)
    assert Tokenizer.load(tmp_path / "pm").hf.pad_token_id == 0


def test_saving_replaces_a_folder_whole_or_not_at_all(tiny, tmp_path, monkeypatch):
    model, tok, out = load_causal_lm(tiny, "float32"), Tokenizer.load(tiny), tmp_path / "model"
    out.mkdir()
    (out / "stale.txt").write_text("old")
    monkeypatch.setattr(tok, "save", lambda folder: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(model.state_dict().items(), model.config, tok, out)
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "stale.txt"]
    monkeypatch.undo()
    save_pretrained(model.state_dict().items(), model.config, tok, out)
    assert not (out / "stale.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_large_model_is_saved_in_files_of_whole_layers(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 1000)
    model = load_causal_lm(tiny, "float32")
    save_pretrained(model.state_dict().items(), model.config, Tokenizer.load(tiny), tmp_path / "model")
    placed = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())["weight_map"]
    files = {path.name for path in (tmp_path / "model").glob("*.safetensors")}
    assert files == {f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)}
    assert files == {*placed.values()}
    assert len({(checkpoints.layer_of(name), file) for name, file in placed.items()}) == len(
        {checkpoints.layer_of(name) for name in placed}
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_weights_are_saved_in_the_dtype_they_have(tiny, tmp_path):
    model = load_causal_lm(tiny, torch.bfloat16)
    save_pretrained(model.state_dict().items(), model.config, Tokenizer.load(tiny), tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "model" / "model.safetensors").values()} == {torch.bfloat16}


def test_an_architecture_without_score_head_is_refused(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(checkpoints, "_load", lambda *a, **k: (torch.nn.Linear(2, 2), set()))
    with pytest.raises(DataError, match="no plain linear head"):
        load_scalar_model(tiny, "float32")
