"""The host model of csrc/cuda, compiled once for all workers, and the dispatcher that lets CPU tensors reach it."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from peft_fast import dispatch, native
from tests.cuda import model


@pytest.fixture(scope="session")
def operators(tmp_path_factory) -> Path:
    """The model's library, loaded: torch.ops.peft_fast.lora_shrink and the others take CPU tensors."""
    if not native.load() or not shutil.which("c++"):
        pytest.skip("needs the extension and a C++ compiler named c++")
    base = tmp_path_factory.getbasetemp()
    library = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "libcuda_model.so"
    with FileLock(f"{library}.lock"):
        if not library.exists():
            model.compiled(library, hopper=True)
    torch.ops.load_library(str(library))
    return library


@pytest.fixture
def on_the_host(operators, monkeypatch):
    """The cuda backend takes CPU tensors, on poisoned memory."""
    from tests import numerics  # which asks for --device when it is imported

    monkeypatch.setitem(dispatch._refusals, "cuda", lambda x, *rest: dispatch._gpu_dtypes(*rest))
    with numerics.poisoned():
        yield
