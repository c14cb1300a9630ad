"""Models from the Hugging Face hub: safetensors, configurations and tokenizers, nothing that can run code."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cai_ray.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WANTED = ["*.safetensors", "*.json", "tokenizer*", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*", "*.bin", "*.pt", "*.pth", "*.py"]  # other layouts, second copies, pickles, code


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
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
    except errors.GatedRepoError:
        raise DataError(
            f"the model {shown} is gated: its owner asks who downloads it",
            f"accept its terms at https://huggingface.co/{name} and set HF_TOKEN to a token of that account",
        ) from None
    except errors.RevisionNotFoundError:
        raise DataError(f"the hub has no {shown}", "give a branch, tag or commit that the model has") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise DataError(
            f"{shown} is neither a folder here nor a model on the hub",
            "check the spelling; for a private model set HF_TOKEN",
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        raise DataError(
            f"the model {shown} is not in the hub cache and could not be downloaded ({type(error).__name__})",
            "check the network, or give the path of a folder that holds the model",
        ) from None
    return Path(folder)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' progress bars and advice while it works on a model; what matters is checked by us."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def forget_origin(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Drops how and from where a tokenizer was loaded, which transformers would write into its saved configuration."""
    for key in ("is_local", "local_files_only", "name_or_path"):
        tokenizer.init_kwargs.pop(key, None)
