#!/usr/bin/env bash
# everything that needs a GPU, in nine minutes, with the python3 and the torch already there; no network.
#   OUT=folder                 where results go (default benchmarks/results)
#   PEFT_FAST_GPU_DRY_RUN=1    the same path on the CPU with toy sizes: proves the script, measures nothing
#   PYTHON=python3.12          which interpreter
set -euo pipefail
OUT=$(realpath -m "${OUT:-$(dirname "$0")/results}")
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m peft_fast.benchmarks.gpu --out "$OUT" ${PEFT_FAST_GPU_DRY_RUN:+--dry-run} "$@"
