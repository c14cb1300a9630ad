"""Signals: Ray's handler never replaces ours, and an interrupt ends the process whatever happens on the way."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cai_ray.cluster import start_ray
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
            start_ray("10.0.0.1:6379")
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("farewell", ["raise BrokenPipeError", "sys.exit(1)", "print('the same command continues')"])
def test_an_interrupt_ends_children_and_process_whatever_happens_meanwhile(farewell: str) -> None:
    """Nobody may read the farewell; and a thread such as Ray's ends the process when a child is gone."""
    code = f"""
import os, signal, subprocess, sys, threading, time
from cai_ray.cluster import stops_on_interrupt
def farewell(): {farewell}
raylet = subprocess.Popen(["sleep", "60"])
slow = subprocess.Popen(["bash", "-c", "trap 'sleep 1; exit' TERM; echo ready; while :; do sleep 0.1; done"], stdout=-1)
slow.stdout.readline()
print(raylet.pid, slow.pid, flush=True)
threading.Thread(target=lambda: (raylet.wait(), os._exit(1)), daemon=True).start()
with stops_on_interrupt(farewell):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=180, check=False, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert not any(psutil.pid_exists(int(pid)) for pid in done.stdout.splitlines()[0].split())


def test_shared_memory_of_the_ended_goes_and_that_of_other_containers_stays() -> None:
    """Containers that share /dev/shm number processes each anew: the same number there is another process."""
    code = """
import os
from pathlib import Path
from cai_ray.cluster import end_children
space = Path("/proc/self/ns/pid").stat().st_ino
for number in (space, space + 1):
    folder = Path(f"/dev/shm/cai-ray-{os.getpid()}-{number}")
    folder.mkdir()
    (folder / "0.safetensors").touch()
    print(folder)
end_children()
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=True, capture_output=True, text=True)
    own, other = map(Path, done.stdout.split())
    try:
        assert (own.exists(), other.exists()) == (False, True)
    finally:
        shutil.rmtree(other)
