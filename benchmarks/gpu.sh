#!/usr/bin/env bash
# everything that needs a GPU, in nine minutes, with the python3 and the torch already there; no network.
#   OUT=folder                 where results go (default benchmarks/results)
#   PEFT_FAST_GPU_DRY_RUN=1    the same path on the CPU with toy sizes: proves the script, measures nothing
#   PYTHON=python3.12          which interpreter
set -euo pipefail
PYTHON=${PYTHON:-python3}
OUT=$(realpath -m "${OUT:-$(dirname "$0")/results}")
[[ $PYTHON == */* ]] && PYTHON=$(realpath -s "$PYTHON")
cd "$(dirname "$0")/.."
if ! "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; then
    printf 'given: PYTHON=%s, which has no torch\n' "$PYTHON" >&2
    printf 'needed: a Python with the torch that is to be measured\ndo: make gpu PYTHON=/path/to/python3\n' >&2
    exit 1
fi
exec "$PYTHON" -m peft_fast.benchmarks.gpu --out "$OUT" ${PEFT_FAST_GPU_DRY_RUN:+--dry-run} "$@"
