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
launch/setup.sh cpu
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright
.venv/bin/python -m pytest "${selection[@]}" "$@"
