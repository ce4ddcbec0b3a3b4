"""The Triton kernels of kernels/: NVIDIA from compute capability 8.0 on, AMD, and the CPU under TRITON_INTERPRET=1."""

from __future__ import annotations

import functools
import importlib.util
import re

import torch

from peft_fast.native import _constant

LEAST = (3, 6)
CAPABILITY = (8, 0)


@_constant
def reason() -> str:
    """Why no Triton kernel can run in this process, in a sentence; empty when they can."""
    return _reason()


@functools.cache
def _reason():
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        import triton.language  # noqa: F401
    except Exception as error:  # a broken installation may raise anything
        return f"triton does not import ({first_line(error)})"
    if tuple(int(n) for n in re.findall(r"\d+", version())[:2]) < LEAST:
        return f"triton {version()} is older than {'.'.join(map(str, LEAST))}"
    return ""


def version() -> str:
    """Of the Triton that is imported; its distribution has other names on ROCm."""
    import triton

    return getattr(triton, "__version__", "0")


@_constant
def interpreting() -> bool:
    """Does Triton run kernels in Python, on tensors of any device (TRITON_INTERPRET=1)?"""
    if reason():
        return False
    import triton

    return triton.knobs.runtime.interpret


@_constant
def device_reason(index: int) -> str:
    """Why the kernels do not run on this CUDA or HIP device; empty when they do."""
    return _device_reason(index)


@functools.cache
def _device_reason(index):
    if reason():
        return reason()
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip:
        return ""
    try:
        found = torch.cuda.get_device_capability(index)
    except (RuntimeError, AssertionError) as error:  # a process forked from one that uses CUDA, a device that is lost
        return f"CUDA does not start ({first_line(error)})"
    if found < CAPABILITY:
        return f"compute capability {found[0]}.{found[1]} is below 8.0"
    return ""


def refuses_device(device: torch.device) -> str:
    """Why the kernels do not take tensors of this device; empty when they do."""
    if device.type == "cuda":
        return device_reason(device.index or 0)
    if device.type == "cpu" and interpreting():
        return ""
    return f"x is on {device.type}, and the Triton kernels are for NVIDIA and AMD GPUs"


def first_line(error: BaseException) -> str:
    """What an exception says, in a line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
