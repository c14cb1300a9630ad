"""Stage 9: one self-contained HTML file from what the run directory holds."""

from cai_ray.artifacts import Manifest, RunDir, StageDir, StageKey
from cai_ray.report import write_report


def report(config: None, key: StageKey, out: StageDir) -> Manifest:
    """Writes report.html of the run that `out` lies in."""
    path = write_report(RunDir(out.path.parent))
    return out.commit(key, {"path": path.name, "bytes": path.stat().st_size})
