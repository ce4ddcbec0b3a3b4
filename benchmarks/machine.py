"""The header of every result: the machine and the versions the figures belong to."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "numpy")
ABSENT = "absent"
ISA_FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")


def header(device: torch.device) -> dict:
    """Everything a reader needs to judge or repeat the figures; no host name, no path, no user."""
    cpu = _cpuinfo()
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": cpu["model"],
        "flags": cpu["flags"],
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "cores": cpu["cores"],
        "logical_cpus": os.cpu_count(),
        "load_average": [round(v, 2) for v in os.getloadavg()] if hasattr(os, "getloadavg") else [],
        "packages": {name: _version(name) for name in PACKAGES},
        "peft_fast": _peft_fast(),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return found


def cores() -> int:
    """Physical cores this process may use."""
    return _cpuinfo()["cores"]


def no_interpreter() -> str:
    """Why Triton's interpreter cannot be relied on here, in a sentence; empty when it can."""
    triton, numpy = _version("triton"), _version("numpy")
    if triton == ABSENT:
        return "triton is not installed"

    def below(version: str, *least: int) -> bool:
        return tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < least

    if below(triton, 3, 7) and not below(numpy, 2, 4):
        return f"the interpreter of triton {triton} has no loops over run-time bounds beside numpy {numpy}"
    return ""


def line(found: dict) -> str:
    """The header in one line."""
    versions = (f"{name} {found['packages'][name]}" for name in ("torch", "peft", "transformers"))
    return ", ".join([where(found), *versions, found["date"][:10]])


def where(found: dict) -> str:
    """What the figures were made on, without versions and date."""
    if "gpu" in found:
        return found["gpu"]["name"]
    return f"{found['cpu']} ({found['cores']} cores, {_best(found)})"


def _best(found: dict) -> str:
    if "amx_bf16" in found["flags"]:
        return "AMX"
    if "avx512_bf16" in found["flags"]:
        return "AVX512-BF16"
    return found["torch_isa"]


def _peft_fast() -> dict:
    from peft_fast import native

    if not native.load():
        return {"extension": "not loaded", "reason": native.reason().splitlines()[0]}
    facts = {"extension": "loaded", "isa": native.isa()}
    for key, value in native.capabilities().items():
        # build facts may name folders of the machine that compiled; a result that is committed does not
        if isinstance(value, (bool, int, float, str)) and "/" not in str(value):
            facts[key] = value
    return facts


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT


def commit() -> str:
    """Short commit of the checkout, with + when it has changes; empty outside of one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        head = _git(root, "rev-parse", "--short", "HEAD")
        changes = _git(root, "status", "--porcelain", "--", "peft_fast", "csrc", "kernels", "benchmarks/*.py")
    except (OSError, subprocess.SubprocessError):
        return ""
    return head + ("+" if changes else "")


def _git(root: Path, *args: str) -> str:
    command = ["git", "-C", str(root), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def _cpuinfo() -> dict:
    model, flags, cores = platform.processor() or platform.machine(), [], set()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {"model": model, "flags": flags, "cores": os.cpu_count()}
    for block in text.strip().split("\n\n"):
        info = {k.strip(): v.strip() for k, _, v in (row.partition(":") for row in block.splitlines())}
        model = info.get("model name", model)
        have = set(info.get("flags", "").split())
        flags = [flag for flag in ISA_FLAGS if flag in have] or flags
        cores.add((info.get("physical id", "0"), info.get("core id", info.get("processor"))))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"model": model, "flags": flags, "cores": min(len(cores), usable)}
