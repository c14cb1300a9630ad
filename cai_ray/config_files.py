"""Configuration files: YAML that is read, overridden from the command line, and checked against the schema."""

from datetime import date
from textwrap import indent
from typing import Any

import yaml
from pydantic import ValidationError

from cai_ray.config import Config, Section
from cai_ray.config_base import explain
from cai_ray.errors import ConfigError
from cai_ray.shipped import read_yaml


def load_config(name_or_path: str, overrides: tuple[str, ...] = ()) -> Config:
    """Reads a shipped config by name or a YAML file by path and applies `key.sub=value` overrides (values are YAML).

    Raises:
        ConfigError: no such file, bad YAML, an unknown key (with the nearest known one) or a value out of range.
    """
    path, tree = read_yaml("configs", name_or_path)
    run = tree.get("run") or {}
    if isinstance(run, dict) and not run.get("name"):
        tree["run"] = {**run, "name": path.stem}
    for item in overrides:
        _override(tree, item)
    return parse_config(tree, str(path))


def parse_config(tree: dict[str, Any], where: str = "config") -> Config:
    """Checks a tree of plain values against the schema; raises ConfigError naming each bad key."""
    try:
        return Config.model_validate(tree)
    except ValidationError as e:
        raise ConfigError(f"{where}:\n" + "\n".join("  " + explain(err, Config) for err in e.errors())) from None


def _override(tree: dict[str, Any], item: str) -> None:
    key, sep, text = item.partition("=")
    if not sep or not key:
        raise ConfigError(f"override {item!r} is not of the form key.sub=value", "for instance ppo.kl_coef=0.1")
    *parents, last = key.split(".")
    node: dict[str, Any] = tree
    for p in parents:
        child: Any = node.get(p)
        if isinstance(child, str):  # the short form of a model, source or constitution
            child = {"file" if parents[0] == "constitution" else "path": child}
        node[p] = child = {} if child is None else child
        if not isinstance(child, dict):
            raise ConfigError(f"override {item!r}: {p} is not a section")
        node = child
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as e:
        raise ConfigError(f"override {item!r}: the value is not YAML: {e}") from e
    # The schema reads numbers from text (1e-5, which YAML 1.1 takes for text, too), and only it knows which of 0123,
    # 12e5678 and 2025-06-01 are a name.
    name = isinstance(value, date) or (type(value) in (int, float) and str(value) != text)
    node[last] = text if name else value


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, every default spelled out."""
    return _dump(config.model_dump(mode="json"))


def explained(section: Section) -> str:
    """The same, with each key's sentence as a comment above it."""
    parts = []
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        parts += [f"# {line}".rstrip() + "\n" for line in (info.description or "").splitlines()]
        if isinstance(value, Section):
            parts += [f"{name}:\n", indent(explained(value), "  ")]
        else:
            parts.append(_dump(section.model_dump(mode="json", include={name})))
    return "".join(parts)


def _dump(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
