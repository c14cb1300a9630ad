"""The files that come with cai-ray, beside the package in a checkout, inside it in a wheel; or a user's own instead."""

import json
from pathlib import Path
from typing import Any

import yaml

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


def source_path(path: str) -> Path:
    """Where a source would lie if it is local: the shipped rows of `starter:NAME`, a file or a folder."""
    starter = path.removeprefix("starter:")
    return Path(path).expanduser() if starter == path else _PACKAGE / "assets" / f"{starter}.jsonl"


def read_yaml(folder: str, name_or_path: str) -> tuple[Path, dict[str, Any]]:
    """A file that is shipped in `folder`, by name, or a user's own by path: where it lies, and what it holds.

    Raises:
        ConfigError: no such file, or it is not readable.
    """
    path = shipped_file(folder, name_or_path) or Path(name_or_path)
    if not path.is_file():
        known = ", ".join(shipped_names(folder))
        raise ConfigError(
            f"{name_or_path!r} is neither a file nor one of the shipped {folder}: {known}",
            "give the path of a YAML file or a shipped name",
        )
    try:
        tree = yaml.load(path.read_text("utf-8"), _UniqueKeys)
        tree = json.loads(json.dumps(tree, default=str))  # sections that share a YAML anchor become separate ones
    except (yaml.YAMLError, ValueError) as e:  # ValueError: no UTF-8, or a date such as 2025-13-01
        raise ConfigError(f"{path} is not readable as YAML in UTF-8: {e}", "mend the line that is named") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}, expected keys and values, as in the shipped {folder}")
    return path, tree


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets a later key replace an earlier one: a forgotten `- id` would swallow the principle before it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; raises MarkedYAMLError for a key that stands there twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)
