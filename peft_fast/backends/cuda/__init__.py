"""The CUDA kernels of csrc/cuda: NVIDIA GPUs from compute capability 8.0 on."""

from __future__ import annotations

import functools

import torch

from peft_fast import native
from peft_fast.backends.triton import first_line
from peft_fast.native import _constant

CAPABILITY = (8, 0)
PLANS = ("accumulate", "fused")
DTYPES = ADAPTER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@_constant
def reason() -> str:
    """Why no CUDA kernel can run in this process, in a sentence; empty when they can."""
    return native.reason() or _reason()


@functools.cache
def _reason():
    if not archs():
        from peft_fast import build

        why = build.read_info().get("cuda", {}).get("reason")
        return f"the extension was built without CUDA kernels{f': {why}' if why else ''}"
    # CUDA's own runtime, which is linked in, answers on a machine without a driver and beside a CPU build of torch
    if why := torch.ops.peft_fast.cuda_no_device():
        return f"no device: {why}"
    return "" if torch.cuda.is_available() else "no device: torch sees none"


def archs() -> tuple[str, ...]:
    """The architectures that the extension has machine code for."""
    names = torch.ops.peft_fast.cuda_archs() if native.load() else ""
    return tuple(names.split(";")) if names else ()


@_constant
def device_reason(index: int) -> str:
    """Why the kernels do not run on this CUDA device; empty when they do."""
    return reason() or _capability_reason(index)


@functools.cache
def _capability_reason(index):
    try:
        found = torch.cuda.get_device_capability(index)
    except (RuntimeError, AssertionError) as error:  # a process forked from one that uses CUDA, a device that is lost
        return f"CUDA does not start ({first_line(error)})"
    if torch.version.hip:
        return "the CUDA kernels are for NVIDIA GPUs"
    if found < CAPABILITY:
        return f"compute capability {found[0]}.{found[1]} is below 8.0"
    return ""
