"""The AMX kernels on a machine without AMX: the same sources over loops that stand in for the tile instructions."""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from peft_fast import build, native

ROOT = Path(__file__).parents[2]
SWITCH = "PEFT_FAST_EMULATE_AMX"


def emulating(plan):
    """build.plan with the loops in place of the tiles; what does not know of them is copied from the last build."""

    def steps_of(compiler, torch, version, csrc, *more):
        found, isa = plan(compiler, torch, version, csrc, *more)
        info, last = build.read_info(), build.default_build_dir()
        current = last and (info.get("sources_hash"), info.get("torch")) == (build.sources_hash(), version)
        steps = []
        for step in found:
            source, made = csrc / step.label, last and last / step.output
            if step.rule == "compile" and SWITCH in source.read_text():
                step = step._replace(command=(*step.command, f"-D{SWITCH}"))
            # those of CUDA know which architectures that build was for
            elif step.rule == "compile" and source.parent.name != "cuda" and current and made.is_file():
                copy = shlex.join(["cp", str(made), step.output]) + f" && : > {step.depfile}"
                step = step._replace(command=("sh", "-c", copy))
            steps.append(step)
        return steps, isa

    return steps_of


@pytest.mark.skipif(platform.machine() != "x86_64" or not native.load(), reason="needs the x86-64 extension built")
def test_contract_over_emulated_tiles(tmp_path, monkeypatch):
    if "avx512" not in native.capabilities() or not native.capabilities()["avx512"]:
        pytest.skip("the float32 half of this engine needs AVX512")
    monkeypatch.setenv("PEFT_FAST_CUDA_ARCHS", "none")
    monkeypatch.setattr(build, "plan", emulating(build.plan))
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
