"""Compiles the project's own launches without a GPU: a Triton driver that records instead of running.

with recording("sm_90") as launches:      every kernel launched inside, on meta tensors, is compiled for that
    forward(x.to("meta"), ...)            architecture as it would be on the device, specialisation and all
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver


class Arch(NamedTuple):
    """What a proof needs to know of an architecture; `gemm` finds the matrix instructions that reach its peak."""

    target: GPUTarget
    shared: int  # bytes a block may use
    processors: int
    gemm: str


MATRIX = r"\bw?g?mma\.|tcgen05\.mma|v_mfma_"
ARCHS = {
    "sm_80": Arch(GPUTarget("cuda", 80, 32), 166912, 108, r"\bmma\.sync"),
    "sm_89": Arch(GPUTarget("cuda", 89, 32), 101376, 142, r"\bmma\.sync"),
    "sm_90": Arch(GPUTarget("cuda", 90, 32), 232448, 132, r"wgmma\.mma_async"),
    "sm_100": Arch(GPUTarget("cuda", 100, 32), 232448, 148, r"tcgen05\.mma"),
    "sm_120": Arch(GPUTarget("cuda", 120, 32), 101376, 170, r"\bmma\.sync"),
    "gfx942": Arch(GPUTarget("hip", "gfx942", 64), 65536, 304, r"v_mfma_"),
}
# quick tests compile for these alone
FIRST = ("sm_80", "sm_90", "gfx942")
# kernels without a product, or of one that is too small for a matrix unit
PLAIN = "activate gather scatter collect finalize decode_finish linear_scale drop_kernel nf4".split()
FULL = ("fused", "group", "experts_product")  # these reach the peak
# what multiplies in a machine's own code, with or without a matrix unit
PRODUCTS = r"HG?MMA\.|UTC[A-Z]*MMA|FFMA|v_mfma_|v_(pk_)?fma"


class Launch:
    """One launch: kernel name, grid, what was compiled for it; the assembly is read when asked for."""

    def __init__(self, arch: str, grid: tuple[int, int, int], kernel: CompiledKernel) -> None:
        self.arch, self.grid, self.kernel = ARCHS[arch], grid, kernel
        self.name, self.shared = kernel.name, kernel.metadata.shared

    def __repr__(self) -> str:
        return f"{self.name}{self.grid} for {self.arch.target.arch}"

    def faults(self, matrix: str = "") -> list[str]:
        """What no launch of ours may show, in words; ``matrix`` finds instructions that it must have."""
        found = []
        if self.stack:
            found.append(f"registers spill: {self.stack} B of stack")
        if self.shared > self.arch.shared:
            found.append(f"{self.shared} B of shared memory, and the architecture has {self.arch.shared}")
        if matrix and not re.search(matrix, self.kernel.asm["ptx" if self.arch.target.backend == "cuda" else "amdgcn"]):
            found.append(f"no instruction like {matrix}")
        return found

    @property
    def identity(self) -> str:
        """Equal for two launches of one compiled kernel."""
        return self.kernel.hash

    @property
    def arguments(self) -> dict[str, str]:
        """Name -> type of each argument that is no constant, `aligned` behind it where 16 is known to divide it.

        Members of a tuple are named by their place: W_ptrs.0, W_ptrs.1.
        """
        source = self.kernel.src
        told = {at for at, facts in source.attrs.items() if ["tt.divisibility", 16] in facts}

        def members(name, kind, place):
            if isinstance(kind, tuple):
                for i, member in enumerate(kind):
                    yield from members(f"{name}.{i}", member, (*place, i))
            elif kind != "constexpr":
                yield name, f"{kind} aligned" if place in told else kind

        signature = enumerate(source.signature.items())
        return dict(found for i, (name, kind) in signature for found in members(name, kind, (i,)))

    @functools.cached_property
    def code(self) -> tuple[list[str], dict[str, int]]:
        """The instructions in order, and the place among them of each label that branches name."""
        if self.arch.target.backend == "cuda":
            found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", self._dump("-sass"), re.MULTILINE)
            return [text for _, text in found], {f"{int(at, 16):x}": i for i, (at, _) in enumerate(found)}
        texts, labels = [], {}
        for line in self.kernel.asm["amdgcn"].splitlines():
            text = line.partition(";")[0].strip()
            if text.endswith(":"):
                labels[text[:-1]] = len(texts)
            elif text and not text.startswith((".", "/")):
                texts.append(text)
        return texts, labels

    @functools.cached_property
    def stack(self) -> int:
        """Bytes of a thread's stack, which holds nothing but registers that did not fit."""
        if self.arch.target.backend == "cuda":
            return int(re.search(r"STACK:(\d+)", self._dump("-res-usage"))[1])
        return int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", self.kernel.asm["amdgcn"])[1])

    @functools.cached_property
    def main_loop(self) -> list[str]:
        """Instructions of the loop that is densest in products: the innermost one; empty where there is none."""
        code, labels = self.code
        loops = []
        for end, text in enumerate(code):
            target = re.search(r"BRA\S*\s+.*?\b0x([0-9a-f]+)$|s_c?branch\S*\s+(\S+)$", text)
            start = labels.get(target[1] or target[2], end) if target else end
            if start < end:
                loops.append(code[start : end + 1])
        return max(loops, key=lambda loop: count(PRODUCTS, loop) / len(loop), default=[])

    def _dump(self, what: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.kernel.asm["cubin"])
            file.flush()
            return subprocess.check_output(
                [knobs.nvidia.cuobjdump.path, what, file.name], text=True, stderr=subprocess.STDOUT
            )


def matrix(arch: str, kind: str, kernel: Launch) -> str:
    """The matrix instructions a kernel must have: float32 is multiplied without them on NVIDIA's."""
    if any(plain in kernel.name for plain in PLAIN) or (kind == "f32" and arch != "gfx942"):
        return ""
    return ARCHS[arch].gemm if any(full in kernel.name for full in FULL) else MATRIX


def faults(arch: str, kind: str, found: list[Launch]) -> list[str]:
    """What no kernel of ours may show, in words."""
    return [f"{kernel}: {fault}" for kernel in found for fault in kernel.faults(matrix(arch, kind, kernel))]


def count(pattern: str, code: list[str]) -> int:
    """How many instructions match."""
    return sum(map(bool, map(re.compile(pattern).search, code)))


class Recorder:
    """What triton.runtime.driver.active must offer before a launch, with no device behind it."""

    def __init__(self, arch: str) -> None:
        self.arch = ARCHS[arch]
        # Triton keeps compiled kernels by device, so each architecture is a device of its own
        self.device = list(ARCHS).index(arch)
        properties = {
            "max_shared_mem": self.arch.shared,
            "multiprocessor_count": self.arch.processors,
            "warpSize": self.arch.target.warp_size,
        }
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties)

    def get_current_target(self) -> GPUTarget:
        return self.arch.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Launches inside the block are compiled for `arch` and listed, in order; nothing runs."""
    launches: list[Launch] = []
    before, run, metadata = driver._active, CompiledKernel.run, CompiledKernel.launch_metadata
    driver.set_active(Recorder(arch))
    CompiledKernel.launch_metadata = lambda *_: None  # would load the binary
    CompiledKernel.run = property(lambda kernel: lambda x, y, z, *_: launches.append(Launch(arch, (x, y, z), kernel)))
    try:
        yield launches
    finally:
        CompiledKernel.run, CompiledKernel.launch_metadata = run, metadata
        driver._active = before
