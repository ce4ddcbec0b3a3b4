"""The commands that README, CONTRIBUTING, the Makefile and .ci/run name are the ones there are."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from peft_fast.cli.app import COMMANDS


def blocks(path: Path) -> list[str]:
    """Command lines in the fenced shell blocks of a page, without comments."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)
    text = "\n".join(code for language, code in fences if language in ("bash", "sh", "console", "shell"))
    lines = [line.partition("#")[0].strip().removeprefix("$ ") for line in text.splitlines()]
    return [line for line in lines if line]


def targets(root: Path) -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE))


def dry_run(root: Path, *command: str) -> str:
    # `make test ARGS=…` hands its own words down to here
    env = {k: v for k, v in os.environ.items() if k not in ("ARGS", "OP", "PYTHON", "MAKEFLAGS", "MAKEOVERRIDES")}
    env["MAKEFLAGS"] = "n"
    return subprocess.run(command, cwd=root, env=env, text=True, capture_output=True, check=True).stdout


def test_readme_sets_up_with_two_commands(root):
    made = [line for line in blocks(root / "README.md") if line.startswith("make ")]
    assert sorted(made[:2]) == ["make demo", "make test"]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_command_named_exists(root, page):
    text = (root / page).read_text()
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)) <= targets(root)
    assert set(re.findall(r"python -m peft_fast ([a-z]+)", text)) <= set(COMMANDS)


def test_ci_runs_what_readme_says(root):
    script = root / ".ci" / "run"
    assert os.access(script, os.X_OK)
    ci, made = dry_run(root, str(script)), dry_run(root, "make", "test")
    assert "-m pytest" in ci and ci.splitlines()[-1] == made.splitlines()[-1]


def test_make_demo_is_the_demo_command(root):
    said = dry_run(root, "make", "--no-print-directory", "demo").splitlines()
    assert said[-1].strip() == ".venv/bin/python -m peft_fast demo"


def test_set_up_takes_torch_first(root, tmp_path):
    """Without .venv: an environment, torch alone, the other pins, the package, what tests of quantized bases need."""
    for name in ("Makefile", "requirements.txt", "requirements-quantized.txt", "pyproject.toml", "setup.py"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    said = dry_run(tmp_path, "make", "setup").replace("\\\n", "")
    steps = [line for line in said.splitlines() if " -m " in line]
    wanted = [
        "-m venv .venv",
        "grep -m1 '^torch=='",
        "requirements.txt",
        "--no-build-isolation --no-deps --editable .",
        "--target .venv/quantized --requirement requirements-quantized.txt",
    ]
    assert len(steps) == len(wanted)
    for step, part in zip(steps, wanted, strict=True):
        assert part in step


def test_every_requirement_is_pinned_and_torch_leads(root):
    lines = [line for line in (root / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "torch==2.13.0"
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)
    assert len({line.partition("==")[0].lower() for line in lines}) == len(lines)


def test_help_lists_every_verb(root):
    out = subprocess.run(["make"], cwd=root, text=True, capture_output=True, check=True).stdout
    assert {f"make {t}" for t in targets(root) - {"help"}} <= set(re.findall(r"make [a-z-]+", out))
