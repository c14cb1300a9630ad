#!/usr/bin/env bash
# Installs what the tests need, then runs lint, types and tests. `--all` adds what takes too long for every change.
# Further arguments go to pytest: launch/test.sh tests/algo -k gae
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
selection=(-m "not full")
if [ "${1:-}" = --all ]; then
  selection=()
  shift
fi
launch/setup.sh "$(cut -d' ' -f1 .venv/.cai-ray 2>/dev/null || echo cpu)" # the flavour that is installed stays
# The trainers that tests/parity compares with: without their own dependencies (kernels for GPUs, other versions of
# ours), and in a folder that only those tests see.
peers="openrlhf==0.11.2 verl==0.9.1 tensordict==0.15.3 omegaconf==2.4.0 hydra-core==1.3.8 codetiming==1.4.0
  pyvers==0.2.3 pylatexenc==2.11 torchdata==0.11.0 orjson==3.13.0 antlr4-python3-runtime==4.9.3"
if [ "$(cat .venv/peers/versions 2>/dev/null)" != "$peers" ]; then
  # shellcheck disable=SC2086
  .venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --target .venv/peers \
    --only-binary openrlhf --only-binary verl $peers
  echo "$peers" >.venv/peers/versions
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright
# Two at a time: alone, a test leaves a second core idle while one process after the other starts.
.venv/bin/python -m pytest "${selection[@]}" -n 2 --no-loadscope-reorder "$@"
