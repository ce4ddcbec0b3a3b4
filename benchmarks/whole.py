"""Benchmarks that are whole runs of `peft-fast train`, each in a process of its own, so that peak memory is its own."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from peft_fast.errors import SettingsError, UnsupportedError, fail

from .harness import Options

# what narrows or varies a layer's cases, as the command line has it
FLAGS = {
    "gate_only": "--gate-only", "peers": "--peers", "without": "--without", "dropouts": "--dropout",
    "repeats": "--repeats", "dtypes": "--dtype", "threads": "--threads",
}  # fmt: skip


def only(options: Options, need: str, *taken: str) -> None:
    """Refuses the options that are for layers, but for those ``taken``."""
    if given := [flag for name, flag in FLAGS.items() if name not in taken and getattr(options, name)]:
        fail(SettingsError, ", ".join(given), need, "leave these options out")


def trained(words: Sequence[str], out: Path) -> dict:
    """metrics.json of `peft-fast train WORDS`, which leaves its run in ``out``."""
    line = [sys.executable, "-m", "peft_fast", "train", *words]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode or not (out / "metrics.json").is_file():
        said = " ".join((done.stderr or done.stdout).split())[-600:]
        given = f"`peft-fast train {shlex.join(words)}`, which ended with {done.returncode}: {said}"
        fail(UnsupportedError, given, "a finished run", "mend what it says")
    return json.loads((out / "metrics.json").read_text(encoding="utf-8"))
