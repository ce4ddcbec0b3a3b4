"""Does each plan run at all? One process a plan: a kernel that breaks the device must not take the others along."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from . import harness, sanitize


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=1.0, help="end what runs longer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found")
    given = parser.parse_args(argv)
    found = tried([" ".join(plan) for plan in sanitize.watched(given.device)], given.device, given.minutes * 60)
    for plan, why in found.items():
        print(f"{plan}: {why or 'runs'}")
    if given.json:
        harness.write(given.json, found)
    return 1 if any(found.values()) else 0


def tried(plans: list[str], device: str, limit: float) -> dict[str, str]:
    """plan -> why it did not come through, empty when it did; all at once."""
    command = [sys.executable, "-m", "peft_fast.benchmarks.sanitize", "--device", device, "--plan"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    running = {plan: subprocess.Popen([*command, plan], **pipes) for plan in plans}
    end, found = time.monotonic() + limit, {}
    for plan, process in running.items():
        try:
            out = process.communicate(timeout=max(end - time.monotonic(), 0.1))[0]
            last = (out.strip().splitlines() or ["it said nothing"])[-1]
            found[plan] = last if process.returncode else ""
        except subprocess.TimeoutExpired:
            found[plan] = "it did not end in time"
            process.kill()
            process.communicate()
    return found


if __name__ == "__main__":
    sys.exit(main())
