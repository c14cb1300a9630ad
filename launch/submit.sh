#!/usr/bin/env bash
# Runs CONFIG as a job of a running Ray cluster, through Ray's Job API, with the code of this checkout.
#
#   launch/submit.sh [--dry-run] [--no-wait] [--send-secrets] CONFIG [key=value...] [cai-ray options]
#
#   --dry-run        show what would be submitted, and submit nothing
#   --no-wait        return once the job is accepted; `ray job logs -f ID` follows it
#   --send-secrets   send HF_TOKEN and WANDB_API_KEY from this shell's environment with the job (see below)
#
# Where: RAY_API_SERVER_ADDRESS, else RAY_ADDRESS, else http://127.0.0.1:8265 (what `ray dashboard cluster.yaml` opens).
# Runs:  CAI_RAY_RUNS, else /mnt/shared/runs: a job's own folder is thrown away, so run.dir lies on the shared disk.
#
# Token: where the cluster asks for one (cluster.yaml's does), it is taken from RAY_AUTH_TOKEN or ~/.ray/auth_token.
#
# The same command again continues the run. The working directory travels without what .gitignore names, .venv, runs and
# .git; CONFIG is a shipped name or a file inside it.
#
# Secrets. A job's environment is Ray's to keep: it stands in plain text in the job's record, which everybody who can
# reach the dashboard can read, and in runtime_env_agent.log on the nodes. So nothing secret is sent unless asked: set
# HF_TOKEN and WANDB_API_KEY on the nodes (cluster.yaml, kuberay/rayjob.yaml and slurm.sbatch do), or, on a cluster that
# is yours alone, pass --send-secrets. The values then go through a pipe: no argument list and no file here holds them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '2,/^set -euo/{/^#/{s/^# \{0,1\}//;p}}' "${BASH_SOURCE[0]}"; }

dry_run="" send_secrets="" options=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=1 ;;
    --no-wait) options+=(--no-wait) ;;
    --send-secrets) send_secrets=1 ;;
    --) shift; break ;;
    -*)
      echo "submit: unknown option $1 (cai-ray's own come after CONFIG); see launch/submit.sh --help" >&2
      exit 2
      ;;
    *) break ;;
  esac
  shift
done
if [ $# -eq 0 ]; then
  usage >&2
  exit 2
fi

ray=ray python=python3
if [ -x .venv/bin/ray ]; then
  ray=.venv/bin/ray python=.venv/bin/python
elif ! command -v ray >/dev/null; then
  echo "submit: no ray command here; run launch/setup.sh cpu, or pip install 'ray[default]==2.60.0'" >&2
  exit 2
fi
address="${RAY_API_SERVER_ADDRESS:-${RAY_ADDRESS:-http://127.0.0.1:8265}}"

command=(cai-ray run "$@")
case " $* " in
  *" run.dir="*) ;;
  *) command+=("run.dir=${CAI_RAY_RUNS:-/mnt/shared/runs}") ;;
esac

secrets=()
for name in HF_TOKEN WANDB_API_KEY; do
  if [ -n "${!name:-}" ]; then
    if [ -n "$send_secrets" ]; then
      secrets+=("$name")
    else
      echo "submit: $name is set here and stays here; the job has the nodes' own (see --help on --send-secrets)" >&2
    fi
  fi
done

# The values come from the environment of this short process and leave it through a pipe.
runtime_env() {
  "$python" - ${secrets[@]+"${secrets[@]}"} <<'PY'
import json, os, sys

excludes = ["/.git", "/.venv", "/runs", "/wandb", "**/__pycache__"]
print(json.dumps({"excludes": excludes, "env_vars": {name: os.environ[name] for name in sys.argv[1:]}}))
PY
}

if [ -n "$dry_run" ]; then
  echo "address: $address"
  echo "command: ${command[*]}"
  echo "sends: ${secrets[*]:-no secrets}"
  exit 0
fi
# Ray sends its token only in this mode; where none is asked for, it does no harm.
if [ -n "${RAY_AUTH_TOKEN:-}" ] || [ -f "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}" ]; then
  export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
fi
exec "$ray" job submit --address "$address" --working-dir . ${options[@]+"${options[@]}"} \
  --runtime-env <(runtime_env) -- "${command[@]}"
