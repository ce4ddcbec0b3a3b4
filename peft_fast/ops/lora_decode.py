"""lora_linear for few tokens and no gradients, as when generating: W is read once, as it lies in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peft_fast import dispatch, native, settings
from peft_fast.backends import modules
from peft_fast.ops import prepare
from peft_fast.ops.checks import check, check_kinds
from peft_fast.ops.lora_linear import lora_linear
from peft_fast.ops.spec import Adapter

MOST = 32  # tokens from which on a product with packed operands is as fast
# and where more were measured, by instruction set and dtype
MORE = {
    "avx512_bf16": {torch.float32: 127, torch.bfloat16: 96},
    "amx": {torch.float32: 64, torch.bfloat16: 64},
}
# and fewer, in bfloat16: of a W (K, N), which is summed in float32, or of adapters that are as wide as a layer
TURNED, WIDE = 8, (128, 16)

backends = modules("lora_decode")


def lora_decode(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None = None,
    adapters: Sequence[Adapter] = (),
    *,
    transposed: bool = False,
    backend: str | None = None,
) -> Tensor:
    """x (..., K), W (N, K) or (K, N) if ``transposed``, bias (N,) -> y (..., N) in x's dtype (autocast's, if on).

    Adapters are multiplied in their own dtype, everything is summed in float32 and rounded once. Where no kernel of
    its own runs (other devices and dtypes, dropout, a gradient that is wanted) this is lora_linear, of which it has
    the errors and the source.
    """
    check_kinds(x, W, bias, adapters)
    dtype, _ = prepare.computed_dtype(x)
    check(x, dtype, W, bias, adapters, transposed)
    if backend in ("torch", "reference") or differentiable(x, W, bias, adapters) or any(a.p > 0 for a in adapters):
        return lora_linear(x, W, bias, adapters, transposed=transposed, backend=backend)
    numbered = prepare.number_scalings(adapters)
    others = prepare.tensors_beside_W(numbered, bias)
    name, *_ = dispatch.pick(x, dtype, W, others, backend=backend, op="lora_decode")
    if name not in backends:
        return lora_linear(x, W, bias, adapters, transposed=transposed, backend=backend)
    prepare.count_call()
    return backends[name].forward(x.to(dtype), W.to(dtype), bias, numbered, transposed)


def most(dtype: torch.dtype, transposed: bool = False, rank: int = 0) -> int:
    """Tokens up to which the compiled kernel pays on this machine; ``rank`` is the adapters' of a token together."""
    if dtype is torch.bfloat16 and (transposed or rank >= WIDE[0]):
        return TURNED if transposed else WIDE[1]
    return MORE.get(native.isa(), {}).get(dtype, MOST)


def kernel() -> Callable[..., Tensor] | None:
    """The compiled operator, for who has looked at every tensor himself; None where dispatch would not pick it."""
    return _operator() if settings.get().backend in ("auto", "cpu") else None


@functools.cache
def _operator():
    return torch.ops.peft_fast.lora_decode.default if native.load() else None


def look() -> Callable | None:
    """The compiled look at the modules of a layer's adapters (csrc/adapters.h); None where it is not built."""
    return native.adapters()


def whole() -> Callable | None:
    """The compiled look at a whole layer (csrc/call.h); None where it is not built."""
    return native.layer()


@functools.cache
def direct() -> Callable | None:
    """The compiled call of a whole layer (csrc/call.h), for up to TURNED tokens; None where it is not built."""
    return native.decode() if native.few_tokens() is not None else None


def decoded(layer: object = None, forget: bool = False) -> int:
    """How many such calls there were: of one layer, begun anew if they are to be forgotten, or of all."""
    return native.decoded(layer, forget)


def address() -> int | None:
    """Where in memory the arithmetic of that call is (csrc/cpu/few_tokens.h)."""
    return native.few_tokens()


def differentiable(x: Tensor, W: Tensor, bias: Tensor | None, adapters: Sequence[Adapter]) -> bool:
    """Does any of them want a gradient, where one is recorded?"""
    if not torch.is_grad_enabled():
        return False
    tensors = [x, W, bias, *(t for a in adapters for t in (a.A, a.B, a.bias))]
    return any(t is not None and t.requires_grad for t in tensors)
