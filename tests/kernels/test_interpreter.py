"""Runs tests/kernels/interpreted in processes of its own: Triton decides at its import whether it interprets."""

import os
import re
import subprocess
import sys

import pytest

from peft_fast.benchmarks.machine import no_interpreter as unusable
from peft_fast.dispatch import BACKEND_PLANS

FOLDER = "tests/kernels/interpreted"
# the contract's tests name the plan they run, and take long: a process for each
PARTS = {
    "mutants": ["test_mutants.py"],
    "other_ops": ["test_other_ops.py"],
    "the others": ["test_bf16.py", "test_addresses.py", "test_experts.py", "test_mixed.py", "test_nf4.py"],
    **{plan: ["test_contract.py", "-k", f"triton-{plan}"] for plan in BACKEND_PLANS["triton"]},
    # what every backend is asked, of this one; in one dtype with casts on every path where a test has several
    "autograd": [
        "../../ops/test_autograd.py",
        "../../ops/test_dropout.py",
        "-k",
        "triton and not ([f32- or [bf16- or -f32- or -bf16-)",
    ],
    # where a bad number goes does not depend on the plan. What a kernel leaves in memory the contract sees, which runs
    # on memory full of NaN; programs run one after another here, so a long sum has no order of its own to be found
    "relations": [
        "../../ops/test_metamorphic.py",
        "-k",
        "triton and bf16_f32_adapters and not (bad_token and accumulate) and not scratch and not (twice and large)",
    ],
    "compiled": ["../../ops/test_compile.py", "../../ops/test_compile_dynamic.py", "-k", "triton"],
}


def run(root, *arguments):
    """(exit code, output) of pytest on the folder, in a process whose Triton interprets."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    arguments = [os.path.normpath(f"{FOLDER}/{a}") if a.endswith(".py") else a for a in arguments]
    plugins = ["no:cacheprovider", "no:xdist"]
    if not any(argument.startswith(FOLDER) for argument in arguments):
        plugins.append("tests.kernels.interpreted.conftest")  # which gives the interpreter its bfloat16
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *arguments,
            "-q",
            *(f"-p{name}" for name in plugins),
            "--color=no",
            "--tb=short",
        ],
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
    assert int(re.search(r"(\d+) passed", output)[1]) >= 10


def test_every_file_is_run(root):
    named = {path for part in PARTS.values() for path in part if path.endswith(".py")}
    assert {path for path in named if "/" not in path} == {path.name for path in (root / FOLDER).glob("test_*.py")}


def test_a_failure_there_is_a_failure_here(root, monkeypatch):
    if reason := unusable():
        pytest.skip(reason)
    # without its bfloat16 the interpreter multiplies bit patterns
    monkeypatch.setenv("TESTS_PLAIN_INTERPRETER", "1")
    code, output = run(root, "test_bf16.py", "-k", "test_products")
    assert code == 1 and "1 failed" in output
