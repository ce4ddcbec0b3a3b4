"""Build, doctor, numeric gate, benchmarks on one GPU: each step its own process, all within a time budget.

A step that fails or runs out of time leaves its status in the record and does not stop the next one. Into the
folder go <gpu>-<date>.json (one record, its runs inside), the same name with .log, and a PNG per benchmark.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from peft_fast.errors import DeviceError, PeftFastError, fail

from . import harness, machine

ROOT = Path(__file__).resolve().parent.parent
# share of the budget after which each step must have ended
ENDS = {"build": 0.2, "doctor": 0.25, "gate": 0.45, "lora_linear": 0.75, "train_step": 1.0}
GRACE_S = 20.0  # a benchmark stops by itself at its deadline; this is for the row it is in


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything together")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, toy sizes")
    given = parser.parse_args(argv)
    if not given.dry_run and not torch.cuda.is_available():
        fail(DeviceError, "a machine where torch has no GPU", "a GPU", "or set PEFT_FAST_GPU_DRY_RUN=1")
    device = torch.device("cpu" if given.dry_run else "cuda")
    header = machine.header(device)
    stem = name(header, given.dry_run)
    given.out.mkdir(parents=True, exist_ok=True)
    record = {
        "schema": harness.SCHEMA,
        "bench": "gpu",
        "scale": "tiny" if given.dry_run else "full",
        "machine": header,
        "steps": [],
        "runs": [],
    }
    with (given.out / f"{stem}.log").open("w") as log:
        _steps(given, stem, record, log)
    harness.write(given.out / f"{stem}.json", record)
    bad = [step["name"] for step in record["steps"] if step["rc"]]
    print(f"\nwrote {stem}.json, .log and plots" + (f"; failed: {', '.join(bad)}" if bad else ""))
    return 1 if bad else 0


def name(header: dict, dry_run: bool) -> str:
    """nvidia-h200-2026-01-31, or dry-run-… on the CPU."""
    device = "dry-run" if dry_run else header["gpu"]["name"]
    return re.sub(r"[^a-z0-9]+", "-", f"{device}-{header['date'][:10]}".lower()).strip("-")


def commands(given: argparse.Namespace, stem: str) -> dict[str, list[str]]:
    """Step -> what python3 runs; a benchmark's own deadline is added when it starts."""
    sized = ["--device", "cpu", "--tiny"] if given.dry_run else ["--device", "cuda"]
    bench = ["-m", "peft_fast", "bench"]

    def results(op: str) -> list[str]:
        part = given.out / f"{stem}-{op}"
        return [*bench, op, *sized, "--json", f"{part}.json", "--plot", f"{part}.png"]

    return {
        "build": ["-m", "peft_fast.build", "--if-possible"],
        "doctor": ["-m", "peft_fast", "doctor"],
        "gate": [*bench, "lora_linear", *sized, "--gate-only", "--dtype", "bf16,fp16,fp32"],
        "lora_linear": results("lora_linear"),
        "train_step": results("train_step"),
    }


def _steps(given: argparse.Namespace, stem: str, record: dict, log) -> None:
    start = time.monotonic()
    for step, command in commands(given, stem).items():
        left = given.minutes * 60 * ENDS[step] - (time.monotonic() - start)
        if step in ("lora_linear", "train_step"):
            command = [*command, "--minutes", f"{max(left - GRACE_S, 1) / 60:.3f}"]
        record["steps"].append(_run(step, command, max(left, 1.0), log))
        part = given.out / f"{stem}-{step}.json"
        if part.exists():
            record["runs"].append(json.loads(part.read_text()))
            part.unlink()


def _run(step: str, command: list[str], limit: float, log) -> dict:
    """Runs one step, its output to the screen and the log; rc 124 when it ran out of time."""
    print(f"\n== {step} ({datetime.datetime.now():%H:%M:%S}, up to {limit:.0f} s)", flush=True)
    log.write(f"\n== {step}: python3 {' '.join(command)}\n")
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    late = threading.Event()
    timer = threading.Timer(limit, lambda: (late.set(), process.kill()))
    timer.start()
    for line in process.stdout:
        print(line, end="", flush=True)
        log.write(line)
        log.flush()
    rc = process.wait()
    timer.cancel()
    return {"name": step, "rc": 124 if late.is_set() else rc, "seconds": round(time.monotonic() - begin, 1)}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PeftFastError as error:
        sys.exit(str(error))
