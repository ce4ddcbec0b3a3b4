"""What nvcc made of csrc/cuda: machine code of every architecture, without spills, with tensor-core instructions."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from peft_fast import build, native

ARCHS = build.cuda.ARCHS
# kernels of each architecture: three products in two half-precision dtypes, the same in float32, the rest once
KERNELS = {"shrink_kernel": 8, "outer_kernel": 10, "expand_kernel": 2}
KERNELS |= {f"{name}_f32_kernel": 1 for name in ("shrink", "outer", "expand")}
KERNELS |= {"finalize_kernel": 1, "mask_kernel": 1}


def cuobjdump() -> str:
    """The tool on PATH, or the one that comes with triton."""
    spec = importlib.util.find_spec("triton")
    bundled = spec and spec.origin and Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = shutil.which("cuobjdump") or (bundled and bundled.is_file() and str(bundled))
    if not path:
        pytest.skip("needs cuobjdump, from CUDA or from triton")
    return path


def output(*args: str) -> str:
    done = subprocess.run([cuobjdump(), *args], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built() -> dict:
    """What build_info.json says of the CUDA part; where there is nvcc, there has to be one."""
    cuda = build.read_info().get("cuda", {"archs": "", "reason": "the extension is not built"})
    if not cuda["archs"]:
        by_choice = f"{build.cuda.VARIABLE}=none" in cuda["reason"]
        assert not shutil.which("nvcc") or (by_choice and os.environ.get("CI") != "true"), cuda["reason"]
        pytest.skip(cuda["reason"])
    return cuda


@pytest.fixture(scope="module")
def usage(built) -> dict[str, dict[str, dict]]:
    """Architecture -> kernel's mangled name -> what it uses."""
    return used(output("-res-usage", str(native.LIBRARY)))


def used(text: str) -> dict[str, dict[str, dict]]:
    """cuobjdump's report of resources, by architecture and kernel."""
    found: dict[str, dict[str, dict]] = {}
    arch = name = ""
    for line in text.splitlines():
        if line.startswith("arch = sm_"):
            arch = line.removeprefix("arch = sm_")
        elif line.startswith(" Function "):
            name = line.removeprefix(" Function ").rstrip(":")
        elif line.lstrip().startswith("REG:"):
            numbers = {key: int(n) for key, n in re.findall(r"([A-Z]+(?:\[\d+\])?):(\d+)", line)}
            found.setdefault(arch, {})[name] = numbers
    return found


def spilled(usage: dict[str, dict[str, dict]]) -> list[str]:
    """Kernels with a stack: what does not fit in registers lies there."""
    return [f"{name} on sm_{arch}" for arch, kernels in usage.items() for name, n in kernels.items() if n["STACK"]]


def test_machine_code_of_every_architecture(built, usage):
    wanted = built["archs"].split(";")
    assert sorted(usage) == sorted(wanted)
    if wanted != list(ARCHS):
        assert os.environ.get("CI") != "true", f"built for {built['archs']} alone"
        pytest.skip(f"built for {built['archs']} alone: unset {build.cuda.VARIABLE} and build again")


def test_every_kernel_is_there(built, usage):
    for arch, kernels in usage.items():
        for name, count in KERNELS.items():
            found = [mangled for mangled in kernels if re.search(rf"\d{name}(?!\w*_f32_kernel)", mangled)]
            assert len(found) == count, f"{name} on sm_{arch}: {len(found)}"
    hopper = {arch for arch, kernels in usage.items() if any("hopper_kernel" in name for name in kernels)}
    assert hopper <= {"90a"} and ("90a" not in usage or hopper)


def test_no_kernel_spills(usage):
    assert not spilled(usage)


def test_two_blocks_fit_on_a_multiprocessor(usage):
    wide = {
        f"{name} on sm_{arch}": n["REG"]
        for arch, kernels in usage.items()
        for name, n in kernels.items()
        if "hopper" not in name and n["REG"] > 65536 // (2 * 256)
    }
    assert not wide


def test_there_is_ptx_for_later_architectures(built):
    listed = output("--list-ptx", str(native.LIBRARY))
    assert len(re.findall(rf"sm_{built['ptx']}\.ptx", listed)) >= 7


ARCHS_IN_SHORT = ("80", "90a")  # a disassembly takes seconds


@pytest.mark.parametrize(
    "arch", [arch if arch in ARCHS_IN_SHORT else pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHS]
)
def test_products_run_on_tensor_cores(built, tmp_path, arch):
    if arch not in built["archs"].split(";"):
        pytest.skip(f"not built for {arch}")
    for stem in ("shrink_bf16", "expand_f16"):
        obj = build.default_build_dir() / f"cuda__{stem}_cu.o"
        if not obj.is_file():
            pytest.skip("the objects of the build are gone")
        sass = output("--dump-sass", "--gpu-architecture", f"sm_{arch}", str(obj))
        functions = sass.split("Function : ")[1:]
        assert functions
        for text in functions:
            name = text.split("\n", 1)[0]
            assert re.search(r"\bHMMA\.16816\.F32", text), f"{name} has no tensor-core instruction"
            assert re.search(r"\bLDG\.E\.(?:\w+\.)*128", text) or "expand" in name, f"{name} has no 16-byte load"
            assert not re.search(r"\b(?:STL|LDL)\b", text), f"{name} spills"
            assert not re.search(r"\b(?:ATOM|RED)(?:G|S)?\.", text), f"{name} has an atomic operation"


def test_the_reader_of_the_report_sees_a_spill():
    report = (
        "arch = sm_80\n Function a:\n  REG:128 STACK:8 SHARED:0\narch = sm_86\n Function a:\n  REG:9 STACK:0 SHARED:0"
    )
    assert spilled(used(report)) == ["a on sm_80"]


def test_a_kernel_that_needs_too_much_is_seen_as_spilling(tmp_path, built):
    """The report of a real spill: 64 sums of a thread that may have 16 registers."""
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    (tmp_path / "spill.cu").write_text(
        'extern "C" __global__ void __launch_bounds__(1024, 2) spill(float* x) {\n'
        "  float v[64];\n"
        "  for (int i = 0; i < 64; ++i) v[i] = x[i * 1024 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 64; ++i)\n"
        "#pragma unroll\n"
        "    for (int j = 0; j < 64; ++j) v[i] = v[i] * v[j] + 1.0f;\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = v[i];\n"
        "}\n"
    )
    obj = str(tmp_path / "spill.o")
    subprocess.run(["nvcc", "-arch=sm_80", "-c", str(tmp_path / "spill.cu"), "-o", obj], check=True)
    assert spilled(used(output("-res-usage", obj)))
