"""csrc/cuda on the host: its operators compiled around tests/cuda/shim.h, on CPU tensors."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

from peft_fast import build

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"


def compiled(library: Path, csrc: Path = CSRC, optimize: str = "-O1", hopper: bool = False) -> Path:
    """The operators of the sources in ``csrc`` as a library that torch.ops.load_library takes."""
    torch = build.find_torch()[0]
    include = torch / "include"
    flags = (
        f"-std=c++20 {optimize} -fPIC -shared -fvisibility=hidden -DTORCH_TARGET_VERSION={build.TORCH_TARGET_VERSION}"
    )
    flags += " -DPEFT_FAST_HOPPER" * hopper
    paths = [f"-I{csrc}", f"-I{HERE}", f"-isystem{include}", f"-isystem{include}/torch/csrc/api/include"]
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10", "-ldl"]
    return _compile(HERE / "shim.cpp", library, [*flags.split(), *paths], libraries)


def fake_cublaslt(folder: Path) -> Path:
    """A library by the name of cuBLASLt's, whose GEMM is three loops."""
    flags = f"-std=c++20 -O1 -fPIC -shared -fvisibility=hidden -Wl,-soname,libcublasLt.so.13 -I{CSRC}".split()
    return _compile(HERE / "fake_cublaslt.cpp", folder / "libcublasLt.so.13", flags, [])


def _compile(source: Path, library: Path, flags: list[str], libraries: list[str]) -> Path:
    command = [*shlex.split(build.find_compiler()[0]), *flags, str(source), "-o", str(library), *libraries]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library
