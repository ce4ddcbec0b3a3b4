"""Triton is no requirement of the package: absent, broken or old, plain torch runs and the reason is told."""

import os
import subprocess
import sys

import pytest

CODE = """
import sys
if sys.argv[1] == "absent":
    sys.modules["triton"] = None
import torch, peft_fast
from peft_fast import dispatch, ops
from peft_fast.cli import doctor

x, W = torch.ones(3, 8, requires_grad=True), torch.ones(4, 8)
adapter = ops.Adapter(torch.ones(2, 8), torch.ones(4, 2), 0.5)
for backend in ("torch", None):
    y = ops.lora_linear(x, W, adapters=[adapter], backend=backend)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, torch.full((3, 4), 16.0)) and torch.equal(dx, torch.full((3, 8), 8.0))
    ops.lora_linear(x, W, adapters=[adapter._replace(p=0.5)], backend=backend).sum().backward()
try:
    ops.lora_linear(x, W, adapters=[adapter], backend="triton")
except peft_fast.errors.PeftFastError as error:
    assert len(str(error).splitlines()) == 3
else:
    raise AssertionError("the backend was taken")
assert doctor.versions()
print(*[why for name, live, why in dispatch.backends() if name == "triton" and not live])
"""
PACKAGES = {
    "broken": "raise ImportError('libtriton.so: planted')",
    "worse": "raise RuntimeError('planted')",
    "old": "__version__ = '3.4.0'",
}
SAID = {
    "absent": "triton is not installed",
    "broken": "triton does not import (libtriton.so: planted)",
    "worse": "triton does not import (planted)",
    "old": "triton 3.4.0 is older than 3.6",
}


@pytest.mark.parametrize(("kind", "interpreted"), [("absent", "1"), *((kind, "0") for kind in SAID)])
def test_plain_torch_takes_over(kind, interpreted, root, tmp_path):
    paths = [str(root)]
    if kind in PACKAGES:
        package = tmp_path / "triton"
        package.mkdir()
        (package / "__init__.py").write_text(PACKAGES[kind])
        (package / "language.py").touch()
        paths.insert(0, str(tmp_path))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": interpreted}
    command = [sys.executable, "-c", CODE, kind]
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == SAID[kind]
