"""PEFT's own tests, of the installed release, without and with peft_fast: fetch them, run them, compare."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# they need a GPU, a package that is not installed here, or the hub throughout
LEFT_OUT = ("test_common_gpu", "test_gpu_examples", "test_gptqmodel", "test_stablediffusion", "test_lora_megatron")
ALSO = {"parameterized": "parameterized", "attr": "attrs"}
INI = """\
[pytest]
addopts = --import-mode=prepend
markers =
    single_gpu_tests: needs a GPU
    multi_gpu_tests: needs GPUs
    regression: compares with an older release
    bitsandbytes: needs bitsandbytes
"""


class Outcome(NamedTuple):
    """What became of one test, and how many calls of LoRA layers in it were fast or handed back."""

    outcome: str
    error: str = ""
    fast: int = 0
    slow: int = 0


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other process fills the folder meanwhile: tests run side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fetch(folder: Path) -> Path:
    """The tests of the installed release, from its source distribution -> the folder that is their package."""
    import peft

    place = folder / f"peft-{peft.__version__}"
    if not (place / "tests" / "testing_common.py").exists():
        folder.mkdir(parents=True, exist_ok=True)
        what = ["--no-binary", ":all:", "--no-deps", "--no-build-isolation", f"peft=={peft.__version__}"]
        _pip("download", "--dest", str(folder), *what)
        with tarfile.open(next(folder.glob(f"peft-{peft.__version__}.tar.gz"))) as archive:
            for member in archive.getmembers():
                parts = Path(member.name).parts
                if member.isfile() and len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py"):
                    place.joinpath("tests").mkdir(parents=True, exist_ok=True)
                    place.joinpath("tests", parts[2]).write_bytes(archive.extractfile(member).read())
    (place / "tests" / "__init__.py").touch()
    (place / "pytest.ini").write_text(INI)
    # of all that they import, what nothing else here needs
    if missing := [name for module, name in ALSO.items() if not (folder / "site" / module).exists()]:
        _pip("install", "--target", str(folder / "site"), "--no-deps", *missing)
    return place


def _pip(*args: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *args, "--quiet", "--disable-pip-version-check"], check=True)


def files(place: Path, names: list[str]) -> list[str]:
    """The test files to run: all but those that cannot run, or the named ones."""
    found = sorted(path.stem for path in place.glob("tests/test_*.py"))
    wanted = [name.removesuffix(".py") for name in names]
    if unknown := set(wanted) - set(found):
        raise SystemExit(f"no such files: {', '.join(sorted(unknown))}; there are {', '.join(found)}")
    return wanted or [name for name in found if name not in LEFT_OUT]


def run(place: Path, file: str, on: bool, select: str, expression: str, only: list[str]) -> dict[str, Outcome]:
    """One file (or only some of its tests) in a process of its own -> outcomes by test.

    A test that takes the process down is "crashed", and another process runs those behind it.
    """
    results = place / f"results-{file}-{int(on)}-{os.getpid()}.jsonl"
    outcomes: dict[str, Outcome] = {}
    while True:
        results.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "peft_suite_plugin"]
        command += ["-k", expression] if expression else []
        command += only or [f"tests/{file}.py"]
        env = _environment(place, on, select, results, list(outcomes))
        done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
        new, unfinished = read(results)
        # 5: nothing to run is left
        if unfinished is None and not new and done.returncode not in (0, 5):
            raise SystemExit(f"pytest could not run {file}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        results.unlink(missing_ok=True)
        outcomes |= new
        if unfinished is None:
            return outcomes
        outcomes[unfinished] = Outcome("crashed")


def _environment(place: Path, on: bool, select: str, results: Path, done: list[str]) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PEFT_FAST_", "PYTEST_"))}
    library = {k: v for k, v in os.environ.items() if k == "PEFT_FAST_LIBRARY"}
    path = [str(HERE), str(place.parent / "site"), str(ROOT)]
    return (
        env
        | library
        | {
            "PYTHONPATH": os.pathsep.join(path),
            "HF_HOME": str(place.parent / "hub"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PEFT_FAST_MIN_TOKENS": "0",
            "PEFT_FAST_QUIET": "1",
            "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",  # else that file skips itself
            "PEFT_SUITE_ON": str(int(on)),
            "PEFT_SUITE_SELECT": select,
            "PEFT_SUITE_RESULTS": str(results),
            "PEFT_SUITE_DONE": json.dumps(done),
        }
    )


def read(results: Path) -> tuple[dict[str, Outcome], str | None]:
    """The plugin's lines -> outcomes, and the test in which the process ended, if it ended in one."""
    outcomes, running = {}, None
    for line in results.read_text().splitlines() if results.exists() else ():
        record = json.loads(line)
        if "started" in record:
            running = record["started"]
        else:
            running, test = None, record.pop("test")
            outcomes[test] = Outcome(**record)
    return outcomes, running


def differing(off: dict[str, Outcome], on: dict[str, Outcome]) -> dict[str, tuple[Outcome, Outcome]]:
    """Tests that did not end alike: another outcome, or another kind of error."""
    missing = Outcome("not run")
    pairs = {test: (off.get(test, missing), on.get(test, missing)) for test in [*off, *(on.keys() - off.keys())]}
    return {
        test: (a, b)
        for test, (a, b) in pairs.items()
        if a.outcome != b.outcome or a.error.partition(":")[0] != b.error.partition(":")[0]
    }


def uncollected(off: dict[str, Outcome], on: dict[str, Outcome]) -> list[str]:
    """Files of which no test was run either way, which is no agreement."""
    return [file for file in off if {off[file].outcome} == {on.get(file, off[file]).outcome} == {"not collected"}]


def summary(off: dict[str, Outcome], on: dict[str, Outcome]) -> str:
    """Both runs in a few lines."""
    differ = differing(off, on)
    alike = Counter(outcome.outcome for test, outcome in on.items() if test not in differ)
    fast = [o.fast for test, o in on.items() if o.fast and o.outcome == "passed" and test not in differ]
    errors = Counter(
        o.error.partition(":")[0] for test, o in on.items() if o.outcome == "failed" and test not in differ
    )
    lines = [
        f"{len(off)} tests without and with peft_fast, {len(differ)} differ",
        "alike: " + ", ".join(f"{count} {outcome}" for outcome, count in alike.most_common()),
        f"{len(fast)} of the passed ones made {sum(fast):,} fast calls",
    ]
    if errors:
        lines.append("failed alike by: " + ", ".join(f"{count} {error}" for error, count in errors.most_common(8)))
    # alike, but nothing of such a file was compared
    lines += [f"  {file} cannot be collected: {off[file].error[-200:]}" for file in uncollected(off, on)]
    for test, (a, b) in differ.items():
        lines += [f"  {test}", f"    without: {a.outcome} {a.error[:200]}", f"    with:    {b.outcome} {b.error[:200]}"]
    return "\n".join(lines)
