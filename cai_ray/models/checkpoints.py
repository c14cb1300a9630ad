"""Model folders in Hugging Face format: found, fingerprinted, loaded, written. Weights are safetensors only."""

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_ray.errors import DataError
from cai_ray.models.hub import embedded_model, hub_snapshot, quiet, tiny_model, whole_folder
from cai_ray.models.memory import OUT_OF_MEMORY
from cai_ray.models.tokenization import Tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

_MIB = 1 << 20
SHARD_BYTES = 1 << 30  # of one file of weights, about
_NAMES = (  # keys of config.json that change no computation
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
_HASHED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def resolve_model(path: str, revision: str | None = None) -> Path:
    """The local folder of a model.

    Args:
        path: `embedded`, `tiny`, a folder, or a hub id (downloaded, or found in the hub cache).
        revision: branch, tag or commit of a hub id.

    Raises:
        DataError: there is no such model, it is gated, or its folder lacks a configuration, tokenizer or safetensors.
    """
    if path in ("embedded", "tiny"):
        return embedded_model() if path == "embedded" else tiny_model()
    folder = Path(path).expanduser().absolute()  # for processes that work in other folders
    if not folder.is_dir():
        folder = hub_snapshot(path, revision)
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise DataError(f"the model folder {folder} has no {name}", "give a folder in Hugging Face format")
    _weights(folder)
    return folder


def _weights(folder: Path) -> list[Path]:
    # `consolidated…` is another layout's copy, which transformers does not read either.
    files = sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("consolidated"))
    if not files:
        raise DataError(f"{folder} has no *.safetensors (pickles can run code: not read)", "save it as safetensors")
    return files


def fingerprint(folder: Path) -> str:
    """A cheap sha256 of a model folder: its small files, and of each weight file the size, first and last MiB."""
    digest = hashlib.sha256()
    for path in [folder / name for name in _HASHED if (folder / name).is_file()]:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    for path in _weights(folder):
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"{path.name} {size}\n".encode() + file.read(_MIB))
            file.seek(max(0, size - _MIB))
            digest.update(file.read())
    return digest.hexdigest()


def architecture(folder: Path) -> dict[str, Any]:
    """What a checkpoint computes: config.json without names, token ids and formats. Equal ones can swap weights."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return {k: v for k, v in config.items() if k not in _NAMES}


def weight_shapes(folder: Path) -> dict[str, list[int]]:
    """Name -> shape of the tensors in a folder's safetensors files, by the headers; a tied `lm_head` counts not."""
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    for file in _weights(folder):
        with safe_open(file, "pt") as f:
            shapes |= {name: f.get_slice(name).get_shape() for name in f.keys()}  # noqa: SIM118
    if architecture(folder).get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)
    return shapes


def load_causal_lm(folder: Path, dtype: "str | torch.dtype") -> "PreTrainedModel":
    """Loads a language model for training or scoring: scaled-dot-product attention, no dropout, no KV cache.

    Args:
        folder: a model folder, as `resolve_model` returns it.
        dtype: `float32`, `bfloat16` or the torch dtype.

    Raises:
        DataError: weights are missing, corrupt or do not fit the configuration.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, folder, dtype)[0]


def load_scalar_model(folder: Path, dtype: "str | torch.dtype", *, seed: int = 0) -> "PreTrainedModel":
    """Loads a model with one score per sequence, for a preference model or PPO's critic.

    A language model's folder gets a fresh head, drawn by `seed` from N(0, 1/(H + 1)) with H the hidden size (the reward
    head of Stiennon et al. 2020, arXiv 2009.01325); a folder with a head keeps it. The configuration's padding token is
    set to one that differs from every EOS, because transformers reads the score at the last token that is no padding.

    Raises:
        DataError: as `load_causal_lm`; also when the architecture has no such head or the vocabulary no padding token.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from cai_ray.models.documents import ScalarHead

    pad_id = Tokenizer.load(folder).pad_id
    model, fresh = _load(AutoModelForSequenceClassification, folder, dtype, num_labels=1)
    old: Any = getattr(model, "score", None)
    if old is None or old.bias is not None:
        raise DataError(f"{type(model).__name__} has no plain linear head named score", "take a decoder-only model")
    model.score = ScalarHead(old.in_features, 1, bias=False)
    model.score.weight = old.weight
    if fresh:  # a new parameter: under ZeRO-3 the old one lies in parts on the ranks
        draw = torch.randn(1, old.in_features, generator=torch.Generator().manual_seed(seed))
        model.score.weight = torch.nn.Parameter((draw * (old.in_features + 1) ** -0.5).to(old.weight.dtype))
    model.config.get_text_config().pad_token_id = pad_id
    return model


