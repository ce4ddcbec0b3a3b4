"""y = x·Wᵀ + bias + Σ (s·drop(x)·Aᵀ·Bᵀ + s·b_B), with dx, dA, dB, dbias and, for a trainable base, dW."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_fast import dispatch
from peft_fast.backends import modules
from peft_fast.ops import prepare
from peft_fast.ops.checks import check, check_kinds
from peft_fast.ops.dropout import draw_seed
from peft_fast.ops.function import Function
from peft_fast.ops.spec import Adapter, Sibling, Spec
from peft_fast.reference import lora_linear as reference

# torch.compile traces a plain attribute; import_module at the call would break the graph
backends = modules("lora_linear")


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
    check_kinds(x, W, bias, adapters)
    dtype, autocast = prepare.computed_dtype(x)
    check(x, dtype, W, bias, adapters, transposed)
    exact = exact or (not autocast and dispatch.must_be_exact(dtype, [a.A for a in adapters]))
    adapters = prepare.number_scalings(adapters)
    others = prepare.tensors_beside_W(adapters, bias)
    dropout = any(a.p > 0 for a in adapters)
    name, plan, _ = dispatch.pick(x, dtype, W, others, exact, backend, plan, dropout)
    seed = draw_seed(len(adapters), x.device) if dropout else None
    y = _run(name, plan, x, dtype, W, bias, adapters, seed, transposed, exact)
    prepare.count_call()
    return y


def _run(name, plan, x, dtype, W, bias, adapters, seed, transposed, exact):
    if name == "reference":
        return defined(x.to(dtype), Sibling(W, bias, adapters, transposed), seed)
    bias = prepare.merge_bias(bias, adapters)
    A, B = stacked(x, dtype, W.shape[1] if transposed else W.shape[0], adapters)
    spec = spec_of(adapters, x.dtype, transposed, exact, name, plan)
    x, uncast = prepare.narrowed(x, dtype)
    return LoraLinear.apply(x, W, bias, A, B, seed, spec, uncast)


def stacked(x: Tensor, dtype: torch.dtype, N: int, adapters: Sequence[Adapter]) -> tuple[Tensor, Tensor]:
    """All A's as one (R, K), all B's as one (N, R)."""
    if len(adapters) == 1:
        return adapters[0].A, adapters[0].B
    if adapters:
        return torch.cat([a.A for a in adapters]), torch.cat([a.B for a in adapters], dim=1)
    return x.new_empty(0, x.shape[-1], dtype=dtype), x.new_empty(N, 0, dtype=dtype)


def apart(A: Tensor, B: Tensor, spec: Spec) -> list[Adapter]:
    """The adapters of stacked() again, without their biases."""
    split = zip(A.split(spec.ranks), B.split(spec.ranks, dim=1), spec.scalings, spec.ps, strict=True)
    return [Adapter(a, b, s, p) for a, b, s, p in split] if spec.ranks else []


def spec_of(adapters: Sequence[Adapter], dx_dtype: torch.dtype, transposed: bool, exact: bool, *chosen: str) -> Spec:
    """What a backend needs beside the tensors; ``chosen``: backend and plan."""
    return Spec(
        [a.A.shape[0] for a in adapters],
        [a.scaling for a in adapters],
        [a.p for a in adapters],
        dx_dtype,
        transposed,
        exact,
        *chosen,
    )


class LoraLinear(Function):
    """Saves x, H (M, r) and the seeds; A, B and W are the caller's parameters.

    x and ``uncast`` are what prepare.narrowed() gives.
    """

    @staticmethod
    def forward(ctx, x, W, bias, A, B, seed, spec, uncast):
        y, H = backends[spec.backend].forward(x, W, bias, A, B, seed, spec)
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
            return *differentiable_backward(g, (x, W, bias, A, B), needs, seed, ctx.spec), None, None, None
        wanted = (needs[0] or needs[7], *needs[1:5])
        dx, dW, dbias, dA, dB = backends[ctx.spec.backend].backward(g, x, W, bias, A, B, H, seed, ctx.spec, wanted)
        dx, uncast = prepare.dx_of(dx, needs[7])
        return dx, dW, dbias, dA, dB, None, None, uncast


def defined(x: Tensor, sibling: Sibling, seed: Tensor | None) -> Tensor:
    """y by the definition, in x's dtype."""
    with torch.autocast(x.device.type, enabled=False):
        masks = prepare.masks(x, seed, [a.p for a in sibling.adapters])
        W, bias, adapters, transposed = prepare.widened(sibling, x.dtype)
        wide = x.to(prepare.at_least_float32(x.dtype))
        return reference.forward(wide, W, bias, adapters, masks, transposed).to(x.dtype)


def differentiable_backward(
    g: Tensor, inputs: Sequence, needs: Sequence[bool], seed: Tensor | None, spec: Spec
) -> list[Tensor | None]:
    """Gradients that can be differentiated again (create_graph=True): autograd through the definition."""
    x, W, bias, A, B = inputs
    y = defined(x, Sibling(W, bias, apart(A, B, spec), spec.transposed), seed)
    wanted = [t for t, need in zip(inputs, needs, strict=False) if need]
    grads = iter(torch.autograd.grad(y, wanted, g, create_graph=True, allow_unused=True))
    return [next(grads) if need else None for need in needs[:5]]
