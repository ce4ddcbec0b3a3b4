"""A copy of the sources to install from, and pip calls that may not reach a registry."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDERS = ("csrc", "kernels", "benchmarks", "peft_fast")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md")


def copy_sources(root: Path, here: Path) -> Path:
    here.mkdir()
    built = shutil.ignore_patterns("*.so", "*.pyc", "__pycache__", "build_info.json")
    for folder in FOLDERS:
        shutil.copytree(root / folder, here / folder, ignore=built)
    for file in FILES:
        shutil.copy(root / file, here) if (root / file).exists() else (here / file).touch()
    return here


def pip(*args: str, python: str = sys.executable, cwd: Path | None = None, **env: str) -> str:
    """Runs pip without any index and returns its output; it must succeed."""
    command = [python, "-m", "pip", *args]
    # -O0, no CUDA kernels: these tests are about where files go
    base = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    base |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**base, "CXXFLAGS": "-O0", "PEFT_FAST_CUDA_ARCHS": "none", **env},
        text=True,
        capture_output=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def python(code: str, where: Path, executable: str = sys.executable, **env: str) -> str:
    """Standard output of a python started in a folder of no importance, with `where` on its path."""
    base = {**os.environ, "PEFT_FAST_CUDA_ARCHS": "none", "PYTHONPATH": str(where), **env}
    done = subprocess.run([executable, "-c", code], cwd="/", env=base, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def load(clone: Path):
    """build.py of a clone, as a module."""
    spec = importlib.util.spec_from_file_location("build_of_a_clone", clone / "peft_fast" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def info_of(clone: Path) -> dict:
    """What its last build left."""
    return json.loads((clone / "peft_fast" / "build_info.json").read_text())


def call(library: Path, name: str) -> int:
    """What a function of a library returns."""
    code = f"import ctypes, torch, sys; print(ctypes.CDLL({str(library)!r}).{name}())"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
