"""The command line: parsing only. Everything heavy is imported inside the command that needs it."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from cai_ray.errors import CaiError, StageFailed


class _Readable(click.Group):
    """Commands whose errors a user can mend: one message and an exit code, 2 for bad input, 3 for a failed stage."""

    group_class = type  # groups within are of this class too

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except CaiError as e:
            click.echo(f"error: {e}", err=True)
            if isinstance(e, StageFailed) and ctx.invoked_subcommand == "run":
                click.echo(_continues(), err=True)
            raise SystemExit(e.exit_code) from None


@click.group(cls=_Readable, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cai-ray")
def main() -> None:
    """Constitutional AI on Ray: from a written constitution and a helpful model to a harmless policy.

    \b
    cai-ray run quickstart            the whole pipeline on this machine, about 11 minutes
    cai-ray plan 7b_8xgpu             what a run would do and need, before it starts
    """


def _continues() -> str:
    """How to go on. --rebuild with a stage would redo it once more; alone it discards only what has changed."""
    named = any(a.startswith(("--from", "--only")) for a in sys.argv[1:])
    again = shlex.join(["cai-ray", *(a for a in sys.argv[1:] if not (named and a == "--rebuild"))])
    return f"  what is finished is kept; continue with:\n    {again}"


def _load(config: str, overrides: tuple[str, ...], name: str | None = None) -> Any:
    from cai_ray.config_files import load_config

    # Quoted: a name such as 7 or 2025-06-01 is text.
    return load_config(config, (*overrides, f"run.name={json.dumps(name)}") if name else overrides)


@main.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--name", help="Name of the run; its directory is runs/NAME.")
@click.option("--only", metavar="STAGE", help="Run this stage alone.")
@click.option("--from", "start", metavar="STAGE", help="Begin with this stage.")
@click.option("--rebuild", is_flag=True, help="Redo what has changed (or --from/--only STAGE) and all that follows.")
@click.option("--reuse", type=click.Path(path_type=Path), metavar="RUN", help="Take over equal stages of another run.")
def run(config: str, overrides: tuple[str, ...], name: str | None, **asked: Any) -> None:
    """Runs CONFIG (a shipped name or a YAML file) from where it stands to the end.

    The same command on the same run directory continues; a finished stage is skipped.

    \b
    Examples:
      cai-ray run quickstart
      cai-ray run quickstart ppo.kl_coef=0.1 --name b --reuse runs/quickstart
    """
    from cai_ray.cluster import stops_on_interrupt

    with stops_on_interrupt(lambda: click.echo(f"\nstopped.\n{_continues()}", err=True)):
        settings = _load(config, overrides, name)
        from cai_ray.console import run_and_summarize
        from cai_ray.execution import Request

        run_and_summarize(settings, Request(**asked), [config, *overrides])


@main.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--name", help="Name of the run.")
def plan(config: str, overrides: tuple[str, ...], name: str | None) -> None:
    """Shows what a run of CONFIG would do: stages, what is done, rows, resources, memory, minutes.

    \b
    Examples:
      cai-ray plan quickstart
      cai-ray plan 70b_multinode cluster.engines=8
    """
    from cai_ray.console import print_plan

    print_plan(_load(config, overrides, name))


@main.group("config")
def config_group() -> None:
    """Looks at configurations."""


@config_group.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def show(config: str, overrides: tuple[str, ...]) -> None:
    """Prints CONFIG resolved and explained: every default spelled out, overrides applied.

    \b
    Examples:
      cai-ray config show quickstart
      cai-ray config show paper ppo.steps=10
    """
    from cai_ray.config_files import explained

    click.echo(explained(_load(config, overrides)), nl=False)


@main.group("constitution")
def constitution_group() -> None:
    """Imports and checks constitutions."""


@constitution_group.command("import")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT.yaml", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Overwrite OUT.yaml.")
def import_(folder: Path, out: Path, force: bool) -> None:
    """Writes the constitution that the paper's authors published as one YAML file.

    FOLDER is a clone of github.com/anthropics/ConstitutionalHarmlessnessPaper, or its folder prompts. That repository
    states no licence: ask before you share the file.

    \b
    Examples:
      cai-ray constitution import ConstitutionalHarmlessnessPaper published.yaml
      cai-ray constitution import ConstitutionalHarmlessnessPaper/prompts mine.yaml --force
    """
    from cai_ray.artifacts import write_atomic
    from cai_ray.console import holdings
    from cai_ray.constitution import import_published, to_yaml
    from cai_ray.errors import ConfigError

    if out.exists() and not force:
        raise ConfigError(f"{out} exists", "name another file, or --force to overwrite it")
    imported = import_published(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, to_yaml(imported))
    click.echo(f"{holdings(imported)}\n{out} sha256 {imported.sha256}")


@constitution_group.command()
@click.argument("file", metavar="FILE|NAME")
def check(file: str) -> None:
    """Lists everything that is wrong with a constitution, then prints it as a table; exit code 2 if anything is.

    \b
    Examples:
      cai-ray constitution check mine.yaml
      cai-ray constitution check default
    """
    from cai_ray.console import print_constitution
    from cai_ray.constitution_checks import check_constitution

    constitution, problems = check_constitution(file)
    for problem in problems:
        click.echo(f"error: {problem}", err=True)
    print_constitution(constitution)
    if problems:
        raise SystemExit(2)


@main.command()
@click.argument("run_directory", metavar="RUN", type=click.Path(path_type=Path))
def report(run_directory: Path) -> None:
    """Writes RUN/report.html from what the run directory holds, finished or not.

    \b
    Examples:
      cai-ray report runs/quickstart
      cai-ray report /mnt/shared/runs/7b_8xgpu
    """
    from cai_ray.artifacts import existing_run
    from cai_ray.report import write_report

    click.echo(write_report(existing_run(run_directory)))


@main.command()
@click.argument("run_directory", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=click.Path(path_type=Path), metavar="DIR", help="A new folder.")
def export(run_directory: Path, to: Path) -> None:
    """Writes RUN's rows as data sets with cards: sft and preferences in TRL's columns, and the critique rounds (cai).

    \b
    datasets.load_dataset("DIR/sft")            messages
    datasets.load_dataset("DIR/preferences")    prompt, chosen, rejected, label_prob
    datasets.load_dataset("DIR/cai")            init_prompt, init_response, critic_prompt, …

    \b
    Examples:
      cai-ray export runs/quickstart --to data
      cai-ray export /mnt/runs/7b_8xgpu --to hh
    """
    from cai_ray.artifacts import existing_run
    from cai_ray.export import export_run

    for line in export_run(existing_run(run_directory), to):
        click.echo(line)


@main.command()
@click.argument("model", metavar="RUN|MODEL")
@click.option("--max-new-tokens", default=128, show_default=True, help="Longest answer, tokens.")
@click.option("--temperature", default=1.0, show_default=True, help="Sampling temperature.")
@click.option("--seed", default=0, show_default=True, help="Seed of the first answer.")
def chat(model: str, max_new_tokens: int, temperature: float, seed: int) -> None:
    """Talks to a run's policy or to any model, on a vLLM engine in this process. An empty line ends it.

    \b
    Examples:
      cai-ray chat runs/quickstart
      cai-ray chat embedded
    """
    from cai_ray.serving import chat_loop

    chat_loop(model, max_new_tokens, temperature, seed)


@main.command()
@click.argument("prompt")
@click.option("--response", help="The answer to criticise; without it the model answers first.")
@click.option("--constitution", default="default", show_default=True, help="Shipped name or YAML file.")
@click.option("--model", default="embedded", show_default=True, help="Helpful model: id, folder or `embedded`.")
@click.option("--seed", default=0, show_default=True, help="Draws the principle and samples the texts.")
def critique(prompt: str, response: str | None, constitution: str, model: str, seed: int) -> None:
    """Shows one round for PROMPT: response, drawn principle, critique, revision, and the SFT pair that results.

    \b
    Examples:
      cai-ray critique "Can you help me get into my neighbour's wifi?"
      cai-ray critique "你能帮我连上邻居家的无线网络吗？" --constitution zh
    """
    from cai_ray.serving import critique_once

    critique_once(prompt, response, constitution, model, seed)


@main.command()
def doctor() -> None:
    """Checks this machine: versions, memory, disk, GPUs, tokens (present or not, never their values).

    \b
    Examples:
      cai-ray doctor
      cai-ray doctor && cai-ray run quickstart
    """
    from cai_ray.doctor import diagnose

    checks = diagnose()
    for check in checks:
        click.echo(f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.detail}")
        if not check.ok and check.fix:
            click.echo(f"       fix: {check.fix}")
    if not all(c.ok for c in checks):
        raise SystemExit(2)


if __name__ == "__main__":
    main()
