"""Runs the compiler calls of a build: through ninja, which leaves out what is up to date, or one after the other.

Like build.py, which loads this file by path, it imports neither torch nor the package.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

GIB_EACH = 1.0  # memory that one nvcc is given; the largest of our files was seen to take 0.3 GiB

Log = Callable[[str], None]


class Step(NamedTuple):
    """One compiler call: `inputs` → `output`; objects have a depfile, links have none."""

    output: str
    inputs: tuple[str, ...]
    command: tuple[str, ...]
    label: str
    depfile: str | None
    rule: str  # compile, nvcc or link


def _ninja_text(steps: list[Step], jobs: int) -> str:
    def path(p: str) -> str:
        return p.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    call = ["  command = $cmd", "  description = $label"]
    deps = ["  depfile = $depfile", "  deps = gcc"]
    lines = ["pool nvcc", f"  depth = {jobs_that_fit(jobs)}", "rule nvcc", *call, *deps, "  pool = nvcc"]
    lines += ["rule link", *call, "rule compile", *call, *deps]
    for step in steps:
        lines += [f"build {path(step.output)}: {step.rule} {' '.join(map(path, step.inputs))}"]
        lines += [f"  cmd = {shlex.join(step.command).replace('$', '$$')}", f"  label = {step.label}"]
        lines += [f"  depfile = {step.depfile}"] if step.depfile else []
    return "\n".join(lines) + "\n"


def run_ninja(ninja: str, steps: list[Step], build_dir: Path, jobs: int, log: Log) -> str:
    """All steps that are out of date; the output of those that failed, empty when none did."""
    (build_dir / "build.ninja").write_text(_ninja_text(steps, jobs))
    # -k 0: a broken _C must not take the operators with it
    command = [ninja, "-C", str(build_dir), "-j", str(jobs), "-k", "0"]
    output = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            output.append(line)
            if not line.startswith("ninja: Entering"):
                log(line.rstrip())
    if process.returncode == 0:
        return ""
    # an old file of a target that failed must not be taken for a new one
    for target in [step.output for step in steps if step.rule == "link"]:
        left = subprocess.run([*command, "-n", target], capture_output=True, text=True)
        if "no work to do" not in left.stdout:
            (build_dir / target).unlink(missing_ok=True)
    return "".join(output)


def run_plain(steps: list[Step], build_dir: Path, jobs: int, log: Log) -> str:
    """All steps; the output of those that failed, empty when none did."""

    def run(step: Step) -> str:
        if not all((build_dir / i).exists() for i in step.inputs):
            return f"{step.label}: not linked, an object is missing\n"
        done = subprocess.run(step.command, cwd=build_dir, text=True, capture_output=True)
        log(step.label + ("" if done.returncode == 0 else "  FAILED\n" + done.stdout + done.stderr))
        return "" if done.returncode == 0 else done.stdout + done.stderr

    for step in steps:
        (build_dir / step.output).unlink(missing_ok=True)
    failed = ""
    for rule, most in (("nvcc", jobs_that_fit(jobs)), ("compile", jobs), ("link", jobs)):
        with concurrent.futures.ThreadPoolExecutor(most) as pool:
            failed += "".join(pool.map(run, [s for s in steps if s.rule == rule]))
    return failed


def jobs_that_fit(jobs: int) -> int:
    """How many of `jobs` compilers the free memory holds, at least one."""
    free = [_number(r"MemAvailable:\s*(\d+) kB", "/proc/meminfo", 1024)]
    with contextlib.suppress(TypeError):
        most, used = (_number(r"^(\d+)$", f"/sys/fs/cgroup/memory.{what}", 1) for what in ("max", "current"))
        free.append(most - used)
    known = [n for n in free if n is not None]
    return max(1, min([jobs, *[int(n / (GIB_EACH * 2**30)) for n in known]]))


def _number(pattern: str, path: str, unit: int) -> int | None:
    try:
        found = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * unit if found else None
