"""Faults planted in copies of csrc/cuda, which the self-test's exact problems must find on the host model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from peft_fast import native
from tests.cuda import model

pytestmark = [
    pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler named c++"),
    pytest.mark.skipif(not native.load(), reason="needs the extension"),
]

# name -> (file, what it says, what the mutant says, outputs of which one must be wrong)
MUTANTS = {
    "the scaling is dropped": ("device.cuh", "acc[n][2 * half] * chunk.scale", "acc[n][2 * half]", "H D"),
    "1/(1 - p) is missing": ("operators.cpp", "1 / (1 - ps[i])", "1", "H dx dA"),
    "the mask is one token off": (
        "device.cuh",
        "uint64_t(m0 + g + 8 * half)",
        "uint64_t(m0 + g + 8 * half + 1)",
        "H dA",
    ),
    "the mask of dx is one column off": ("expand.cuh", "<< (8 * word + 2 * i)", "<< (8 * word + 2 * i ^ 1)", "dx"),
    "the last columns are left out": ("shrink.cuh", "c < cols; c += GROUP", "c + GROUP <= cols; c += GROUP", "H"),
    "the last tokens are left out": ("outer.cuh", "m < rows; m += ROWS", "m + ROWS <= rows; m += ROWS", "dA dB"),
    "the second adapter has the first one's seed": ("expand.cuh", "job.seeds[adapter]", "job.seeds[0]", "dx"),
    "the bias is dropped": ("expand.cuh", "job.bias.data && c < job.C", "false", "y"),
    "a split's part is left out": ("runtime.cu", "s < job.splits", "s + 1 < job.splits", "H dA dB"),
    "a barrier is missing": (
        "outer.cuh",
        "      __syncthreads();\n      // the warp's 16 columns",
        "      // the warp's 16 columns",
        "dA dB",
    ),
    "dA's operand is read untransposed": (
        "outer.cuh",
        "lane % 8 + lane / 16 * 8",
        "lane % 8 + lane / 8 % 2 * 8",
        "dA dB",
    ),
}
FAST = ("the scaling is dropped", "a barrier is missing")
CODE = """
import sys, torch
from peft_fast import native
native.load(); torch.ops.load_library(sys.argv[1])
from peft_fast.backends.cuda import selftest
for sizes in selftest.PROBLEMS:
    print(*selftest.mismatches(sizes, torch.device("cpu"), torch.bfloat16, "accumulate"))
"""


def mutated(tmp_path, file, before, after):
    """A copy of csrc with one change in it."""
    csrc = tmp_path / "csrc"
    shutil.copytree(model.CSRC, csrc)
    text = (csrc / "cuda" / file).read_text()
    assert before in text, f"{file} no longer says {before!r}: plant this fault anew"
    (csrc / "cuda" / file).write_text(text.replace(before, after))
    return csrc


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in MUTANTS])
def test_is_found(name, tmp_path):
    file, before, after, outputs = MUTANTS[name]
    library = model.compiled(tmp_path / "libmutant.so", mutated(tmp_path, file, before, after))
    env = {**os.environ, "PEFT_FAST_SHIM_ORDER": "reversed"}
    done = subprocess.run([sys.executable, "-c", CODE, str(library)], text=True, capture_output=True, env=env)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) & set(outputs.split()), "the fault was not seen"
