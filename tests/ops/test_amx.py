"""The AMX kernels on a machine without AMX: the same sources over loops that stand in for the tile instructions."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from peft_fast import build, native

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(platform.machine() != "x86_64" or not native.load(), reason="needs the x86-64 extension built")
def test_contract_over_emulated_tiles(tmp_path, monkeypatch):
    if "avx512" not in native.capabilities() or not native.capabilities()["avx512"]:
        pytest.skip("the float32 half of this engine needs AVX512")
    monkeypatch.setenv("CXXFLAGS", "-DPEFT_FAST_EMULATE_AMX")
    monkeypatch.setenv("PEFT_FAST_CUDA_ARCHS", "none")
    info = build.build(tmp_path, tmp_path / "objects", log=lambda *_: None)
    assert info["ok"], info["reason"]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpu-amx and bf16 and not random_groups",
         "tests/ops/test_contract.py", "tests/ops/test_metamorphic.py", "tests/ops/test_random.py",
         "tests/ops/test_weights.py", "tests/ops/test_activate.py"],
        cwd=ROOT,
        env={**os.environ, "PEFT_FAST_LIBRARY": str(tmp_path / build.LIBRARY)},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:]
    passed = int(ran.stdout.rsplit(" passed", 1)[0].rsplit(maxsplit=1)[-1])
    assert passed > 100, "the emulated engine was not among the providers"
