"""The compiled kernels under glibc's checking allocator: a write past an end aborts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_fast import native

ROOT = Path(__file__).parents[2]
# part of glibc since 2.34, beside libc itself
GUARD = next((p for folder in ("lib*", "lib*/*") for p in Path("/").glob(f"{folder}/libc_malloc_debug.so.0")), None)

RUN = """
import torch
from tests import cases, cases_lora_embedding, cases_lora_group, cases_lora_mlp, numerics
from tests.inputs import DTYPES

tables = cases, cases_lora_group, cases_lora_mlp, cases_lora_embedding
assert numerics.isas()
for isa in numerics.isas():
    provider = numerics.Provider("cpu", isa=isa)
    for dtypes in ("f32", "bf16", "bf16_f32_adapters"):
        for case in [case for table in tables for case in table.CASES + table.EMPTY]:
            p = numerics.problem(case, DTYPES[dtypes])
            with provider.active():
                out = numerics.ours(p, provider)
            assert all(t.isfinite().all() for t in out.values()), (isa, dtypes, case.name)
            assert p.untouched()
print("finished")
"""


OVERRUN = """
import ctypes
import torch

t = torch.ones(1001)
after = ctypes.c_ubyte.from_address(t.data_ptr() + 4 * 1001)
after.value ^= 0x55
del t
"""

pytestmark = pytest.mark.skipif(GUARD is None, reason="no libc_malloc_debug.so.0 on this machine")


def run(script, threads=1):
    env = os.environ | {
        "LD_PRELOAD": str(GUARD),
        "MALLOC_CHECK_": "3",
        "MALLOC_PERTURB_": "128",  # fresh memory reads 0x7f7f…: 3e38 as float32 and as bfloat16
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin between tiny calls starve each other
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_the_guard_sees_one_byte():
    assert run(OVERRUN).returncode < 0


@pytest.mark.skipif(not native.load(), reason=native.reason() or "live")
@pytest.mark.parametrize("threads", [1, 2])
def test_under_a_checking_allocator(threads):
    done = run(RUN, threads)
    assert done.returncode == 0 and "finished" in done.stdout, done.stderr[-2000:]
