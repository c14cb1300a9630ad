"""What every test may ask for."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Hypothesis times itself by the clock; beside Ray's processes a machine may stand still for a second. How fast inputs
# are made says nothing about the code, and what is found is asserted as before.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def pytest_configure() -> None:
    """Sets the environment of tests and of what they start; not on import, for benchmarks import this module too."""
    # Ray otherwise starts a worker for every logical CPU ahead of time, and below everybody else's priority.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    os.environ.setdefault("RAY_enable_worker_prestart", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Two tests at a time share the cores: a thread that waits for its sibling must leave the core to another test's.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_collection_finish() -> None:
    """Two threads that meet at the end of every small product, beside another test's two, wait more than they work."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Workers take the tests file by file; the files that read the one run of `tiny` go to one worker together."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "tiny" if file.endswith(("e2e/test_tiny.py", "e2e/test_variants.py")) else file

    return ByFile(config, log)


ROOT = Path(__file__).resolve().parent.parent
DEFAULT_DATA = ROOT / ".." / "shared" / "data"


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of public data sets that the project does not contain; tests that need it skip without it."""
    folder = Path(os.environ.get("CAI_RAY_TEST_DATA") or DEFAULT_DATA)
    if not folder.is_dir():
        pytest.skip(f"no test data: CAI_RAY_TEST_DATA is unset and {DEFAULT_DATA} does not exist")
    return folder.resolve()
