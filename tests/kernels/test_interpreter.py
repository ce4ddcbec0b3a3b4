"""Runs tests/kernels/interpreted in processes of its own: Triton decides at its import whether it interprets."""

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest

from peft_fast.dispatch import BACKEND_PLANS

FOLDER = "tests/kernels/interpreted"
# the contract's tests name the plan they run, and take long: a process for each
PARTS = {
    "bf16": ["test_bf16.py"],
    "addresses": ["test_addresses.py"],
    "mutants": ["test_mutants.py"],
    **{plan: ["test_contract.py", "-k", f"triton-{plan}"] for plan in BACKEND_PLANS["triton"]},
}


def unusable() -> str:
    """Why Triton's interpreter cannot be relied on here; empty when it can."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "triton is not installed"
    numpy = importlib.metadata.version("numpy")

    def below(version, *least):
        return tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < least

    if below(triton, 3, 7) and not below(numpy, 2, 4):
        return f"the interpreter of triton {triton} has no loops over run-time bounds beside numpy {numpy}"
    return ""


def run(root, *arguments):
    """(exit code, output) of pytest on the folder, in a process whose Triton interprets."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    path, *options = arguments
    command = [sys.executable, "-m", "pytest", f"{FOLDER}/{path}", *options, "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-p", "no:xdist", "--color=no", "--tb=short"],
        cwd=root,
        env=environment | {"TRITON_INTERPRET": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("part", PARTS)
def test_interpreted(part, root):
    if reason := unusable():
        assert os.environ.get("CI") != "true", reason
        pytest.skip(reason)
    code, output = run(root, *PARTS[part])
    if code:
        pytest.fail(output, pytrace=False)
    assert int(re.search(r"(\d+) passed", output)[1]) > 10


def test_every_file_is_run(root):
    named = {path for path, *_ in PARTS.values()}
    assert named == {path.name for path in (root / FOLDER).glob("test_*.py")}


def test_a_failure_there_is_a_failure_here(root, monkeypatch):
    if reason := unusable():
        pytest.skip(reason)
    # without its bfloat16 the interpreter multiplies bit patterns
    monkeypatch.setenv("TESTS_PLAIN_INTERPRETER", "1")
    code, output = run(root, "test_bf16.py", "-k", "test_products")
    assert code == 1 and "1 failed" in output
