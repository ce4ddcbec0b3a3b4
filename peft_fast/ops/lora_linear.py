"""y = x·Wᵀ + bias + Σ (s·drop(x)·Aᵀ·Bᵀ + s·b_B), with dx, dA, dB, dbias and, for a trainable base, dW."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_fast import dispatch
from peft_fast.ops.checks import FLOATS, check, check_kinds
from peft_fast.ops.dropout import draw_seed, dropout_mask
from peft_fast.ops.spec import Spec
from peft_fast.reference import lora_linear as reference

_calls = 0


class Adapter(NamedTuple):
    """One low-rank adapter: A (r, K), B (N, r), both of one dtype, and what PEFT stores beside them."""

    A: Tensor
    B: Tensor
    scaling: float | Tensor = 1.0  # a float or a 0-d tensor
    p: float = 0.0  # dropout probability in effect: 0 in eval mode
    bias: Tensor | None = None  # (N,), B's bias, scaled with the adapter


def fast_calls() -> int:
    """How many lora_linear forwards this process has run (calls traced by torch.compile are not counted)."""
    return _calls


def lora_linear(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None = None,
    adapters: Sequence[Adapter] = (),
    *,
    transposed: bool = False,
    exact: bool = False,
    backend: str | None = None,
    plan: str | None = None,
) -> Tensor:
    """x (..., K), W (N, K) or (K, N) if ``transposed``, bias (N,) -> y (..., N) in x's dtype (autocast's, if on).

    Adapters may be float32 beside bfloat16 or float16 x: the low-rank products then accumulate in float32 and
    round to x's dtype, gradients come in the adapters' dtype; ``exact`` keeps float32 for them throughout, and is
    implied by float16 x outside autocast, whose range is too small for s·g·B.
    The result owns its storage. Raises ShapeError, DtypeError, DeviceError or SettingsError (all PeftFastError).
    Source: Hu et al., "LoRA" (arXiv 2106.09685), eq. 3, and PEFT's lora.Linear.forward for dropout and order.
    """
    global _calls
    check_kinds(x, W, bias, adapters)
    device_type = x.device.type
    autocast = torch.is_autocast_enabled(device_type) and x.dtype in FLOATS[1:]
    dtype = torch.get_autocast_dtype(device_type) if autocast else x.dtype
    check(x, dtype, W, bias, adapters, transposed)
    exact = exact or (not autocast and dispatch.must_be_exact(dtype, [a.A for a in adapters]))
    adapters = [_tensor_scaling(a) if isinstance(a.scaling, Tensor) else a for a in adapters]
    others = [t for a in adapters for t in (a.A, a.bias) if t is not None]
    others = others if bias is None else [bias, *others]
    dropout = any(a.p > 0 for a in adapters)
    name, plan, _ = dispatch.pick(x, dtype, W, others, exact, backend, plan, dropout)
    seed = draw_seed(len(adapters), x.device) if dropout else None
    y = _run(name, plan, x, dtype, W, bias, adapters, seed, transposed, exact)
    if not torch.compiler.is_compiling():
        _calls += 1
    return y


def _run(name, plan, x, dtype, W, bias, adapters, seed, transposed, exact):
    if name == "reference":
        return _reference(x.to(dtype), W, bias, adapters, seed, transposed)
    bias = _merge_bias(bias, adapters)
    if len(adapters) == 1:
        A, B = adapters[0].A, adapters[0].B
    elif adapters:
        A, B = torch.cat([a.A for a in adapters]), torch.cat([a.B for a in adapters], dim=1)
    else:
        A = x.new_empty(0, x.shape[-1], dtype=dtype)
        B = x.new_empty(W.shape[1] if transposed else W.shape[0], 0, dtype=dtype)
    spec = Spec(
        [a.A.shape[0] for a in adapters],
        [a.scaling for a in adapters],
        [a.p for a in adapters],
        x.dtype,
        transposed,
        exact,
        name,
        plan,
    )
    return LoraLinear.apply(x.to(dtype), W, bias, A, B, seed, spec, x if x.dtype != dtype else None)


class LoraLinear(torch.autograd.Function):
    """Saves x, H (M, r) and the seeds; A, B and W are the caller's parameters.

    ``uncast`` is x before autocast's cast, if there was one: it takes dx unrounded, in its own dtype.
    """

    @staticmethod
    def forward(ctx, x, W, bias, A, B, seed, spec, uncast):
        y, H = _backend(spec.backend).forward(x, W, bias, A, B, seed, spec)
        ctx.save_for_backward(x, W, bias, A, B, H, seed)
        ctx.spec = spec
        return y

    @staticmethod
    def backward(ctx, g):
        x, W, bias, A, B, H, seed = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if g is None:
            return (None,) * 8
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return *_differentiable_backward(g, (x, W, bias, A, B), needs, seed, ctx.spec), None, None, None
        wanted = (needs[0] or needs[7], *needs[1:5])
        dx, dW, dbias, dA, dB = _backend(ctx.spec.backend).backward(g, x, W, bias, A, B, H, seed, ctx.spec, wanted)
        dx, uncast = (None, dx) if needs[7] else (dx, None)
        return dx, dW, dbias, dA, dB, None, None, uncast


def _backend(name):
    # torch.compile traces a plain attribute; import_module would break the graph
    return _backends[name]


# these modules import neither Triton nor CUDA before their first call
_backends = {name: importlib.import_module(f"peft_fast.backends.{name}.lora_linear") for name in dispatch.COMPILED}


def _masks(x, seed, ps):
    M = x.shape[:-1].numel()
    return [dropout_mask(seed[i], M, x.shape[-1], p).view(x.shape) if p > 0 else None for i, p in enumerate(ps)]


def _reference(x, W, bias, adapters, seed, transposed):
    with torch.autocast(x.device.type, enabled=False):
        masks = _masks(x, seed, [a.p for a in adapters])
        # at least float32 throughout and one rounding at the end, else the definition rounds more often than PEFT
        wide = torch.promote_types(x.dtype, torch.float32)
        adapters = [
            Adapter(a.A.to(wide), a.B.to(wide), a.scaling, a.p, None if a.bias is None else a.bias.to(wide))
            for a in adapters
        ]
        bias = None if bias is None else bias.to(wide)
        W = W.to(x.dtype).to(wide)  # a float32 weight under autocast is a rounded one
        return reference.forward(x.to(wide), W, bias, adapters, masks, transposed).to(x.dtype)


def _differentiable_backward(g, inputs, needs, seed, spec):
    """Gradients that can be differentiated again (create_graph=True): autograd through the definition."""
    x, W, bias, A, B = inputs
    split = zip(A.split(spec.ranks), B.split(spec.ranks, dim=1), spec.scalings, spec.ps, strict=True)
    adapters = [Adapter(a, b, s, p) for a, b, s, p in split] if spec.ranks else []
    y = _reference(x, W, bias, adapters, seed, spec.transposed)
    wanted = [t for t, need in zip(inputs, needs, strict=False) if need]
    grads = iter(torch.autograd.grad(y, wanted, g, create_graph=True, allow_unused=True))
    return [next(grads) if need else None for need in needs[:5]]


def _tensor_scaling(adapter):
    # a 0-d tensor scaling goes into A in float32, so that its value never becomes a constant of a compiled graph
    wide = torch.promote_types(adapter.A.dtype, torch.float32)
    bias = None if adapter.bias is None else adapter.bias.to(wide) * adapter.scaling
    return Adapter(adapter.A.to(wide) * adapter.scaling, adapter.B.to(wide), 1.0, adapter.p, bias)


def _merge_bias(bias, adapters):
    for adapter in adapters:
        if adapter.bias is not None:
            scaled = adapter.bias.to(torch.promote_types(adapter.bias.dtype, torch.float32)) * adapter.scaling
            bias = scaled if bias is None else bias + scaled
    return bias
