"""pick(x, W, …) -> the backend and plan that run an op on these tensors, and why."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from peft_fast import native, settings
from peft_fast.errors import SettingsError, fail

CPU_DTYPES = (torch.float32, torch.bfloat16)
PLANS = ("accumulate", "augmented")
_names = settings.BACKENDS[1:]  # all but "auto"


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
) -> Choice:
    """x (..., K) computed in ``dtype``, W, others = (bias, A, B, …) -> Choice.

    A named backend or plan is taken as is, or refused with SettingsError.
    """
    name = backend or settings.get().backend
    if name == "auto":
        refusal = cpu_refuses(x, dtype, W, others, exact)
        name = "torch" if refusal else "cpu"
        why = refusal or "compiled CPU kernels take this dtype"
    elif name not in _names:
        fail(
            SettingsError, f"backend={name!r}", "one of " + ", ".join(_names), "leave backend out to let dispatch pick"
        )
    else:
        why = "asked for by name"
        if name == "cpu" and (refusal := cpu_refuses(x, dtype, W, others, exact)):
            if backend:
                fail(
                    SettingsError,
                    "backend='cpu'",
                    f"tensors it takes: {refusal}",
                    "leave backend out, or use backend='torch'",
                )
            name, why = "torch", refusal
    if plan is not None and plan not in PLANS:
        fail(SettingsError, f"plan={plan!r}", "one of " + ", ".join(PLANS), "leave plan out to let dispatch pick")
    return Choice(name, plan or "accumulate", why)


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


def backends() -> list[tuple[str, bool, str]]:
    """(name, live, why not or what it is) for each backend, in the order they are tried."""
    reason = native.reason()
    return [
        ("cpu", not reason, reason or f"compiled C++ kernels, {native.isa()}"),
        ("torch", True, "vendor GEMMs through torch, any device"),
        ("reference", True, "the definition, plain PyTorch"),
    ]
