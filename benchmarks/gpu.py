"""Everything that needs a GPU, in one budget of time: build, proof, tuning, figures; each step its own process.

A step that fails, is ended at its time or has nothing to run leaves its status in the record and does not stop the
next one. Into the folder go <gpu>-<date>.json (one record, its runs inside), the same name with .md (tables) and .log,
and a PNG per benchmark.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from peft_fast.errors import DeviceError, PeftFastError, SettingsError, fail

from . import gpu_page, harness, machine, plans, show, targets, watch
from .steps import ENDS, LEAST_S, ROOT, TIMED, Step, no_figures, steps, without

GRACE_S = {"plans": 5.0, "memcheck": 8.0, "racecheck": 8.0}  # before the end of the step, for what it is in
ROW_S = 20.0  # for the row of a benchmark
STOP_S = 5.0  # for a step that was interrupted to say how far it came
NOTES = re.compile(
    r"(\d+ (?:passed|failed|error).* in [\d.]+s.*|.*ERROR SUMMARY: .*|.*RACECHECK SUMMARY: .*|tuned: .*)"
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything together")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, toy sizes")
    parser.add_argument("--only", default="", metavar="STEPS", help="these alone, with commas: plans,contract")
    given = parser.parse_args(argv)
    start = time.monotonic()
    if not given.dry_run and not torch.cuda.is_available():
        do = "run `python -m peft_fast doctor`; PEFT_FAST_GPU_DRY_RUN=1 tries the script on the CPU"
        fail(DeviceError, "a machine where torch has no GPU", "a GPU to measure", do)
    only = list(filter(None, given.only.split(",")))
    if unknown := set(only) - set(ENDS):
        do = "correct it or leave it out"
        fail(SettingsError, f"--only {', '.join(sorted(unknown))}", f"of {', '.join(ENDS)}", do)
    header = machine.header(torch.device("cpu" if given.dry_run else "cuda"))
    stem = name(header, given.dry_run)
    gpu = None if given.dry_run else _uuid()
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        log = (given.out / f"{stem}.log").open("w")
    except OSError as error:
        fail(SettingsError, f"OUT={given.out}: {error.strerror}", "a folder to write to", "set OUT to another", error)
    record = {
        "schema": harness.SCHEMA,
        "bench": "gpu",
        "scale": "tiny" if given.dry_run else "full",
        "machine": header,
        "limits": watch.limits(gpu),
        "plans": {},
        "steps": [],
        "targets": [],
        "runs": [],
    }
    _write(given.out, stem, record)
    with log, watch.Watch(gpu) as clocks:
        for step in steps(given.out, stem, given.dry_run):
            broken = [plan for plan, found in record["plans"].items() if found["verdict"] == plans.BROKEN]
            step = step._replace(
                command=[*step.command, *without(step, broken)], skip=step.skip or no_figures(step, broken)
            )
            if only and step.name not in only:
                step = step._replace(skip="not asked for")
            record["steps"].append(_step(step, given.minutes * 60 * ENDS[step.name], start, log, clocks))
            _collect(given.out / f"{stem}-{step.name}.json", step.name, record)
            # after each step: a machine that is taken away leaves what was measured
            _write(given.out, stem, record)
    return _summary(record, stem)


def name(header: dict, dry_run: bool) -> str:
    """nvidia-h200-2026-01-31, or dry-run-… on the CPU."""
    device = "dry-run" if dry_run else header["gpu"]["name"]
    return re.sub(r"[^a-z0-9]+", "-", f"{device}-{header['date'][:10]}".lower()).strip("-")


def _uuid() -> str:
    """The GPU as nvidia-smi calls it, whatever CUDA_VISIBLE_DEVICES makes of the numbers."""
    uuid = getattr(torch.cuda.get_device_properties("cuda"), "uuid", None)
    return f"GPU-{uuid}" if uuid else "0"


def _collect(part: Path, step: str, record: dict) -> None:
    """Moves what a step wrote into the record, also when the step did not come to its end."""
    try:
        found = json.loads(part.read_text())
    except (OSError, ValueError):
        return
    if step in ("plans", "tune"):
        record[{"tune": "tuning"}.get(step, step)] = found
    else:
        record["runs"].append(found)
    part.unlink()


def _summary(record: dict, stem: str) -> int:
    """The last screen; exit status 1 when a step failed or did not come to its end."""
    print("\nsteps")
    for step in record["steps"]:
        print(f"  {step['name']:<12} {step['status']:<12} {step['seconds']:6.1f} s  {step['note']}".rstrip())
    print()
    show.best().targets(targets.judge(record["runs"]))
    print(f"\nwrote {stem}.json, .md, .log and plots")
    bad = [f"{step['name']} ({step['status']})" for step in record["steps"] if step["status"] not in ("ok", "skipped")]
    if bad:
        print(f"not as it should be: {', '.join(bad)}; the log has the whole story")
    return 1 if bad else 0


def _step(step: Step, end: float, start: float, log, clocks: watch.Watch) -> dict:
    begin = time.monotonic()
    left = max(end - (begin - start), 1.0)
    if left < LEAST_S.get(step.name, 0.0) and not step.skip:
        step = step._replace(skip="the steps before it left it no time")
    if step.skip:
        print(f"\n== {step.name}: skipped, {step.skip}", flush=True)
        log.write(f"\n== {step.name}: skipped, {step.skip}\n")
        return {"name": step.name, "status": "skipped", "rc": 0, "seconds": 0.0, "note": step.skip}
    command = step.command
    if step.name in TIMED:
        command = [*command, "--minutes", f"{max(left - GRACE_S.get(step.name, ROW_S), left / 2) / 60:.3f}"]
    done = _run(step.name, command, left, log, step.extra)
    found = clocks.between(begin, time.monotonic())
    return {**done, "clocks": found} if found else done


def _run(step: str, command: list[str], limit: float, log, extra: dict | None = None) -> dict:
    """Runs one step, its output to the screen and the log; rc 124 when it ran out of time."""
    print(f"\n== {step} ({datetime.datetime.now():%H:%M:%S}, up to {limit:.0f} s)", flush=True)
    log.write(f"\n== {step}: {' '.join(Path(word).name if '/' in word else word for word in command)}\n")
    begin = time.monotonic()
    process = subprocess.Popen(
        command if Path(command[0]).is_file() else [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **(extra or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # pytest's workers and the sanitizer's child end with it
    )
    late = threading.Event()
    timer = threading.Timer(limit, lambda: (late.set(), _end(process)))
    timer.start()
    note = last = ""
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
            log.flush()
            last = line.strip() or last
            if found := NOTES.search(line):
                note = found.group(1).strip(" =\n")
        rc = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            _end(process)
    rc = 124 if late.is_set() else rc
    status = {0: "ok", 124: "out of time"}.get(rc, "failed")
    return {
        "name": step,
        "status": status,
        "rc": rc,
        "seconds": round(time.monotonic() - begin, 1),
        "note": (note or ("" if status == "ok" else last)).replace(str(ROOT), ".")[:300],
    }


def _end(process: subprocess.Popen) -> None:
    """Interrupts a step, as Ctrl-C does, and ends all of it a little later."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        os.killpg(process.pid, signal.SIGKILL)


def _write(out: Path, stem: str, record: dict) -> None:
    record["targets"] = [{**t._asdict(), "verdict": t.word} for t in targets.judge(record["runs"])]
    harness.write(out / f"{stem}.json", record)
    (out / f"{stem}.md").write_text(gpu_page.page(record))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PeftFastError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:  # the record holds every step that came to its end
        print("stopped", file=sys.stderr)
        sys.exit(130)
