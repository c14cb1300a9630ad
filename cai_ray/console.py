"""What a person reads on the terminal before and after a run: the plan, the table of results, the next commands."""

import os
import shlex
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from cai_ray.config import Config
from cai_ray.constitution import Constitution
from cai_ray.execution import Request, run_dir, run_pipeline
from cai_ray.pipeline import NAMES, STAGE_MODELS, constitution_of, plan
from cai_ray.progress import Reporter

_ACTIONS = {
    "done": "done",
    "run": "will run",
    "continue": "was begun, continues",
    "changed": "CHANGED since it ran",
    "wait": "after the ones above",
}


def print_plan(config: Config) -> None:
    """Prints what each stage would do and need, and refuses what cannot work.

    Raises:
        ResourceError: the machine cannot hold what was asked for.
    """
    from cai_ray.resources import check_here, estimate

    reporter, run = Reporter(), run_dir(config)
    reporter.say(f"run directory {run.path}, seed {config.run.seed}", style="bold")
    for what in ("critique", "feedback"):
        chosen = constitution_of(getattr(config.constitution, what))
        reporter.say(f"{what}: constitution {chosen.name} with {len(chosen.principles)} principles")
    table = Table("stage", "state", "rows", "processes", "minutes", box=None, pad_edge=False)
    needs = estimate(config)
    for step, need in zip(plan(config, run), needs, strict=True):
        table.add_row(need.stage, _ACTIONS[step.action], need.rows_text, need.processes, need.minutes_text)
        for line in step.differs[:4]:
            table.add_row("", escape(f"  {line}"))
    reporter.console.print(table)
    reporter.say("Minutes are arithmetic, right within a factor of about three.")
    lines = [f"  {need.stage} {r.arithmetic}" for need in needs for r in need.roles]
    reporter.say("\n".join(["memory of each process", *lines]))
    if left_out := [name for name in NAMES if name not in {need.stage for need in needs}]:
        reporter.say(f"left out, because nothing reads them: {', '.join(left_out)}")
    check_here(config)


def print_constitution(constitution: Constitution) -> None:
    """Prints what a constitution holds: a line a principle, and how many examples of each kind."""
    reporter, table = Reporter(), Table("id", "tags", "weight", "has", box=None, pad_edge=False)
    for p in constitution.principles:
        question = "question, inverted" if p.inverted else "question"
        has = ["critique pair"] * bool(p.critique_request) + [question] * bool(p.preference_question)
        table.add_row(escape(p.id), escape(", ".join(p.tags)), f"{p.weight:g}", " + ".join(has))
    reporter.console.print(table)
    reporter.say(holdings(constitution))


def holdings(c: Constitution) -> str:
    """A constitution in one line: name, version, language, and the counts of what it holds."""
    pairs = sum(bool(p.critique_request) for p in c.principles)
    questions = sum(bool(p.preference_question) for p in c.principles)
    shots = (len(c.critique_few_shots), len(c.feedback_few_shots), len(c.cot_few_shots))
    return (
        f"{c.name} {c.version} ({c.language}): {pairs} critique pairs, {questions} questions; "
        "few-shots: {} critique, {} feedback, {} chain of thought".format(*shots)
    )


def run_and_summarize(config: Config, request: Request, given: list[str]) -> None:
    """Runs the pipeline and prints each stage's key numbers, where the models are, and what can be done next.

    Args:
        config: of the run.
        request: what the command line asked for.
        given: its words for the configuration, which the next commands repeat.
    """
    from cai_ray.report import summary_lines

    run = run_dir(config)
    reporter = Reporter(run.path / "run.log")
    run_pipeline(config, request, reporter)
    table = Table("stage", "key numbers", "what to expect", box=None, pad_edge=False)
    for line in summary_lines(run):
        table.add_row(*map(escape, line))
    reporter.console.print(table)
    done = [stage for stage in (*STAGE_MODELS, "report") if run.stage(stage).manifest()]
    for stage in done:
        reporter.say(f"{stage}: {run.path / 'report.html' if stage == 'report' else run.stage(stage).model}")
    here = shlex.quote(os.path.relpath(run.path, Path.cwd()))
    chat = [f"chat {here}"] if {"sft", "ppo"} & {*done} else []
    reporter.say("next:")
    again = shlex.join(["run", *given, "ppo.kl_coef=0.1", "--name", f"{config.run.name}-b", "--reuse"])
    for words in (*chat, f"{again} {here}", f"report {here}"):
        reporter.say(f"  cai-ray {words}")
