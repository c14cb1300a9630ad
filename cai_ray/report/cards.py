"""The cards of what a run publishes, README.md of a model or of exported rows: where it comes from, and what it is not.

They quote no data.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from cai_ray.artifacts import RunDir, StageDir, StageKey, package_versions
from cai_ray.constitution import Constitution, load_constitution
from cai_ray.errors import ConfigError, DataError
from cai_ray.models.hub import HUB_ID
from cai_ray.records import stored_rows
from cai_ray.report.collect import STAGES, cautions, collect

# Stage -> what transformers calls its model's use, the class that loads it, and what it is.
_MODELS = {
    "sft": (
        "text-generation",
        "AutoModelForCausalLM",
        "A language model fine-tuned on revised answers to red-team prompts and on helpful answers.",
    ),
    "preference_model": (
        "text-classification",
        "AutoModelForSequenceClassification",
        "A preference model: one score for a conversation that ends with an answer and the EOS token; the higher the "
        "better. `reward_mean` and `reward_std` in config.json are those of held-out answers.",
    ),
    "ppo": (
        "text-generation",
        "AutoModelForCausalLM",
        "A language model trained by PPO against a preference model, held near the model it began as.",
    ),
}
_HARMFUL = "Harmful requests and harmful answers are part of the data; they are meant for safety training and research."
LIMITS = (
    "Models wrote the responses, critiques and revisions. No human labelled anything here: a preference is a model's "
    "judgement under a written principle. The starter prompts (`starter:…` in `source`) were written for cai-ray; they "
    "are neither human labels nor a benchmark.",
    _HARMFUL,
)
_MODEL_LIMITS = (
    "Models wrote the responses, critiques and revisions, and labelled pairs of their responses under written "
    "principles. Comparisons that were given besides are what their source says; the starter's (`starter:…` in "
    "`source`) were written for cai-ray and are neither human labels nor a benchmark.",
    _HARMFUL,
    "A score or a lower loss is no safety case: nobody has tested here how the model behaves in use.",
    "It keeps the faults and the licence of the model it began as.",
)


def model_card(run: RunDir, stage: str, key: StageKey, metrics: Mapping[str, Any]) -> str:
    """README.md of the model folder of `sft`, `preference_model` or `ppo`, in the Hugging Face hub's form.

    Args:
        run: the run's directory.
        stage: which publishes the model, and is not finished yet.
        key: what it was begun with.
        metrics: its key numbers.
    """
    use, auto, about = _MODELS[stage]
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": use}
    if base := _hub_id(run, key.config, key.parts.get("models", {})):
        head["base_model"] = base
    head["tags"] = ["constitutional-ai", "rlaif", "cai-ray", stage.replace("_", "-")]
    # The rows that it was given: models among its inputs have been given others.
    given = [name for name in STAGES if name == stage or name in key.inputs.keys() - _MODELS.keys()]
    try:
        limits = [*_MODEL_LIMITS, *cautions(collect(run), unfinished=False)]
    except DataError as error:  # of another stage: no reason to lose this model
        limits = [*_MODEL_LIMITS, f"What the rest of the run says of itself could not be read: {error.message}"]
    parts = [
        about,
        f'```python\nfrom transformers import {auto}\n\nmodel = {auto}.from_pretrained("PATH/TO/THIS/FOLDER")\n```',
        "## Data\n\nRows that the stage was given; those of the split `test` are held out.",
        table(["source", "kind", "split", "rows"], _counts(run, given)),
        provenance(run, stage, key),
        "Packages: " + ", ".join(f"{name} {version}" for name, version in package_versions().items()) + ".",
        f"## Hyperparameters\n\n```yaml\n{yaml.safe_dump(key.config, sort_keys=False)}```",
        "## Metrics",
        numbers("metric", metrics),
    ]
    return card(head, f"{run.path.name}: {stage}", parts, limits)


def card(head: Mapping[str, Any], title: str, parts: Iterable[str], limits: Iterable[str]) -> str:
    """A README.md in the Hugging Face hub's form; `head` is what the hub and its libraries read."""
    start = f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n# {title}"
    return "\n\n".join([start, *parts, "## Limits", "\n".join(f"- {limit}" for limit in limits)]) + "\n"


def provenance(run: RunDir, stage: str, key: StageKey | None = None) -> str:
    """A card's section on the stages that had a part in something: models, constitution, seed, version.

    Args:
        run: the run's directory.
        stage: that made it; before it come those whose rows or models it or they read.
        key: of the stage, while it is not finished.
    """
    made: dict[str, tuple[Mapping[str, Any], Mapping[str, str]]] = {}
    wanted = {stage, *(key.inputs if key else ())}
    if key:
        made[stage] = (key.parts, package_versions())
    for name in reversed(STAGES):
        if name in wanted and (manifest := run.stage(name).manifest()):
            wanted |= manifest.inputs.keys()
            made.setdefault(name, (manifest.parts, manifest.packages))
    rows: list[list[str]] = []
    for name in (name for name in STAGES if name in made):
        parts, packages = made[name]
        sha = parts.get("principles")
        found = drawn_from(run.stage(name), sha) if sha else None
        constitution = f"{found.name}, version {found.version}, " if found else ""
        constitution += f"sha256 {sha}" if sha else ""
        models = ", ".join(f"{role}: {identity}" for role, identity in parts.get("models", {}).items())
        rows.append([name, models, constitution, str(parts["seed"]), packages.get("cai-ray", "")])
    made_by = "## Where it comes from\n\nMade by cai-ray (Constitutional AI, Bai et al. 2022, arXiv 2212.08073).\n\n"
    return made_by + table(["stage", "models", "constitution", "seed", "cai-ray"], rows)


def drawn_from(out: StageDir, sha256: str | None) -> Constitution | None:
    """The constitution that a stage drew from; None if somebody has changed or removed it."""
    try:
        found = load_constitution(out.constitution)
    except ConfigError:
        return None
    return found if found.sha256 == sha256 else None


def numbers(title: str, metrics: Mapping[str, Any]) -> str:
    """A Markdown table of those metrics that are numbers: texts could quote data."""
    rows = [[name, f"{value:.4g}"] for name, value in metrics.items() if isinstance(value, int | float)]
    return table([title, "value"], rows)


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _hub_id(run: RunDir, config: Mapping[str, Any], models: Mapping[str, str]) -> str | None:
    """The hub id of the model at the beginning of it all, where it has one; of a stage's configuration and models."""
    start = config["init"]
    if start == "auto":
        start = "preference_base" if "preference_base" in models else "sft"
    if start in _MODELS:
        manifest = run.stage(start).manifest()
        return _hub_id(run, manifest.config, manifest.models) if manifest else None
    named = re.match(r"(embedded|[\w.-]+/[\w.-]+)@", models[start])  # else it is a folder's fingerprint
    return named and (HUB_ID if named[1] == "embedded" else named[1])


def _counts(run: RunDir, stages: Iterable[str]) -> list[list[str]]:
    """Rows by source, kind and split, as lines of a table; of comparisons that were given the kind is not known."""
    counts = Counter[tuple[str, ...]]()
    for stage in stages:
        for row in stored_rows(run.stage(stage).data, ("source", "kind", "split")):
            counts[row["source"], "" if stage == "preference_model" else row["kind"], row["split"]] += 1
    return [[*key, f"{n:,}"] for key, n in sorted(counts.items())]
