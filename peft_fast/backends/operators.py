"""torch.ops.peft_fast.<backend>_lora_linear and its backward: what torch.compile sees of backends in Python."""

from __future__ import annotations

from collections.abc import Callable

import torch

_ADAPTERS = "int[] ranks, float[] scalings, float[] ps, bool transposed, str plan"
_FORWARD = f"(Tensor x, Tensor W, Tensor? bias, Tensor A, Tensor B, Tensor? seed, {_ADAPTERS}) -> (Tensor, Tensor)"
_BACKWARD = (
    "(Tensor g, Tensor x, Tensor W, Tensor? bias, Tensor A, Tensor B, Tensor H, Tensor? seed,"
    f" {_ADAPTERS}, ScalarType dx_dtype, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library = torch.library.Library("peft_fast", "FRAGMENT")


def register(backend: str, forward: Callable, backward: Callable) -> None:
    """Defines both operators of a backend; a gradient that is not needed comes back empty."""
    define(f"{backend}_lora_linear", _FORWARD, forward, _forward_fake)
    define(f"{backend}_lora_linear_backward", _BACKWARD, backward, _backward_fake)


def define(name: str, schema: str, run: Callable, fake: Callable) -> None:
    """One operator, with what it returns for tensors without values."""
    _library.define(name + schema)
    # CUDA is also the key of HIP; the CPU is the interpreter's, and that of tests
    _library.impl(name, run, "CUDA")
    _library.impl(name, run, "CPU")
    torch.library.register_fake(f"peft_fast::{name}", fake, lib=_library)


def shaped(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """t (M, N) -> (..., N), the leading dimensions those of ``like``; to autograd no view: callers write in place."""
    return torch.ops.aten._unsafe_view(t, [*like.shape[:-1], t.shape[1]])


def traced(x: torch.Tensor) -> bool:
    """Must the call be an operator: is it compiled, or x without values? Else a plain call takes the host less time."""
    return torch.compiler.is_compiling() or type(x) not in (torch.Tensor, torch.nn.Parameter)


def _forward_fake(x, W, bias, A, B, seed, ranks, scalings, ps, transposed, plan):
    return x.new_empty(*x.shape[:-1], W.shape[1 if transposed else 0]), x.new_empty(_tokens(x), A.shape[0])


def _backward_fake(g, x, W, bias, A, B, H, seed, ranks, scalings, ps, transposed, plan, dx_dtype, needs):
    like = (x, W, bias, A, B)
    dtypes = (dx_dtype, *(None if t is None else t.dtype for t in like[1:]))
    return tuple(
        x.new_empty(t.shape, dtype=dtype) if need and (i < 3 or ranks) else x.new_empty(0)
        for i, (t, dtype, need) in enumerate(zip(like, dtypes, needs, strict=True))
    )


def _tokens(x):
    M = 1
    for size in x.shape[:-1]:
        M = M * size
    return M
