"""What every test may ask for."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Hypothesis times itself by the clock; beside Ray's processes a machine may stand still for a second. How fast inputs
# are made says nothing about the code, and what is found is asserted as before.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

# Ray otherwise starts a worker for every logical CPU ahead of time, and below everybody else's priority.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
os.environ.setdefault("RAY_enable_worker_prestart", "0")
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers take the tests file by file; all that read the one run of `tiny` go to the worker that has it."""
    for item in items:
        shares_run = "tiny_run" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("tiny" if shares_run else str(item.path)))


ROOT = Path(__file__).resolve().parent.parent
DEFAULT_DATA = ROOT / ".." / "shared" / "data"


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of public data sets that the project does not contain; tests that need it skip without it."""
    folder = Path(os.environ.get("CAI_RAY_TEST_DATA") or DEFAULT_DATA)
    if not folder.is_dir():
        pytest.skip(f"no test data: CAI_RAY_TEST_DATA is unset and {DEFAULT_DATA} does not exist")
    return folder.resolve()
