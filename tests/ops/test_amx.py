"""AMX: kernels beside oneDNN's where a machine has it; elsewhere the same sources over loops for its instructions."""

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
    has = native.capabilities()
    if not has.get("avx512"):
        pytest.skip("the float32 half of this engine needs AVX512")
    if has.get("amx"):
        pytest.skip("the AMX kernels themselves run in every other test here")
    monkeypatch.setenv("PEFT_FAST_CUDA_ARCHS", "none")
    monkeypatch.setattr(build, "plan", emulating(build.plan))
    info = build.build(tmp_path, tmp_path / "objects", log=lambda *_: None)
    assert info["ok"], info["reason"]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         "-k", "cpu-amx and (bf16 or integers) and not random_groups",
         "tests/ops/test_contract.py", "tests/ops/test_metamorphic.py", "tests/ops/test_random.py",
         "tests/ops/test_weights.py", "tests/ops/test_activate.py", "tests/ops/test_cpu_gemm.py",
         "tests/ops/test_decode.py"],
        cwd=ROOT,
        env={**os.environ, "PEFT_FAST_LIBRARY": str(tmp_path / build.LIBRARY)},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:]
    passed = int(ran.stdout.rsplit(" passed", 1)[0].rsplit(maxsplit=1)[-1])
    assert passed > 100, "the emulated engine was not among the providers"


BESIDE = """
import torch
from torch.nn.functional import linear
from peft_fast.ops import Adapter, lora_decode, lora_linear

torch.manual_seed(0)
few, x, W = (torch.randn(*size, dtype=torch.bfloat16) for size in ((9, 256), (130, 256), (192, 256)))
adapters = [Adapter(torch.randn(16, 256), torch.randn(192, 16))]
calls = {
    "oneDNN": lambda: linear(x, W),
    "ours": lambda: lora_linear(x, W, None, adapters, backend="cpu"),
    "oneDNN, few": lambda: linear(few, W),
    "ours, few": lambda: lora_decode(few, W, None, adapters, backend="cpu"),
}
with torch.no_grad():
    alone = {name: call() for name, call in calls.items()}
    for name in sorted(calls) * 5 + list(calls) * 5:
        assert torch.equal(calls[name](), alone[name]), name
    for name, t in (("oneDNN", x), ("oneDNN, few", few)):
        assert (alone[name].double() - t.double() @ W.double().T).abs().max() < 0.3, name
"""


@pytest.mark.skipif(not native.capabilities().get("amx"), reason="needs a processor with AMX")
def test_tiles_beside_onednns():
    """Products of both libraries have the same bits whichever of them ran before on the thread."""
    env = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    for threads in ("1", "2"):
        ran = subprocess.run(
            [sys.executable, "-c", BESIDE],
            cwd=ROOT,
            env=env | {"OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr[-2000:]
