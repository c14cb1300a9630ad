"""Stage 6: a preference model on AI-harmless and human-helpful comparisons (Bai et al. 2022, section 4.1)."""

import json

from cai_ray.artifacts import Manifest, StageDir
from cai_ray.config import PreferenceModelConfig
from cai_ray.errors import DataError, StageFailed
from cai_ray.records import LABELED_PAIR, Row
from cai_ray.sources import read_comparisons
from cai_ray.stages.shared import TrainInputs, fit, write_rows


def preference_model(config: PreferenceModelConfig, inputs: TrainInputs, out: StageDir) -> Manifest:
    """Trains the preference model on every source of comparisons and publishes it with its reward mean and std.

    Raises:
        DataError: a source cannot be read or holds nothing.
        StageFailed: too many rows are bad, or training stopped; its last checkpoint is kept.
    """
    folders = list(inputs.rows)
    bad: list[Row] = []
    counts: dict[str, int] = {}
    for number, source in enumerate(s for s in config.data if s.path != "label"):
        rows, unusable = read_comparisons(source)
        if len(unusable) > inputs.max_bad_fraction * (len(rows) + len(unusable)):
            raise StageFailed(
                f"preference_model: {len(unusable)} of {len(rows) + len(unusable)} rows of {source.path} are bad, the "
                f"limit is {inputs.max_bad_fraction:.1%}; the first: {unusable[0]['id']}: {unusable[0]['reason']}",
                "mend them or raise run.max_bad_fraction",
            )
        if not rows:
            raise DataError(f"preference_model: {source.path} holds no comparison", "expected chosen and rejected")
        # Kept: what was trained on is part of the stage's record.
        folders.append(write_rows(rows, LABELED_PAIR, out.data / f"human-{number}"))
        bad += unusable
        counts[f"rows/{source.path}"] = len(rows)
    out.quarantine_path.write_text("".join(json.dumps(b) + "\n" for b in bad), "utf-8")
    metrics = fit("preference_model", config, folders, inputs, out)
    metrics["quarantined"] += len(bad)
    return out.commit(inputs.key, {**counts, **metrics})
