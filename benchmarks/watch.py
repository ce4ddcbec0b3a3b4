"""What the GPU's clocks did meanwhile: nvidia-smi asked once a second, beside whatever runs."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import subprocess
import threading
import time

FIELDS = {"sm_mhz": "clocks.sm", "watts": "power.draw", "celsius": "temperature.gpu"}
LIMITS = {"most_sm_mhz": "clocks.max.sm", "most_watts": "power.limit"}


class Watch:
    """Samples from `with` on; empty without a GPU or nvidia-smi, or where it does not know a figure."""

    def __init__(self, gpu: str | None) -> None:
        self.gpu = gpu
        self.samples: list[tuple[float, dict[str, float]]] = []
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> Watch:
        if self.gpu and shutil.which("nvidia-smi"):
            with contextlib.suppress(OSError):
                command = [*_query(self.gpu, FIELDS), "-lms", "1000"]
                pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
                self.process = subprocess.Popen(command, **pipes)
                threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()

    def _read(self) -> None:
        for line in self.process.stdout:
            if found := _figures(line, FIELDS):
                self.samples.append((time.monotonic(), found))

    def between(self, begin: float, end: float) -> dict:
        """Least, median and most of each figure among the samples of that time; {} without any."""
        found = [figures for at, figures in list(self.samples) if begin <= at <= end]
        columns = {name: [figures[name] for figures in found if name in figures] for name in FIELDS}
        return {n: [min(v), round(statistics.median(v), 1), max(v)] for n, v in columns.items() if v}


def limits(gpu: str | None) -> dict:
    """The clock and the power that the card may reach; {} where nobody says."""
    if not (gpu and shutil.which("nvidia-smi")):
        return {}
    try:
        done = subprocess.run(_query(gpu, LIMITS), capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    return _figures(done.stdout.strip(), LIMITS)


def _query(gpu: str, fields: dict[str, str]) -> list[str]:
    return ["nvidia-smi", "-i", gpu, f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits"]


def _figures(line: str, fields: dict[str, str]) -> dict[str, float]:
    found = {}
    for name, word in zip(fields, line.split(","), strict=False):
        with contextlib.suppress(ValueError):  # [N/A] under MIG
            found[name] = float(word)
    return found
