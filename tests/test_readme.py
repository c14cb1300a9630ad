"""README's file tree, commands and table stay true."""

import re
import shlex
from pathlib import Path

import click
import pytest

from cai_ray.cli import main
from cai_ray.config_files import load_config, parse_config
from cai_ray.shipped import shipped_names

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]


def tree_paths() -> set[str]:
    """Paths of the annotated tree: two spaces a level, a folder ends with a slash."""
    (text,) = (t for kind, t in BLOCKS if kind == "" and "cai_ray/" in t and "pyproject.toml" in t)
    parents: list[str] = []
    found = set()
    for line in text.splitlines():
        name = line.split("#")[0].rstrip()
        if not name:
            continue
        level = (len(name) - len(name.lstrip())) // 2
        parents = parents[:level]
        for part in name.split():
            found.add("".join(parents) + part)
        if name.strip().endswith("/"):
            parents.append(name.strip())
    return found


def test_every_path_of_the_tree_exists() -> None:
    missing = [p for p in tree_paths() if not (ROOT / p).exists()]
    assert not missing, missing


def test_every_module_and_top_level_file_is_in_the_tree() -> None:
    paths = tree_paths()
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "cai_ray").rglob("*.py") if p.name != "__init__.py"}
    shipped = {str(p.relative_to(ROOT)) for d in ("configs", "constitutions", "launch") for p in (ROOT / d).iterdir()}
    shipped = {p + "/" if (ROOT / p).is_dir() else p for p in shipped}
    absent = (modules | shipped) - paths
    assert not absent, f"the README's tree lacks {sorted(absent)}"


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("cai-ray ")])
def test_commands_of_the_readme_parse(line: str) -> None:
    words = shlex.split(line.split("&&")[0])[1:]
    context = click.Context(main, info_name="cai-ray")
    name, command, rest = main.resolve_command(context, words)
    assert command is not None
    if isinstance(command, click.Group):
        _, command, rest = command.resolve_command(click.Context(command), rest)
        assert command is not None
    made = command.make_context(str(name), list(rest))
    config = made.params.get("config")
    if config in shipped_names("configs"):
        load_config(str(config), tuple(made.params["overrides"]))


def test_scripts_of_the_readme_exist() -> None:
    scripts = {w for c in COMMANDS for w in c.split() if w.startswith("launch/")}
    assert {"launch/quickstart.sh", "launch/test.sh", "launch/setup.sh", "launch/submit.sh"} <= scripts | {
        w.strip("`.") for w in README.split() if w.strip("`.").startswith("launch/")
    }
    assert all((ROOT / s).is_file() for s in scripts)


def test_the_example_configuration_is_valid() -> None:
    import yaml

    (text,) = (t for kind, t in BLOCKS if kind == "yaml")
    parse_config(yaml.safe_load(text), "the README's example")


def test_every_shipped_config_is_in_the_table() -> None:
    assert all(f"`{name}`" in README for name in shipped_names("configs"))
