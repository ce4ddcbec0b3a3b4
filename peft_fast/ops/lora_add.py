"""y = base + Σ (s·drop(x)·Aᵀ·Bᵀ + s·b_B): adapters on what another library made of x, with dbase, dx, dA and dB."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_fast import dispatch
from peft_fast.backends import modules
from peft_fast.errors import DeviceError, DtypeError, ShapeError, fail
from peft_fast.ops import prepare
from peft_fast.ops.checks import FLOATS, check, check_kinds
from peft_fast.ops.dropout import draw_seed
from peft_fast.ops.function import Function
from peft_fast.ops.lora_linear import apart, spec_of, stacked
from peft_fast.ops.lora_quantized import placeholder
from peft_fast.ops.spec import Adapter
from peft_fast.reference import lora_add as reference

backends = modules("lora_add")


def lora_add(
    base: Tensor,
    x: Tensor,
    adapters: Sequence[Adapter],
    *,
    exact: bool = False,
    backend: str | None = None,
) -> Tensor:
    """base (..., N), x (..., K) -> y (..., N), a new tensor in base's dtype, which need not be x's.

    The low-rank products run in x's dtype (autocast's, if on; the adapters', if that is narrower), as lora_linear's
    do, ``exact`` likewise; the sum is rounded once. dx is the adapters' part alone: base has its own gradient.
    Raises ShapeError, DtypeError, DeviceError or SettingsError (all PeftFastError). Source: as lora_linear.
    """
    dtype, autocast = prepare.computed_dtype(x)
    if adapters and not autocast and adapters[0].A.dtype in FLOATS[2:]:
        dtype = adapters[0].A.dtype  # PEFT narrows x for them
    like = _check(base, x, dtype, adapters)
    exact = exact or (not autocast and dispatch.must_be_exact(dtype, [a.A for a in adapters]))
    adapters = prepare.number_scalings(adapters)
    others = prepare.tensors_beside_W(adapters, None)
    name, plan, _ = dispatch.pick(x, dtype, like, others, exact, backend, op="lora_add")
    seed = draw_seed(len(adapters), x.device) if any(a.p > 0 for a in adapters) else None
    prepare.count_call()
    if name == "reference":
        return _defined(base, x.to(dtype), adapters, seed)
    bias = prepare.merge_bias(None, adapters)
    A, B = stacked(x, dtype, base.shape[-1], adapters)
    spec = spec_of(adapters, x.dtype, False, exact, name, plan)
    x, uncast = prepare.narrowed(x, dtype)
    return LoraAdd.apply(base, x, bias, A, B, seed, spec, uncast)


def _check(base, x, dtype, adapters):
    """The shapes fit -> a tensor like the W that base is not the product of."""
    if base.dim() == 0 or base.shape[:-1] != x.shape[:-1]:
        given = f"base {tuple(base.shape)}, x {tuple(x.shape)}"
        fail(ShapeError, given, "the same leading dimensions", "pass the base layer's result on this x")
    if base.dtype not in FLOATS:
        fail(DtypeError, f"base of {base.dtype}", "float64, float32, bfloat16 or float16", "convert base")
    if base.device != x.device:
        fail(DeviceError, f"base on {base.device}, x on {x.device}", "one device", "move base with .to(x.device)")
    like = placeholder(x, (base.shape[-1], x.shape[-1]), dtype)
    check_kinds(x, like, None, adapters)
    check(x, dtype, like, None, adapters, False)
    return like


class LoraAdd(Function):
    """Saves x, H (M, r) and the seeds; x and ``uncast`` are what prepare.narrowed() gives."""

    @staticmethod
    def forward(ctx, base, x, bias, A, B, seed, spec, uncast):
        y, H = backends[spec.backend].forward(base, x, bias, A, B, seed, spec)
        ctx.save_for_backward(x, bias, A, B, H, seed)
        ctx.spec, ctx.base = spec, (base.shape, base.dtype)
        return y

    @staticmethod
    def backward(ctx, g):
        x, bias, A, B, H, seed = ctx.saved_tensors
        needs, spec = ctx.needs_input_grad, ctx.spec
        if g is None:
            return (None,) * 8
        dbase = g if needs[0] else None
        if torch.is_grad_enabled():
            return dbase, *_differentiable(g, ctx.base, (x, bias, A, B), needs[1:5], seed, spec), None, None, None
        wanted = (needs[1] or needs[7], *needs[2:5])
        dx, dbias, dA, dB = backends[spec.backend].backward(g, x, bias, A, B, H, seed, spec, wanted)
        dx, uncast = prepare.dx_of(dx, needs[7])
        return dbase, dx, dbias, dA, dB, None, None, uncast


def _defined(base, x, adapters, seed):
    with torch.autocast(x.device.type, enabled=False):
        masks = prepare.masks(x, seed, [a.p for a in adapters])
        wide = prepare.at_least_float32(torch.promote_types(x.dtype, base.dtype))
        adapters = prepare.widened_adapters(adapters, wide)
        return reference.forward(base.to(wide), x.to(wide), adapters, masks).to(base.dtype)


def _differentiable(g, base, inputs, needs, seed, spec):
    """Gradients that can be differentiated again (create_graph=True): autograd through the definition."""
    x, bias, A, B = inputs
    shape, dtype = base
    zero = x.new_zeros(shape, dtype=dtype)
    y = _defined(zero if bias is None else zero + bias, x, apart(A, B, spec), seed)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    grads = iter(torch.autograd.grad(y, wanted, g, create_graph=True, allow_unused=True) if wanted else ())
    return [next(grads) if need else None for need in needs]
