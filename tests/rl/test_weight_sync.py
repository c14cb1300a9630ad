"""The sender's side of a weight transfer over shared memory: buckets overlap, and none is left behind."""

import os
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from cai_ray.errors import StageFailed
from cai_ray.generation.shared_memory import bucket_folder
from cai_ray.rl import weight_sync
from cai_ray.rl.groups import EngineDied, Group
from cai_ray.rl.weight_sync import Sender

LAYERS = 6
WEIGHTS = {f"model.layers.{i}.{part}.weight": torch.full((4, 4), float(i)) for i in range(LAYERS) for part in "ab"}


def files():
    return sorted(Path("/dev/shm").glob(f"cai-ray-{os.getpid()}-*/*"))


class Receiver:
    """Stands where the group of engines does; takes each bucket in only once the next is written, or at the end."""

    def __init__(self, fail_at=None):
        self.got, self.seen, self.most, self.fail_at = {}, [], 0, fail_at

    def submit(self, method, *args, each):
        return [getattr(self, method)(*args)]

    def start_weight_update(self):
        self.seen.append("start")

    def update_weights(self, info):
        tensors = load_file(info["path"])
        number = len(self.got) // 2
        if number == self.fail_at:
            raise StageFailed("an engine is gone")
        deadline = time.monotonic() + 20
        while number < LAYERS - 1 and len([f for f in files() if f.suffix == ".safetensors"]) < 2:
            assert time.monotonic() < deadline, "the next bucket is not written while this one is taken in"
            time.sleep(0.001)
        self.most = max(self.most, len(files()))
        self.got |= tensors

    def finish_weight_update(self, version):
        self.seen.append(f"finish {version}")


@pytest.fixture
def send(monkeypatch):
    monkeypatch.setattr(weight_sync, "BUCKET_BYTES", 2 * 64)  # one layer
    monkeypatch.setattr(weight_sync, "wait", lambda calls, timeout_s, what: calls)  # a receiver answers at once
    left = []

    def parameters():
        yield from WEIGHTS.items()
        left.append("gathered to the end")

    def run(receiver, times=1):
        sender = Sender(SimpleNamespace(rank=0, merged_parameters=parameters), receiver, 0, 1.0)
        for version in range(times):
            sender.send(version)
        return left

    return run


def test_a_sender_that_waits_for_an_engine_that_is_gone_is_released(monkeypatch):
    def gone(*_, **__):
        raise EngineDied("engine-1 is gone")

    monkeypatch.setattr(weight_sync, "wait", gone)
    sender, released = Sender(SimpleNamespace(), Group("rollout", []), 1, 1.0), []
    sender._link = SimpleNamespace(shutdown=lambda: released.append(True))
    with pytest.raises(EngineDied):
        sender.update_weights({})
    assert released == [True]
    assert isinstance(sender._failed, EngineDied)  # no parameter that is left goes into the link that has ended


@pytest.mark.parametrize("colocated", [False, True])
def test_ranks_gather_to_the_end_but_where_the_others_stand_in_the_transfer(colocated):
    def lost():
        raise EngineDied("engine-1 is gone")

    names = iter("abc")
    model = SimpleNamespace(rank=0, merged_parameters=lambda: names)
    sender = Sender(model, Group("rollout", []), 1, 1.0, colocated)
    sender._link = SimpleNamespace(source=SimpleNamespace(), send_weights=lost, shutdown=None)
    with pytest.raises(EngineDied):
        sender.send(1)
    assert list(names) == (["a", "b", "c"] if colocated else [])


def test_what_a_killed_sender_left_goes_and_nobody_else_s():
    space = Path("/proc/self/ns/pid").stat().st_ino
    with subprocess.Popen(["true"]) as dead, subprocess.Popen(["sleep", "60"]) as alive:
        dead.wait()
        folders = [
            Path(f"/dev/shm/cai-ray-{name}")
            for name in (f"{dead.pid}-{space}", f"{alive.pid}-{space}", f"{dead.pid}-{space}1")
        ]
        try:
            for folder in folders:
                folder.mkdir()
                (folder / ".tmpAbc").write_bytes(b"half a bucket")
            with bucket_folder() as own:
                assert own.is_dir()
                assert [folder.exists() for folder in folders] == [False, True, True]
            assert not own.exists()
        finally:
            alive.kill()
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)


def test_the_next_bucket_is_written_while_engines_take_one_in_and_there_are_never_three(send):
    receiver = Receiver()
    send(receiver, times=2)
    assert receiver.seen == ["start", "finish 0", "start", "finish 1"]
    assert receiver.got.keys() == WEIGHTS.keys()
    assert all(torch.equal(receiver.got[name], tensor) for name, tensor in WEIGHTS.items())
    assert receiver.most == 2
    assert files() == []


@pytest.mark.parametrize("bucket", [0, 3, LAYERS - 1])
def test_an_engine_that_dies_leaves_no_bucket_behind_and_ranks_gather_to_the_end(send, bucket):
    receiver = Receiver(fail_at=bucket)
    with pytest.raises(StageFailed, match="an engine is gone"):
        send(receiver)
    assert files() == []
    assert "finish 0" not in receiver.seen
    receiver.fail_at = None
    left = send(receiver)
    assert left == ["gathered to the end"] * 2
