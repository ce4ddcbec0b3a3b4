"""What the Triton backend refuses before anything is launched, and how it says so: devices that are only played."""

import sys
from types import SimpleNamespace

import pytest
import torch

from peft_fast import dispatch
from peft_fast.backends import triton as backend
from peft_fast.backends.triton import tuning
from peft_fast.ops import Adapter, lora_linear
from tests import numerics

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(numerics.DEVICE.type != "cpu", reason="the devices of these tests are played")


@pytest.fixture(autouse=True)
def _asked_anew():
    for cached in (backend._reason, backend._device_reason):
        cached.cache_clear()
    yield
    for cached in (backend._reason, backend._device_reason):
        cached.cache_clear()


def picked(dtype=torch.bfloat16):
    """What dispatch says to a tensor of the GPU, of which only this much exists."""
    x = SimpleNamespace(device=torch.device("cuda", 0), shape=(4, 8))
    return dispatch.pick(x, dtype, torch.empty(4, 8, dtype=dtype), [torch.empty(2, 8, dtype=dtype)])


@pytest.fixture
def gpu(monkeypatch):
    """gpu((9, 0)): torch sees a GPU of this compute capability."""

    def become(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(tuning, "load", lambda index: {})

    return become


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (13, 0)])
def test_architectures_that_run(gpu, capability):
    gpu(capability)
    assert picked()[:2] == ("triton", "accumulate")
    assert picked(torch.float64)[::2] == ("torch", "the GPU kernels have no float64")


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_architectures_that_do_not(gpu, capability):
    gpu(capability)
    assert picked()[::2] == ("torch", f"compute capability {capability[0]}.{capability[1]} is below 8.0")


def test_a_forked_process_that_may_not_use_cuda(gpu, monkeypatch):
    gpu((9, 0))

    def capability(index):
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess.\nUse spawn")

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    assert picked()[::2] == ("torch", "CUDA does not start (Cannot re-initialize CUDA in forked subprocess.)")


def test_triton_missing(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setitem(sys.modules, "triton", None)
    assert picked()[::2] == ("torch", "triton is not installed")
    assert ("triton", False, "triton is not installed") in dispatch.backends()


def test_triton_too_old(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr("triton.__version__", "3.5.1")
    assert picked()[::2] == ("torch", "triton 3.5.1 is older than 3.6")


def test_triton_broken(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setitem(sys.modules, "triton.language", None)
    why = picked().reason
    assert why.startswith("triton does not import (") and ("triton", False, why) in dispatch.backends()


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert picked()[::2] == ("torch", "torch sees no GPU")
    x = torch.ones(2, 8)
    with pytest.raises(dispatch.SettingsError, match="x is on cpu"):
        lora_linear(x, torch.ones(4, 8), None, [Adapter(torch.ones(2, 8), torch.ones(4, 2))], backend="triton")
