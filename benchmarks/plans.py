"""Does each plan run at all? One process a plan: a kernel that breaks the device must not take the others along."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from . import harness, sanitize

RUNS, BROKEN, UNKNOWN = "runs", "broken", "unknown"


class Tried(NamedTuple):
    """How a plan came through. Only a broken one is left out of what follows: slow to compile is not broken."""

    verdict: str
    why: str


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=1.0, help="end what runs longer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found")
    given = parser.parse_args(argv)
    found = tried([" ".join(plan) for plan in sanitize.watched(given.device)], given.device, given.minutes * 60)
    for plan, (verdict, why) in found.items():
        print(f"{plan}: {verdict}{f' ({why})' if why else ''}")
    if given.json:
        harness.write(given.json, {plan: one._asdict() for plan, one in found.items()})
    return 1 if any(one.verdict == BROKEN for one in found.values()) else 0


def tried(plans: list[str], device: str, limit: float) -> dict[str, Tried]:
    """plan -> how it went; all at once."""
    command = [sys.executable, "-m", "peft_fast.benchmarks.sanitize", "--device", device, "--plan"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    running = {plan: subprocess.Popen([*command, plan], **pipes) for plan in plans}
    end, found = time.monotonic() + limit, {}
    for plan, process in running.items():
        try:
            out = process.communicate(timeout=max(end - time.monotonic(), 0.1))[0]
            last = (out.strip().splitlines() or ["it said nothing"])[-1]
            found[plan] = Tried(BROKEN, last) if process.returncode else Tried(RUNS, "")
        except subprocess.TimeoutExpired:
            process.kill()
            out = process.communicate()[0]
            hangs = out.strip().endswith(sanitize.WAITS)
            found[plan] = Tried(BROKEN, "its kernels did not end") if hangs else Tried(UNKNOWN, "no time for all of it")
    return found


if __name__ == "__main__":
    sys.exit(main())
