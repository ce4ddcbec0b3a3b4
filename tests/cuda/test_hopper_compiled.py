"""What nvcc makes of the Hopper GEMM: registers, tensor-core and TMA instructions, the weight of its main loop."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from peft_fast import build_cuda

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FILES = {name: CSRC / "cuda" / f"{name}.cu" for name in ("hopper_f16", "hopper_turned_bf16")}


class Kernel(NamedTuple):
    """One instantiation in SASS: (address, instruction)."""

    masked: bool
    wide: bool
    code: list[tuple[int, str]]

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, text)) for _, text in self.code)

    def loops(self) -> list[list[str]]:
        """Bodies of the innermost backward branches first, as straight code between target and branch."""
        at = {address: i for i, (address, _) in enumerate(self.code)}
        found = []
        for i, (address, text) in enumerate(self.code):
            target = re.search(r"BRA (0x[0-9a-f]+)", text)
            if target and int(target[1], 16) <= address:
                found.append([body for _, body in self.code[at[int(target[1], 16)] : i + 1]])
        return sorted(found, key=len)

    def main_loop(self) -> list[str]:
        """The lightest loop that multiplies: whole steps of the base, no mask."""
        return next(body for body in self.loops() if any("HGMMA" in text for text in body))


def highest(code) -> int:
    """The number of the last register used."""
    return max(int(number) for _, text in code for number in re.findall(r"\bR(\d+)\b", text))


@pytest.fixture(scope="module", params=FILES)
def compiled(request, tmp_path_factory):
    """(what the assembler says, its kernels)"""
    cuobjdump = pytest.importorskip("triton").knobs.nvidia.cuobjdump.path
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(build_cuda.VARIABLE, "90a")
        try:
            toolkit = build_cuda.find(CSRC)
        except build_cuda.NoCuda as why:
            pytest.skip(str(why))
    obj = str(tmp_path_factory.mktemp("hopper") / "hopper.o")
    command = (*toolkit.compile(FILES[request.param], CSRC, obj), "-Xptxas=-v")
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    sass = subprocess.run([cuobjdump, "-sass", obj], check=True, capture_output=True, text=True).stdout
    kernels = []
    for text in re.split(r"\n\s+Function : ", sass)[1:]:
        code = [(int(a, 16), b) for a, b in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", text)]
        # hopper_kernel<T, TURNED, MASKED, BN>
        masked, columns = re.search(r"ELb[01]ELb([01])ELi(\d+)E", text).groups()
        kernels.append(Kernel(masked == "1", columns == "256", code))
    return said, sorted(kernels)


def test_no_spill_and_the_expected_registers(compiled):
    said, kernels = compiled
    assert [kernel[:2] for kernel in kernels] == [(False, False), (False, True), (True, False), (True, True)]
    assert said.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == 4
    # 168 · 384 threads at the launch, then 232 for each of 256 and 40 for each of 128
    assert re.findall(r"Used (\d+) registers", said) == ["168"] * 4
    for kernel in kernels:
        assert kernel.count("LDL|STL") == 0
        assert kernel.count("USETMAXREG.TRY_ALLOC.*0xe8") == 1 and kernel.count("USETMAXREG.DEALLOC.*0x28") == 1
        # the producer's code comes last
        given = next(i for i, (_, text) in enumerate(kernel.code) if "USETMAXREG.DEALLOC" in text)
        assert highest(kernel.code[:given]) < 232 and highest(kernel.code[given:]) < 40


def test_products_are_not_serialized(compiled):
    # C7510 and its like: the assembler waits for each product, or adds fences of its own
    assert not re.search(r"C75\d\d", compiled[0])


def test_instructions_of_hopper(compiled):
    for kernel in compiled[1]:
        assert kernel.count(f"HGMMA.64x{256 if kernel.wide else 128}x16.F32") >= 11
        assert kernel.count(r"\bHMMA") == 0
        assert kernel.count("UTMALDG.2D.MULTICAST") >= 1 and kernel.count("UTMALDG.2D ") >= 1
        assert kernel.count("UTMASTG.2D") == (4 if kernel.wide else 2)
        assert kernel.count("STSM.16.M88.4") == (16 if kernel.wide else 8)


def test_main_loop_is_light(compiled):
    """Triton's loop of the frozen layer has 136 instructions for as many products; ours has no adapter in it at all."""
    loops = {kernel[:2]: kernel.main_loop() for kernel in compiled[1]}
    for body in loops.values():
        assert sum("HGMMA" in text for text in body) == 4
        assert len(body) <= 110
        # addresses of operands are 32-bit sums: no division, no memory but barriers
        assert not any(re.search(r"LDG|STG|LDS|STS|I2F|F2I|CALL", text) for text in body)
    for wide in False, True:
        assert len(loops[True, wide]) <= len(loops[False, wide]) + 8
