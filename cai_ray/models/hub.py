"""Models from the Hugging Face hub: safetensors, configurations and tokenizers, nothing that can run code."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cai_ray.errors import DataError

_WANTED = ["*.safetensors", "*.json", "*.jinja"]
_SKIPPED = ["*/*", "consolidated*"]  # other layouts, second copies


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
    except OSError as error:  # the hub's own errors among them
        raise DataError(
            f"the model {shown} is not in the hub cache and could not be downloaded ({type(error).__name__})",
            "check the network, or give the path of a folder that holds the model",
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
