"""The self-test of the CUDA kernels, in a process of its own."""

from __future__ import annotations

import argparse
import json
import sys

import torch

from peft_fast.backends import cuda
from peft_fast.backends.cuda import selftest


def main(argv: list[str] | None = None) -> int:
    """One line a dtype and plan; 0 when every kernel is right, 1 when one is not or there is no device."""
    parser = argparse.ArgumentParser(prog="python -m peft_fast.backends.cuda", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.add_argument("--device", type=int, default=0, help="index of the GPU")
    options = parser.parse_args(argv)
    rows = []
    for dtype, name in selftest.NAMES.items():
        for plan in cuda.PLANS:
            device = torch.device("cuda", options.device)
            why = cuda.device_reason(options.device) or selftest.reason(device, dtype, plan)
            rows.append({"dtype": name, "plan": plan, "ok": not why, "why": why})
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        for row in rows:
            print(f"{row['dtype']:9} {row['plan']:11} {'ok' if row['ok'] else row['why']}")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
