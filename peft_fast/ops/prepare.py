"""What the ops share around their kernels: dtypes, adapters side by side, modules of backends, the count of calls."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peft_fast import native
from peft_fast.ops.checks import FLOATS
from peft_fast.ops.dropout import dropout_mask
from peft_fast.ops.spec import Adapter, Sibling

_calls = 0


def fast_calls() -> int:
    """How many forwards of all ops this process has run (calls traced by torch.compile are not counted)."""
    return _calls + native.decoded()


def count_call() -> None:
    """Counts one."""
    global _calls
    if not torch.compiler.is_compiling():
        _calls += 1


def computed_dtype(x: Tensor) -> tuple[torch.dtype, bool]:
    """The dtype that an op on x computes in, x's or autocast's, and whether it is autocast's."""
    device_type = x.device.type
    autocast = torch.is_autocast_enabled(device_type) and x.dtype in FLOATS[1:]
    return torch.get_autocast_dtype(device_type) if autocast else x.dtype, autocast


def narrowed(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """x in the dtype that is computed in, and x before that cast, if there is one.

    An autograd Function takes both: it saves the first, and the second takes dx unrounded, in its own dtype.
    """
    return x.to(dtype), x if x.dtype != dtype else None


def dx_of(dx: Tensor | None, uncast: bool) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the two of narrowed(), of which ``uncast`` says whether the second wants it."""
    return (None, dx) if uncast else (dx, None)


def number_scalings(adapters: list[Adapter]) -> list[Adapter]:
    """Adapters whose scaling is a number: a 0-d tensor goes into A and the bias."""
    return [_into_A(a) if isinstance(a.scaling, Tensor) else a for a in adapters]


def _into_A(adapter):
    # in float32, so that its value never becomes a constant of a compiled graph
    wide = at_least_float32(adapter.A.dtype)
    bias = None if adapter.bias is None else adapter.bias.to(wide) * adapter.scaling
    return Adapter(adapter.A.to(wide) * adapter.scaling, adapter.B.to(wide), 1.0, adapter.p, bias)


def adds_nothing(x: Tensor, adapters: Sequence[Adapter]) -> bool:
    """Is every B zero, as before training? Such a layer is compared with its base, and is to have the base's bits.

    Looked at where that costs next to nothing: without gradients, on the CPU, and a trained B is known by its first
    elements. With dropout a call draws its seed whatever B is: a checkpoint's forward and recomputation draw alike.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.is_cpu:
        return False
    if torch._C._len_torch_dispatch_stack() or not native.load():
        return False
    if any(a.p > 0 or a.bias is not None or type(a.scaling) is not float for a in adapters):
        return False
    if not all(math.isfinite(a.scaling) for a in adapters):
        return False
    As, Bs = [a.A for a in adapters], [a.B for a in adapters]
    if any(B.dtype not in (torch.float32, torch.bfloat16) for B in Bs) or not torch.ops.peft_fast.all_zero.default(Bs):
        return False
    return all(bool(t.isfinite().all()) for t in (x, *As))  # zero times infinity is not zero


def merge_bias(bias: Tensor | None, adapters: list[Adapter]) -> Tensor | None:
    """bias (N,) with the scaled biases of the adapters."""
    for adapter in adapters:
        if adapter.bias is not None:
            scaled = adapter.bias.to(at_least_float32(adapter.bias.dtype)) * adapter.scaling
            bias = scaled if bias is None else bias + scaled
    return bias


def tensors_beside_W(adapters: list[Adapter], bias: Tensor | None) -> list[Tensor]:
    """bias, A's and adapters' biases: what a backend may refuse the dtype of."""
    others = [t for a in adapters for t in (a.A, a.bias) if t is not None]
    return others if bias is None else [bias, *others]


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def masks(x: Tensor, seed: Tensor | None, ps: list[float]) -> list[Tensor | None]:
    """x (..., K) -> the mask of each adapter in x's shape, None where nothing is dropped."""
    M = x.shape[:-1].numel()
    return [dropout_mask(seed[i], M, x.shape[-1], p).view(x.shape) if p > 0 else None for i, p in enumerate(ps)]


def widened(sibling: Sibling, dtype: torch.dtype) -> Sibling:
    """The sibling for the definition: at least float32 throughout and one rounding at the end, as PEFT rounds less."""
    wide = at_least_float32(dtype)
    W, bias, adapters, transposed = sibling
    # a float32 weight under autocast is a rounded one
    W, bias = W.to(dtype).to(wide), None if bias is None else bias.to(wide)
    return Sibling(W, bias, widened_adapters(adapters, wide), transposed)


def widened_adapters(adapters: list[Adapter], wide: torch.dtype) -> list[Adapter]:
    """The adapters in another dtype."""
    return [
        Adapter(a.A.to(wide), a.B.to(wide), a.scaling, a.p, None if a.bias is None else a.bias.to(wide))
        for a in adapters
    ]
