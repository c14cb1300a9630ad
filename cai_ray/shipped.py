"""Where the files that come with cai-ray lie: beside the package in a checkout, inside it in a wheel."""

from pathlib import Path

from cai_ray.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent


def _root() -> Path:
    # A wheel carries `_shipped`; it is asked first because site-packages may hold another project's `configs`.
    inside = _PACKAGE / "_shipped"
    return inside if inside.is_dir() else _PACKAGE.parent


def shipped_file(folder: str, name: str) -> Path | None:
    """The shipped `folder/name.yaml` (folder: `constitutions` or `configs`), or None where there is none."""
    return (_root() / folder / f"{name}.yaml") if name in shipped_names(folder) else None


def shipped_names(folder: str) -> list[str]:
    """The names that `shipped_file` knows in this folder, sorted."""
    return sorted(path.stem for path in (_root() / folder).glob("*.yaml"))


def asset_path(name: str) -> Path:
    """The path of a file under `cai_ray/assets`.

    Raises:
        ConfigError: there is no such file.
    """
    path = _PACKAGE / "assets" / name
    if not path.is_file():
        raise ConfigError(f"cai_ray/assets holds no file {name!r}", "install cai-ray again: its package is incomplete")
    return path


def source_path(path: str) -> Path:
    """Where a source lies if it is local: the shipped rows of `starter:NAME`, a file or a folder.

    Raises:
        ConfigError: nothing that is shipped has that name.
    """
    starter = path.removeprefix("starter:")
    return Path(path).expanduser() if starter == path else asset_path(f"{starter}.jsonl")
