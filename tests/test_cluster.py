"""Signals: Ray's handler never replaces ours, and an interrupt ends the process whatever happens on the way."""

import signal
import subprocess
import sys

import pytest

from cai_ray.cluster import start_ray
from cai_ray.config_files import load_config
from cai_ray.errors import ResourceError


@pytest.mark.parametrize("words", ["nobody answers", ""])
def test_ray_s_start_leaves_our_handler_of_sigterm(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    def init(**_: object) -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
        raise ConnectionError(words)

    def ours(*_: object) -> None: ...

    monkeypatch.setattr("ray.init", init)
    before = signal.signal(signal.SIGTERM, ours)
    try:
        with pytest.raises(ResourceError, match="no Ray cluster answers"):
            start_ray(load_config("tiny", ("cluster.address=10.0.0.1:6379",)))
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_interrupt_ends_the_process_though_nobody_reads_its_farewell() -> None:
    code = (
        "import os, signal, time; from cai_ray.cluster import stops_on_interrupt\n"
        "def farewell(): raise BrokenPipeError\n"
        "with stops_on_interrupt(farewell): os.kill(os.getpid(), signal.SIGTERM); time.sleep(20)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 130
