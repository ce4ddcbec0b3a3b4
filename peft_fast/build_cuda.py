"""csrc/cuda/*.cu → objects of libpeft_fast.so, machine code of each architecture in PEFT_FAST_CUDA_ARCHS and PTX.

| PEFT_FAST_CUDA_ARCHS | what is compiled |
|---|---|
| unset or empty | every architecture of ARCHS that this nvcc knows |
| none | nothing: an extension with CPU kernels alone |
| native | what the GPUs of this machine need, as nvidia-smi names them |
| 80, 86, 89, 90a, 100, 120 | these, in a list with commas, semicolons or spaces; 90 means 90a |

nvcc is all that is needed: no driver, no GPU, no CUDA build of torch. Like build.py, which loads this file by path, it
imports neither torch nor the package.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

VARIABLE = "PEFT_FAST_CUDA_ARCHS"
ARCHS = ("80", "86", "89", "90a", "100", "120")
PTX = "80"  # an architecture without machine code of its own has the driver compile this
MIN_NVCC = (12, 0)
FLAGS = (
    "-std=c++20",
    "-O3",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xptxas=-warn-spills,-warn-lmem-usage",
)


class WrongArchs(Exception):
    """PEFT_FAST_CUDA_ARCHS holds a word that means nothing."""


class NoCuda(Exception):
    """Why there are no CUDA kernels, in a sentence."""


class Toolkit(NamedTuple):
    """An nvcc, and what is compiled with it."""

    nvcc: str
    version: str
    cudart: Path  # libcudart_static.a: the library loads where there is no CUDA at all
    archs: tuple[str, ...]

    def info(self) -> dict:
        """What build_info.json says of it."""
        return {
            "archs": ";".join(self.archs),
            "ptx": PTX,
            "nvcc": self.nvcc,
            "nvcc_version": self.version,
            "reason": "",
        }

    def macros(self) -> tuple[str, ...]:
        """What the C++ files beside the kernels are told."""
        hopper = ("-DPEFT_FAST_HOPPER",) if "90a" in self.archs else ()
        return (f'-DPEFT_FAST_CUDA_ARCHS="{";".join(self.archs)}"', *hopper)

    def link_flags(self) -> tuple[str, ...]:
        """CUDA's runtime, inside the library and invisible outside it."""
        return (str(self.cudart), f"-Wl,--exclude-libs,{self.cudart.name}", "-ldl", "-lrt", "-lpthread")

    def sources(self, csrc: Path) -> list[Path]:
        """The kernels; those of one architecture (hopper*.cu: 90a) only where it is asked for."""
        files = sorted((csrc / "cuda").glob("*.cu"))
        return [f for f in files if "90a" in self.archs or not f.name.startswith("hopper")]

    def compile(self, source: Path, csrc: Path, obj: str) -> tuple[str, ...]:
        """The command that makes an object with a depfile beside it."""
        if source.name.startswith("hopper"):
            code = [("90a", "sm_90a")]
        else:
            code = [*[(arch, f"sm_{arch}") for arch in self.archs], (PTX, f"compute_{PTX}")]
        targets = [f"-gencode=arch=compute_{arch},code={what}" for arch, what in code]
        return (self.nvcc, *FLAGS, *targets, f"-I{csrc}", "-MD", "-MF", f"{obj}.d", "-c", str(source), "-o", obj)


def asked(text: str) -> tuple[str, ...] | None:
    """PEFT_FAST_CUDA_ARCHS → architectures in ARCHS' order; () = none, None = all; raises WrongArchs."""
    words = [word for word in re.split(r"[\s,;]+", text.strip().lower()) if word]
    if not words:
        return None
    if words == ["none"]:
        return ()
    found = set()
    for word in words:
        if word == "native":
            found.update(native())
            continue
        arch = {"90": "90a"}.get(word.replace(".", ""), word.replace(".", ""))
        if arch not in ARCHS:
            raise WrongArchs(f"{VARIABLE}={text!r}: {word!r} is none of {', '.join(ARCHS)}, native or none")
        found.add(arch)
    return tuple(arch for arch in ARCHS if arch in found)


def native() -> list[str]:
    """What the GPUs of this machine run, best first: same generation, not newer than the GPU."""
    smi = shutil.which("nvidia-smi")
    query = [smi or "", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
        capabilities = {tuple(map(int, line.split("."))) for line in done.stdout.split()}
    except (OSError, ValueError, subprocess.TimeoutExpired):
        capabilities = set()
    if not capabilities:
        raise NoCuda(f"{VARIABLE}=native, and nvidia-smi shows no GPU")
    fits = []
    for major, minor in capabilities:
        known = [(int(arch.strip("a")), arch) for arch in ARCHS]
        same = [arch for number, arch in known if number // 10 == major and number % 10 <= minor]
        fits += same[-1:] or [PTX]
    return fits


def find(csrc: Path) -> Toolkit:
    """The toolkit and architectures of this build; raises WrongArchs, or NoCuda with the reason."""
    wanted = asked(os.environ.get(VARIABLE, ""))
    if wanted == ():
        raise NoCuda(f"{VARIABLE}=none left them out")
    if not any((csrc / "cuda").glob("*.cu")):
        raise NoCuda("there are no CUDA sources")
    nvcc = _nvcc()
    output = _run([nvcc, "--version"])
    found = re.search(r"release (\d+)\.(\d+)", output)
    if not found:
        raise NoCuda(f"{nvcc} does not tell its version")
    version = f"{found[1]}.{found[2]}"
    if tuple(map(int, found.groups())) < MIN_NVCC:
        raise NoCuda(f"nvcc {version} is older than {'.'.join(map(str, MIN_NVCC))}")
    known = set(re.findall(r"compute_(\w+)", _run([nvcc, "--list-gpu-arch"])))
    unknown = [arch for arch in wanted or () if arch.rstrip("a") not in known]
    if unknown:
        raise NoCuda(f"nvcc {version} does not know compute capability {', '.join(unknown)}")
    archs = wanted or tuple(arch for arch in ARCHS if arch.rstrip("a") in known)
    return Toolkit(nvcc, version, _cudart(nvcc), archs)


def _nvcc() -> str:
    named = os.environ.get("CUDACXX", "").strip()
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [named] if named else [*[f"{home}/bin/nvcc" for home in homes if home], "nvcc", "/usr/local/cuda/bin/nvcc"]
    for place in places:
        if path := shutil.which(place):
            return path
    raise NoCuda(f"CUDACXX={named} does not run" if named else "nvcc is not on PATH")


def _cudart(nvcc: str) -> Path:
    # on some systems nvcc on PATH is a script that calls the real one: it says itself where it lives
    top = re.search(r"TOP=(\S+)", _run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]))
    home = Path(top[1] if top else Path(nvcc).resolve().parent.parent)
    folders = ["lib64", "lib", *[str(p.relative_to(home)) for p in home.glob("targets/*/lib")]]
    for folder in folders:
        if (home / folder / "libcudart_static.a").is_file():
            return (home / folder / "libcudart_static.a").resolve()
    raise NoCuda(f"libcudart_static.a is not in {home}")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoCuda(f"{command[0]} does not run ({error})") from error
    return done.stdout + done.stderr
