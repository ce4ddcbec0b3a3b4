"""y = x·Wᵀ + bias + Σ (s·drop(x)·Aᵀ·Bᵀ + s·b_B) for a W that is kept packed: decoded forward and again backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from peft_fast import dispatch
from peft_fast.backends import modules
from peft_fast.ops import prepare
from peft_fast.ops.checks import check, check_kinds
from peft_fast.ops.dropout import draw_seed
from peft_fast.ops.function import Function
from peft_fast.ops.lora_linear import defined, differentiable_backward, spec_of, stacked
from peft_fast.ops.nf4 import Codes
from peft_fast.ops.spec import Adapter, Sibling

backends = modules("lora_linear")
# those that read some weights as they are kept
direct = modules("lora_quantized")


class Weight(Protocol):
    """A frozen weight that can be made dense, always the same.

    ``codes(dtype)``, where it has that, gives nf4.Codes with the same values as dense(dtype), or None.
    """

    shape: tuple[int, int]  # (N, K)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W (N, K) in ``dtype``."""


def lora_quantized(
    x: Tensor,
    W: Weight,
    bias: Tensor | None = None,
    adapters: Sequence[Adapter] = (),
    *,
    exact: bool = False,
    backend: str | None = None,
    plan: str | None = None,
) -> Tensor:
    """x (..., K), W of (N, K), bias (N,) -> y (..., N) in x's dtype (autocast's, if on), as lora_linear on W.dense().

    Only x, H (M, r) and the seeds are kept between forward and backward: no dense copy of W.
    Source: Dettmers et al., "QLoRA" (arXiv 2305.14314), eq. 5.
    """
    y = product(x, W, bias, adapters, exact=exact, backend=backend, plan=plan)
    prepare.count_call()
    return y


def product(
    x: Tensor,
    W: Weight,
    bias: Tensor | None = None,
    adapters: Sequence[Adapter] = (),
    *,
    exact: bool = False,
    backend: str | None = None,
    plan: str | None = None,
) -> Tensor:
    """lora_quantized that nobody counts."""
    dtype, autocast = prepare.computed_dtype(x)
    shape = placeholder(x, W.shape, dtype)
    check_kinds(x, shape, bias, adapters)
    check(x, dtype, shape, bias, adapters, False)
    exact = exact or (not autocast and dispatch.must_be_exact(dtype, [a.A for a in adapters]))
    adapters = prepare.number_scalings(adapters)
    others = prepare.tensors_beside_W(adapters, bias)
    dropout = any(a.p > 0 for a in adapters)
    name, plan, _ = dispatch.pick(x, dtype, shape, others, exact, backend, plan, dropout, packed=True)
    seed = draw_seed(len(adapters), x.device) if dropout else None
    if name == "reference":
        return defined(x.to(dtype), Sibling(W.dense(dtype), bias, adapters), seed)
    A, B = stacked(x, dtype, W.shape[0], adapters)
    spec = spec_of(adapters, x.dtype, False, exact, name, plan)
    bias = prepare.merge_bias(bias, adapters)
    x, uncast = prepare.narrowed(x, dtype)
    return LoraQuantized.apply(x, bias, A, B, seed, spec, W, uncast)


def placeholder(x: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A tensor of this shape and no memory."""
    return x.new_empty((), dtype=dtype).expand(shape)


def codes_of(W: Weight, dtype: torch.dtype, backend: str) -> Codes | None:
    """W for kernels of the backend that read it as it is kept; None where it has to be made dense."""
    codes = getattr(W, "codes", None)
    return codes(dtype) if codes is not None and backend in direct else None


class LoraQuantized(Function):
    """LoraLinear whose W is not saved, and not even made where the backend reads it as it is kept."""

    @staticmethod
    def forward(ctx, x, bias, A, B, seed, spec, W, uncast):
        if codes := codes_of(W, x.dtype, spec.backend):
            like = placeholder(x, W.shape, x.dtype)
            y, H = direct[spec.backend].forward(x, like, codes, bias, A, B, seed, spec)
        else:
            y, H = backends[spec.backend].forward(x, W.dense(x.dtype), bias, A, B, seed, spec)
        ctx.save_for_backward(x, bias, A, B, H, seed)
        ctx.spec, ctx.W = spec, W
        return y

    @staticmethod
    def backward(ctx, g):
        x, bias, A, B, H, seed = ctx.saved_tensors
        needs, spec = ctx.needs_input_grad, ctx.spec
        if g is None:
            return (None,) * 8
        wanted = (needs[0] or needs[7], False, *needs[1:4])
        again = torch.is_grad_enabled()  # create_graph=True
        codes = codes_of(ctx.W, x.dtype, spec.backend) if wanted[0] and not again else None
        dense = wanted[0] and codes is None
        W = ctx.W.dense(x.dtype) if dense else placeholder(x, ctx.W.shape, x.dtype)
        if again:
            some = differentiable_backward(g, (x, W, bias, A, B), (needs[0], *wanted[1:]), seed, spec)
            return some[0], *some[2:], None, None, None, None
        if codes:
            some = (wanted[0], *wanted[2:])
            dx, dbias, dA, dB = direct[spec.backend].backward(g, x, W, codes, bias, A, B, H, seed, spec, some)
        else:
            dx, _, dbias, dA, dB = backends[spec.backend].backward(g, x, W, bias, A, B, H, seed, spec, wanted)
        dx, uncast = prepare.dx_of(dx, needs[7])
        return dx, dbias, dA, dB, None, None, None, uncast
