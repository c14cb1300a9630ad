"""Stage 6: a preference model on AI-harmless and human-helpful comparisons (Bai et al. 2022, section 4.1)."""

from collections import Counter

from cai_ray.artifacts import Manifest, StageDir
from cai_ray.config import PreferenceModelConfig
from cai_ray.errors import DataError
from cai_ray.records import LABELED_PAIR, Row
from cai_ray.sources import read_comparisons
from cai_ray.stages.shared import StageInputs, fit, write_rows


def preference_model(config: PreferenceModelConfig, inputs: StageInputs, out: StageDir) -> Manifest:
    """Trains the preference model on every source of comparisons and publishes it with its reward mean and std.

    Raises:
        DataError: a source cannot be read or holds nothing.
        StageFailed: too many rows are bad, or training stopped; its last checkpoint is kept.
    """
    folders = list(inputs.rows)
    bad: list[Row] = []
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    for number, source in enumerate(s for s in config.data if s.path != "label"):
        rows, unusable, read, repeated = read_comparisons(source)
        if not read:
            raise DataError(f"preference_model: {source.path} holds no comparison", "expected chosen and rejected")
        new = [row for row in rows if row["id"] not in seen]  # HH's parts, for one, may share comparisons
        seen.update(row["id"] for row in new)
        # Kept: what was trained on is part of the stage's record.
        folders.append(write_rows(new, LABELED_PAIR, out.data / f"human-{number}"))
        bad += unusable
        counts["raw_rows"] += read
        counts[f"rows/{source.path}"] = len(new)
        counts["duplicates"] += repeated + len(rows) - len(new)
        counts["over_limit"] += read - len(unusable) - repeated - len(rows)
    out.quarantine(bad, counts["raw_rows"], inputs.settings.max_bad_fraction)
    metrics = fit("preference_model", config, folders, inputs, out)
    metrics["quarantined"] += len(bad)
    return out.commit(inputs.key, {**counts, **metrics})
