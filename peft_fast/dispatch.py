"""pick(x, W, …) -> the backend and plan that run an op on these tensors, and why."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch

from peft_fast import native, settings
from peft_fast.backends import cuda, has, triton
from peft_fast.backends.triton import tuning
from peft_fast.errors import SettingsError, fail

CPU_DTYPES = (torch.float32, torch.bfloat16)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# plans of each backend, the one it is picked with first
BACKEND_PLANS = {
    "cuda": cuda.PLANS,
    "triton": ("accumulate", "fused"),
    "cpu": ("accumulate",),
    "torch": ("accumulate", "augmented"),
    "reference": ("accumulate",),
}
# what is picked where no backend is named; on any other device, cpu
AUTO = {"cuda": "triton"}
PLANS = tuple(dict.fromkeys(plan for plans in BACKEND_PLANS.values() for plan in plans))
# ops without a base product of their own: every backend has one way to run them
UNPLANNED = {
    "lora_decode",
    "lora_embedding",
    "dora_linear",
    "dora_decode",
    "dora_embedding",
    "dora_norm",
    "lora_mixed",
    "nf4",
    "lora_add",
    "lora_experts",
}
# whose base product is torch's where vendor_faster(), from so many weights on: below, one call costs less than several
VENDOR_OPS = {"lora_linear", "lora_group", "lora_mlp"}
VENDOR_WEIGHTS = 1 << 18
# who takes the ops that a backend has no file for
INSTEAD = {"cuda": "triton"}


class Choice(NamedTuple):
    """The backend and plan picked, and the reason in a sentence for the user."""

    backend: str
    plan: str
    reason: str


def pick(
    x: torch.Tensor,
    dtype: torch.dtype,
    W: torch.Tensor,
    others: Iterable[torch.Tensor] = (),
    exact: bool = False,
    backend: str | None = None,
    plan: str | None = None,
    dropout: bool = False,
    op: str = "lora_linear",
    packed: bool = False,
) -> Choice:
    """x (..., K) computed in ``dtype``, W, others = (bias, A, …) -> Choice for ``op``.

    ``packed``: W is a shape alone, whose values are kept in fewer bits.
    A named backend or plan is taken as is, or refused with SettingsError.
    """
    name = backend or settings.get().backend
    if plan is not None and plan not in PLANS:
        fail(SettingsError, f"plan={plan!r}", "one of " + ", ".join(PLANS), "leave plan out to let dispatch pick")
    if name == "auto":
        name = AUTO.get(x.device.type, "cpu")
        refusal = _refuses(name, x, dtype, W, others, exact, plan, op)
        if refusal:
            name, why = "torch", refusal
        elif name == "cpu" and op in VENDOR_OPS and not (dropout or packed) and vendor_faster(dtype, W):
            name, why = "torch", "oneMKL multiplies float32 faster on a processor of Intel's, and there is no dropout"
        else:
            why = "Triton kernels run on this GPU" if name == "triton" else "compiled CPU kernels take this dtype"
    elif name not in BACKEND_PLANS:
        need = "one of " + ", ".join(BACKEND_PLANS)
        fail(SettingsError, f"backend={name!r}", need, "leave backend out to let dispatch pick")
    else:
        why = "asked for by name"
        if name in INSTEAD and not has(name, op):
            name, why = INSTEAD[name], f"{name}, asked for by name, has no {op}"
        if refusal := _refuses(name, x, dtype, W, others, exact, plan, op):
            if backend:
                need, do = f"tensors it takes: {refusal}", "leave backend out, or use backend='torch'"
                fail(SettingsError, f"backend={backend!r}", need, do)
            name, why = "torch", refusal
    if plan is None:
        tuned = name == "triton" and op not in UNPLANNED
        plan = _tuned_plan(x, dtype, W, others, dropout) if tuned else "accumulate"
    elif plan not in BACKEND_PLANS[name]:
        need = f"a plan of the backend that takes these tensors, {name}: " + ", ".join(BACKEND_PLANS[name])
        fail(SettingsError, f"plan={plan!r}", need, "leave plan out to let dispatch pick")
    return Choice(name, plan, why)


def vendor_faster(dtype: torch.dtype, W: torch.Tensor) -> bool:
    """Does a step in ``dtype`` without dropout take less time by torch's GEMMs than by the compiled CPU kernels?

    Without dropout there is nothing to fuse but small products. oneMKL's float32 ones run near an Intel processor's
    peak, and copy W into their own order for less.
    """
    return dtype == W.dtype == torch.float32 and W.numel() >= VENDOR_WEIGHTS and native.tuned_vendor()


def must_be_exact(dtype: torch.dtype, adapters: Iterable[torch.Tensor]) -> bool:
    """Would adapters lose more than rounding in ``dtype``? Float16 ends at 6e-8, and s·g·B of a young B lies below."""
    return dtype == torch.float16 and any(t.dtype == torch.float32 for t in adapters)


def _refuses(name, x, dtype, W, others, exact, plan, op):
    """Why this backend does not take the call; empty when it does."""
    if not has(name, op):
        return f"it has no {op}"
    if plan is not None and plan not in BACKEND_PLANS[name]:
        return f"it has no plan {plan!r}"
    if name in _refusals:
        return _refusals[name](x, dtype, W, others, exact)
    return ""


def cpu_refuses(
    x: torch.Tensor, dtype: torch.dtype, W: torch.Tensor, others: Iterable[torch.Tensor] = (), exact: bool = False
) -> str:
    """Why the compiled CPU kernels do not take these tensors; empty when they do."""
    if x.device.type != "cpu":
        return f"x is on {x.device.type}, and the compiled kernels are for the CPU"
    if dtype not in CPU_DTYPES:
        return f"the compiled kernels have no {str(dtype).removeprefix('torch.')}"
    for tensor in (W, *others):
        if tensor.dtype not in CPU_DTYPES:
            return f"the compiled kernels take no {str(tensor.dtype).removeprefix('torch.')} weight or bias"
    if exact and dtype != torch.float32:
        return "exact=True keeps PEFT's float32 arithmetic, which plain torch runs"
    return native.reason()


def triton_refuses(
    x: torch.Tensor, dtype: torch.dtype, W: torch.Tensor, others: Iterable[torch.Tensor] = (), exact: bool = False
) -> str:
    """Why the Triton kernels do not take these tensors; empty when they do."""
    return _gpu_dtypes(dtype, W, others, exact) or triton.refuses_device(x.device)


def cuda_refuses(
    x: torch.Tensor, dtype: torch.dtype, W: torch.Tensor, others: Iterable[torch.Tensor] = (), exact: bool = False
) -> str:
    """Why the compiled CUDA kernels do not take these tensors; empty when they do."""
    if x.device.type != "cuda":
        return f"x is on {x.device.type}, and the CUDA kernels are for NVIDIA GPUs"
    return _gpu_dtypes(dtype, W, others, exact) or cuda.device_reason(x.device.index or 0)


def _gpu_dtypes(dtype, W, others, exact):
    for tensor_dtype in (dtype, W.dtype, *[t.dtype for t in others]):
        if tensor_dtype not in GPU_DTYPES:
            return f"the GPU kernels have no {str(tensor_dtype).removeprefix('torch.')}"
    if exact and dtype != torch.float32 and any(t.dtype == torch.float32 for t in others):
        return "exact=True keeps PEFT's float32 arithmetic, which plain torch runs"
    return ""


_refusals = {"cpu": cpu_refuses, "triton": triton_refuses, "cuda": cuda_refuses}


def _tuned_plan(x, dtype, W, others, dropout):
    K = x.shape[-1]
    N = W.shape[0] if W.shape[1] == K else W.shape[1]
    R = sum(t.shape[0] for t in others if t.dim() == 2 and t.shape[1] == K)  # a block's others are also down's
    return tuning.plan(N, K, R, dropout, dtype, x.device.index or 0)


def backends() -> list[tuple[str, bool, str]]:
    """(name, live, why not or what it is) for each backend, in the order they are tried; cuda is taken by name only."""
    cpu, compiled, gpu = native.reason(), cuda.device_reason(0), triton.device_reason(0)
    if gpu and triton.interpreting():
        gpu = ""
    return [
        ("triton", not gpu, gpu or "Triton kernels, NVIDIA and AMD GPUs"),
        ("cuda", not compiled, compiled or "compiled CUDA kernels, taken by name"),
        ("cpu", not cpu, cpu or f"compiled C++ kernels, {native.isa()}"),
        ("torch", True, "vendor GEMMs through torch, any device"),
        ("reference", True, "the definition, plain PyTorch"),
    ]


def failures() -> list[str]:
    """Kernels that were chosen and then failed on this machine, so that torch runs their calls: a sentence each."""
    return [why for module in _gpu_modules() for why in module.failures()]


def fallbacks() -> int:
    """How many calls torch ran so far because a kernel failed: whoever times calls must know whose time it is."""
    return sum(module.fallbacks() for module in _gpu_modules())


def refusals() -> Counter[str]:
    """How often a plan left its work to another one so far, by the reason why it is not for such tensors or devices."""
    return sum((module.refusals() for module in _gpu_modules() if hasattr(module, "refusals")), Counter())


class Watch:
    """What ran since it was made: was it the backend and plan that were asked for? Each a sentence, empty when so."""

    def __init__(self) -> None:
        self._fallbacks, self._refusals = fallbacks(), refusals()

    def failed(self) -> str:
        """A kernel did not work, and torch ran the call."""
        if fallbacks() == self._fallbacks:
            return ""
        return "; ".join(failures()) or "another plan or backend ran it"

    def refused(self) -> str:
        """The plan is not for these tensors or this device, and another one ran the call."""
        return "; ".join(refusals() - self._refusals)


def _gpu_modules():
    # not imported here: they import this package's ops
    found = (sys.modules.get(f"peft_fast.backends.{name}.lora_linear") for name in ("triton", "cuda"))
    return [module for module in found if hasattr(module, "fallbacks")]
