"""What a rank notes of itself."""

import subprocess
import sys

HANGS_TWICE = """
import sys, time
from pathlib import Path
from cai_ray.training import liveness

liveness.PULSE_S = 0.0
pulse = liveness.own_log(Path(sys.argv[1]), 0.5)

def early():
    time.sleep(0.8)

def late():
    time.sleep(0.8)

early()
pulse()
late()
"""


def test_a_wait_that_came_to_its_end_is_no_longer_noted(tmp_path):
    log = tmp_path / "rank-0.log"
    log.touch()
    subprocess.run([sys.executable, "-c", HANGS_TWICE, str(log)], check=True, timeout=120)
    noted = log.with_suffix(".stack").read_text("utf-8")
    assert ("in late" in noted, "in early" in noted) == (True, False)
