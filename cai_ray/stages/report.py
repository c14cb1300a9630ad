"""Stage 9: one self-contained HTML file from what the run directory holds."""

from dataclasses import dataclass

from cai_ray.artifacts import Manifest, RunDir, StageDir, StageKey
from cai_ray.report import write_report


@dataclass(frozen=True)
class ReportInputs:
    """What the stage reads: artifacts only."""

    key: StageKey
    run: RunDir


def report(config: None, inputs: ReportInputs, out: StageDir) -> Manifest:
    """Writes RUN/report.html."""
    path = write_report(inputs.run)
    return out.commit(inputs.key, {"path": path.name, "bytes": path.stat().st_size})