def _load(auto: Any, folder: Path, dtype: "str | torch.dtype", **kwargs: Any) -> tuple[Any, bool]:
    """The model, and whether its head `score` is missing from the folder."""
    from safetensors import SafetensorError
    from transformers import AutoConfig

    _weights(folder)
    quiet()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, use_cache=False, **kwargs)
        if config.is_encoder_decoder or type(config) not in auto._model_mapping:
            raise DataError(
                f"{folder} holds {config.architectures or config.model_type}, which {auto.__name__} cannot serve",
                "take a decoder-only language model, such as Llama, Qwen or Mistral",
            )
        text = config.get_text_config()
        vars(text).update({name: 0.0 for name in vars(text) if name.endswith(("dropout", "_pdrop"))})
        model, info = auto.from_pretrained(  # scaled-dot-product attention is transformers' default
            folder, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if OUT_OF_MEMORY.search(str(error)):  # which says nothing of the model
            raise
        raise DataError(f"the model in {folder} cannot be loaded: {error!r}", "download or save it again") from None
    missing = set(info["missing_keys"])
    if lost := sorted(name for name in missing if not name.startswith(("score.", "classifier."))):  # heads are new
        raise DataError(f"{type(model).__name__} in {folder} lacks weights: {lost[:3]}", "download or save it again")
    surplus = set(info["unexpected_keys"])
    # A name outside the layers, such as that of a head which is not wanted here, is its own layer.
    if strange := sorted({*map(layer_of, surplus)} - {*map(layer_of, model.state_dict())} - surplus):
        raise DataError(
            f"{folder} has weights of layers that its config.json does not name: {strange[:3]}",
            "put configuration and weights of the same model together",
        )
    model.config.architectures = [type(model).__name__]
    return model, bool(missing)


def layer_of(name: str) -> str:
    """`model.layers.3` for all parameters of one layer; the name itself outside the layers."""
    numbered = re.match(r".*?\.\d+(?=\.)", name)
    return numbered[0] if numbered else name


def buckets(parameters: "Iterable[tuple[str, torch.Tensor]]", limit: int) -> "Iterator[dict[str, torch.Tensor]]":
    """Groups parameters into buckets of about `limit` bytes, cut between layers: vLLM loads whole layers."""
    bucket: dict[str, torch.Tensor] = {}
    for _, layer in groupby(parameters, lambda item: layer_of(item[0])):
        bucket.update(layer)
        if sum(t.nbytes for t in bucket.values()) >= limit:
            yield bucket
            bucket = {}
    if bucket:
        yield bucket


def save_pretrained(
    tensors: "Iterable[tuple[str, torch.Tensor]]", config: "PretrainedConfig", tokenizer: Tokenizer, out: Path
) -> None:
    """Writes a model folder: configuration, generation configuration, tokenizer, chat template, safetensors.

    The folder appears whole or not at all; one that is there is replaced. Generation defaults to plain sampling
    (temperature 1, top_p 1, no top-k), as everywhere here.

    Args:
        tensors: full weights under transformers' names, on any device. A file is written as soon as it is full, so that
            a model larger than memory can be saved.
        config: the model's; `architectures` must name its class.
        tokenizer: saved beside it.
        out: the folder.
    """
    from transformers import GenerationConfig

    config = copy.deepcopy(config)
    config.use_cache = True
    tied = {"lm_head.weight"} if config.get_text_config().tie_word_embeddings else set()
    pad_id = tokenizer.spare_id()
    config.get_text_config().pad_token_id = pad_id
    ids = {"eos_token_id": sorted(tokenizer.eos_ids), "pad_token_id": pad_id}
    generation = GenerationConfig(do_sample=True, temperature=1.0, top_p=1.0, top_k=0, **ids)
    with whole_folder(out) as folder:
        tokenizer.save(folder)
        config.save_pretrained(folder)
        generation.save_pretrained(folder)
        _write_weights(((name, t.detach().cpu()) for name, t in tensors if name not in tied), folder)


def _write_weights(tensors: "Iterable[tuple[str, torch.Tensor]]", folder: Path) -> None:
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    size = 0
    for bucket in buckets(tensors, SHARD_BYTES):
        save_file({n: t.contiguous() for n, t in bucket.items()}, folder / f"{len(shards)}", {"format": "pt"})
        shards.append(list(bucket))
        size += sum(t.nbytes for t in bucket.values())
        bucket.clear()  # before the next is gathered
    files: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        (folder / f"{number}").rename(folder / file)
        files |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), "utf-8")
