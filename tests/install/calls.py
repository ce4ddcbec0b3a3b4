"""A copy of the sources to install from, and pip calls that may not reach a registry."""

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
    # -O0: these tests are about where files go
    base = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    base |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run(
        command, cwd=cwd, env={**base, "CXXFLAGS": "-O0", **env}, text=True, capture_output=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def python(code: str, where: Path, executable: str = sys.executable, **env: str) -> str:
    """Standard output of a python started in a folder of no importance, with `where` on its path."""
    base = {**os.environ, "PYTHONPATH": str(where), **env}
    done = subprocess.run([executable, "-c", code], cwd="/", env=base, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()
