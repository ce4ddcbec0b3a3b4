"""LoRA over bitsandbytes, torchao and HQQ: tests/quantized, in a process that sees those libraries."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(sys.prefix) / "quantized"  # `make setup` fills it from requirements-quantized.txt


def test_quantized_bases(root):
    if not (FOLDER / "bitsandbytes").is_dir():
        why = "no bitsandbytes, torchao and hqq in .venv/quantized; `make setup` installs them"
        pytest.fail(why) if os.environ.get("CI") == "true" else pytest.skip(why)
    paths = [str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "tests/quantized"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "not installed here" not in done.stdout
