"""The card of a model that a run publishes: what it learned from, how, how well, and what it is not. Quotes no data."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from cai_ray.artifacts import RunDir, StageKey, package_versions
from cai_ray.config import Config
from cai_ray.export import BY_NAME, LIMITS, card, numbers, provenance, table
from cai_ray.models.hub import HUB_ID
from cai_ray.pipeline import Stage, model_spec
from cai_ray.records import stored_rows
from cai_ray.report.collect import cautions, collect

# Stage -> what transformers calls its use, the class that loads it, and what it is.
_ABOUT = {
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
_LIMITS = (
    "A score or a lower loss is no safety case: nobody has tested here how the model behaves in use.",
    "It keeps the faults and the licence of the model it began as.",
)


def model_card(run: RunDir, config: Config, stage: Stage, key: StageKey, metrics: Mapping[str, Any]) -> str:
    """README.md of the model folder of `sft`, `preference_model` or `ppo`, in the Hugging Face hub's form."""
    use, auto, about = _ABOUT[stage.name]
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": use}
    if base := _hub_id(config, stage):
        head["base_model"] = base
    head["tags"] = ["constitutional-ai", "rlaif", "cai-ray", stage.name.replace("_", "-")]
    folders = [run.stage(name).path / "data" for name in (*stage.data(config), stage.name)]
    limits = [*_LIMITS, *LIMITS, *cautions(collect(run), unfinished=False)]
    parts = [
        about,
        f'```python\nfrom transformers import {auto}\n\nmodel = {auto}.from_pretrained("PATH/TO/THIS/FOLDER")\n```',
        "## Data\n\nRows that the stage was given; those of the split `test` are held out.",
        table(["source", "kind", "split", "rows"], _counts(folders)),
        provenance(stage, run, config, key),
        "Packages: " + ", ".join(f"{name} {version}" for name, version in package_versions().items()) + ".",
        f"## Hyperparameters\n\n```yaml\n{yaml.safe_dump(key.config, sort_keys=False)}```",
        "## Metrics",
        numbers("metric", metrics),
    ]
    return card(head, f"{config.run.name}: {stage.name}", parts, limits)


def _hub_id(config: Config, stage: Stage) -> str | None:
    """The hub id of the model at the beginning of it all, where it has one."""
    name = stage.models(config)[0]
    if name in BY_NAME:
        return _hub_id(config, BY_NAME[name])
    path = model_spec(config, name).path
    path = HUB_ID if path == "embedded" else path
    return path if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists() else None


def _counts(folders: Iterable[Path]) -> list[list[str]]:
    """Rows by source, kind and split, as lines of a table."""
    counts, columns = Counter[tuple[str, ...]](), ("source", "kind", "split")
    for folder in folders:
        counts.update(tuple(row[c] for c in columns) for row in stored_rows(folder, columns))
    return [[*key, f"{n:,}"] for key, n in sorted(counts.items())]
