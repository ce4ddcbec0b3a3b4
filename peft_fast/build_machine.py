"""What this machine can build with: torch, a C++ compiler and the instruction sets it knows, ninja.

Like build.py, which loads this file by path, it imports neither torch nor the package.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

MIN_TORCH = (2, 11)


class Isa(NamedTuple):
    """Flags for one source file, and an instruction which the assembler must know too."""

    flags: tuple[str, ...]
    probe: str


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *_AVX2, "-mprefer-vector-width=512")
_BF16 = (*_AVX512, "-mavx512bf16")
# weakest first: this is the link order too (see _link_order)
ISA_FILES = {
    "isa_avx2.cpp": Isa(_AVX2, "vfmadd231ps %ymm0, %ymm1, %ymm2"),
    "isa_avx512.cpp": Isa(_AVX512, "vpaddw %zmm0, %zmm1, %zmm2"),
    "isa_avx512_bf16.cpp": Isa(_BF16, "vdpbf16ps %zmm0, %zmm1, %zmm2"),
    "isa_amx.cpp": Isa((*_BF16, "-mamx-tile", "-mamx-bf16"), "tdpbf16ps %tmm0, %tmm1, %tmm2"),
}
UNAVAILABLE = "-DPEFT_FAST_ISA_UNAVAILABLE"


class CannotBuild(Exception):
    """Why there is no extension (one sentence), what to do, and whether it is this machine or our sources."""

    def __init__(self, reason: str, do: str, machine: bool = True):
        super().__init__(reason)
        self.reason, self.do, self.machine = reason, do, machine


def _site_dirs() -> list[Path]:
    """Where packages live, also for an isolated pip build whose sys.path no longer shows them."""
    dirs = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    if (Path(sys.prefix) / "pyvenv.cfg").is_file():
        cfg = (Path(sys.prefix) / "pyvenv.cfg").read_text().lower()
        if re.search(r"include-system-site-packages\s*=\s*true", cfg):
            base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
            dirs += [sysconfig.get_path("purelib", vars=base), sysconfig.get_path("platlib", vars=base)]
    return [Path(d) for d in dict.fromkeys(dirs) if d]


def package_dir(name: str) -> Path | None:
    """The folder of an installed package, found without importing it."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec and spec.origin:
        return Path(spec.origin).parent
    return next((d / name for d in _site_dirs() if (d / name / "__init__.py").is_file()), None)


def find_torch() -> tuple[Path, str]:
    """(folder, version) of the installed torch; CannotBuild if it is missing, too old or has no headers."""
    need = ".".join(map(str, MIN_TORCH))
    folder = package_dir("torch")
    if folder is None:
        raise CannotBuild(
            f"torch is not installed for {sys.executable}",
            f"install torch>={need}, then run `python -m peft_fast build`",
        )
    found = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", (folder / "version.py").read_text())
    version = found.group(1) if found else "unknown"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if not numbers or tuple(map(int, numbers.groups())) < MIN_TORCH:
        raise CannotBuild(f"torch {version} is too old", f"install torch>={need}, then run `python -m peft_fast build`")
    if not (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise CannotBuild(
            f"torch {version} has no C++ headers in {folder}",
            "install torch from its official wheel, then run `python -m peft_fast build`",
        )
    return folder, version


def find_compiler() -> tuple[str, str]:
    """(path, first line of --version); the CXX environment variable wins."""
    asked = os.environ.get("CXX", "").strip()
    for name in [asked] if asked else ["c++", "g++", "clang++"]:
        words = shlex.split(name)
        path = shutil.which(words[0])
        if not path:
            continue
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run([path, *words[1:], "--version"], capture_output=True, text=True, timeout=60)
            if done.returncode == 0 and done.stdout.strip():
                return shlex.join([path, *words[1:]]), done.stdout.splitlines()[0]
    raise CannotBuild(
        f"CXX={asked} does not run" if asked else "no C++ compiler (c++, g++ or clang++) on PATH",
        "install one (`apt-get install g++`), then run `python -m peft_fast build`",
    )


def default_jobs() -> int:
    """MAX_JOBS, else one compiler for each core this process may use."""
    asked = os.environ.get("MAX_JOBS", "").strip()
    if asked and not (asked.isdecimal() and int(asked)):
        raise CannotBuild(f"MAX_JOBS={asked!r} is not a positive number", "set it to one or unset it, and build again")
    return int(asked or len(os.sched_getaffinity(0)))


def find_ninja() -> str | None:
    """The ninja beside this python, in the ninja package or on PATH, in this order: versions share no log."""
    package = package_dir("ninja")
    places = [
        Path(sysconfig.get_path("scripts")) / "ninja",
        package and package / "data" / "bin" / "ninja",
        shutil.which("ninja"),
    ]
    for place in places:
        if place and os.access(place, os.X_OK):
            with contextlib.suppress(OSError):
                if subprocess.run([str(place), "--version"], capture_output=True).returncode == 0:
                    return str(place)
    return None


def isa_flags(compiler: str) -> dict[str, tuple[str, ...]]:
    """File name → its flags; (UNAVAILABLE,) where compiler or assembler does not know the instruction set."""
    table = {}
    for name, isa in ISA_FILES.items():
        known = platform.machine() in ("x86_64", "AMD64")
        if known:
            source = f'int main() {{ __asm__ volatile("{isa.probe.replace("%", "%%")}" ::: "memory"); }}\n'
            with tempfile.TemporaryDirectory() as tmp:
                command = [*shlex.split(compiler), *isa.flags, "-x", "c++", "-c", "-", "-o", f"{tmp}/probe.o"]
                known = subprocess.run(command, input=source, text=True, capture_output=True).returncode == 0
        table[name] = isa.flags if known else (UNAVAILABLE,)
    return table
