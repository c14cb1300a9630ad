"""Small tokenizers of every family that we must render alike, built here; models on top of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from cai_ray.models import tiny_model

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = ["▁the", "▁is", "Hello", "▁Hello", "▁Human", "Assistant", "▁Assistant", "ing", "▁a", ":", "INST", "end", "▁▁"]

INST = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles are known') }}{% endif %}{% endfor %}"
)
ALPACA = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '### Instruction:\n' + m['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + m['content'] + eos_token }}{% endif %}"
    "{% endfor %}{{ '### Response:\n' if add_generation_prompt }}"
)
VICUNA = (
    "{% for m in messages %}"
    "{{ 'USER: ' + m['content'] if m['role'] == 'user' else ' ASSISTANT: ' + m['content'] + eos_token }}"
    "{% endfor %}{{ ' ASSISTANT:' if add_generation_prompt }}"
)
TAGGED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def _save(backend: Backend, folder: Path, template: str | None = None, **special: str) -> Path:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def _unigram(special: list[str]) -> Backend:
    letters = sorted({*map(chr, range(33, 127)), "▁", "\n"})
    # Control symbols have score 0, the best there is: as in sentencepiece exports, the model itself would pick them.
    scores = [
        *((s, 0.0) for s in special),
        *((w, -2.0) for w in WORDS),
        *((c, -8.0) for c in letters if c not in WORDS),
    ]
    return Backend(models.Unigram(scores, unk_id=0, byte_fallback=False))


def sentencepiece(folder: Path, scheme: str) -> Path:
    """Metaspace and Unigram, BOS `<s>` by the post-processor, EOS `</s>`, instructions between special `[INST]`."""
    backend = _unigram(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _save(backend, folder, INST, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def legacy(folder: Path) -> Path:
    """The older sentencepiece conversion: a normalizer that puts `▁` before every section; `[INST]` is plain text."""
    backend = _unigram(["<unk>", "<s>", "</s>"])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _save(backend, folder, INST, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _bytes(special: list[AddedToken | str]) -> Backend:
    vocab = {piece: i for i, piece in enumerate(BYTES)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([t for t in special if isinstance(t, AddedToken)])
    backend.add_special_tokens([t for t in special if isinstance(t, str)])
    return backend


def tagged(folder: Path) -> Path:
    """Turn tokens that are not marked special and swallow the white space behind them; EOS is not the turn's end."""
    turns = [
        AddedToken(f"<|{name}|>", rstrip=True, normalized=False) for name in ("system", "user", "assistant", "end")
    ]
    return _save(
        _bytes([*turns, "<|stop|>", "<|padding|>"]), folder, TAGGED, eos_token="<|stop|>", pad_token="<|stop|>"
    )


def pretrained(folder: Path) -> Path:
    """No chat template, no BOS; padding is EOS."""
    return _save(_bytes(["<|stop|>", "<|reserved_0|>"]), folder, eos_token="<|stop|>", pad_token="<|stop|>")


def pretrained_bos(folder: Path) -> Path:
    """No chat template, BOS by the post-processor, sentencepiece-like."""
    sentencepiece(folder, "first")
    (folder / "chat_template.jinja").unlink()
    return folder


def words(folder: Path, template: str) -> Path:
    """Turns that open with words, and no control token but EOS."""
    return _save(_bytes(["<|stop|>", "<|padding|>"]), folder, template, eos_token="<|stop|>", pad_token="<|padding|>")


def only_eos(folder: Path) -> Path:
    """No chat template, and EOS is the only special token: nothing is left for padding."""
    return _save(_bytes(["<|stop|>"]), folder, eos_token="<|stop|>", pad_token="<|stop|>")


def embedded_tokenizer(folder: Path) -> Path:
    """The embedded model's: byte-level BPE and ChatML with a default system prompt."""
    del folder
    return tiny_model()


CHAT: dict[str, Callable[[Path], Path]] = {
    "embedded": embedded_tokenizer,
    "metaspace-first": lambda folder: sentencepiece(folder, "first"),
    "metaspace-always": lambda folder: sentencepiece(folder, "always"),
    "legacy": legacy,
    "tagged": tagged,
    "alpaca": lambda folder: words(folder, ALPACA),
    "vicuna": lambda folder: words(folder, VICUNA),
}
PLAIN: dict[str, Callable[[Path], Path]] = {
    "pretrained": pretrained,
    "pretrained-bos": pretrained_bos,
    "only-eos": only_eos,
}


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Callable[[str], Path]:
    """Makes the folder of a named tokenizer once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = {**CHAT, **PLAIN}[name](tmp_path_factory.mktemp(name))
        return made[name]

    return make


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The tiny model's folder."""
    return tiny_model()


@pytest.fixture
def write_json() -> Callable[[Path, dict], None]:
    """Writes an object to a JSON file."""
    return lambda path, value: path.write_text(json.dumps(value))
