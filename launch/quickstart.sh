#!/usr/bin/env bash
# From a fresh clone to an RLAIF policy on this machine: checks, installs, runs, and says where the report is.
# Run again, it continues or says that all is done.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { printf 'quickstart: %s\n  fix: %s\n' "$1" "$2" >&2; exit 2; }

# ---- what must be true before anything is downloaded ----
if [ "$(uname -s)" != Linux ]; then
  fail "vLLM's CPU build is Linux-only and this is $(uname -s)" \
    "docker build -t cai-ray -f launch/Dockerfile . && docker run --rm -it --shm-size=4g -v cai-ray-runs:/opt/cai-ray/runs cai-ray launch/quickstart.sh"
fi
case "$(uname -m)" in
  x86_64) grep -q -m1 avx2 /proc/cpuinfo || fail "this processor has no AVX2, which vLLM's CPU build needs" "use a newer machine" ;;
  aarch64 | arm64) ;;
  *) fail "no CPU build of vLLM exists for $(uname -m)" "use an x86-64 or arm64 machine" ;;
esac
case "$(cat .venv/.cai-ray 2>/dev/null)" in
  gpu*) fail "this folder is installed for GPUs, and the quickstart would replace that" "clone anew for it" ;;
esac
free_kib=$(df -Pk . | awk 'NR == 2 {print $4}')
memory_kib=$(awk '/^MemTotal:/ {print $2}' /proc/meminfo)
need_gib=8
[ -f .venv/.cai-ray ] && need_gib=4
[ "$free_kib" -ge $((need_gib * 1024 * 1024)) ] ||
  fail "this disk has $((free_kib / 1024 / 1024)) GiB free; packages, model and run take about $need_gib GiB" "free some space"
[ "$memory_kib" -ge $((15 * 1024 * 1024)) ] ||
  fail "this machine has $((memory_kib / 1024 / 1024)) GiB of memory; the run's peak is just under 16 GiB" "use a machine with 16 GiB, or give Docker more"

[ -f .venv/.cai-ray ] || echo "quickstart: installs about 4 GB into .venv (a few minutes), then runs for about 11 minutes"
launch/setup.sh cpu

echo "quickstart: preparing the embedded model (once, about a minute)"
.venv/bin/python -c 'from cai_ray.models import embedded_model; print("quickstart: model in", embedded_model())'

trap 'printf "\nThe commands above need this first: source .venv/bin/activate\n"' EXIT  # also after a failure or Ctrl-C
.venv/bin/cai-ray run quickstart "$@"
