"""lora_linear by Triton kernels, in one of two plans.

`accumulate`: the vendor's GEMM adds into the adapter's output, which a kernel writes with the mask in it.
`fused`: one GEMM of ours with r more columns, the mask applied in the accumulator before the main loop.
Everything is an operator of torch.ops.peft_fast with a fake, so that torch.compile traces it. Kernels run on the
current stream of x's device, read seeds there, and use no memory but torch's: they may be captured in a graph.
One that does not compile or fit is tried once per signature; from then on the torch backend runs the call, and
failures() says why.
"""

from __future__ import annotations

import torch

from peft_fast.backends.operators import define, register, shaped, traced
from peft_fast.backends.torch import lora_linear as vendor
from peft_fast.backends.triton import tuning
from peft_fast.backends.triton.guard import guarded
from peft_fast.ops.spec import Spec
from peft_fast.reference.dropout import keep_mask

# which adapter a rank belongs to is code in the kernels: a crowd of them is left to torch
MOST_ADAPTERS = 64


def forward(x, W, bias, A, B, seed, spec):
    """x (..., K), W, bias (N,) | None, A (R, K), B (N, R) -> y (..., N), H (M, R) = s·drop(x)·Aᵀ in x's dtype."""
    run = torch.ops.peft_fast.triton_lora_linear if traced(x) else _forward_op
    return run(x, W, bias, A, B, seed, *_plain(spec))


def backward(g, x, W, bias, A, B, H, seed, spec, needs):
    """g (..., N) -> dx, dW, dbias, dA, dB; None where ``needs`` (x, W, bias, A, B) says so."""
    run = torch.ops.peft_fast.triton_lora_linear_backward if traced(x) else _backward_op
    grads = run(g, x, W, bias, A, B, H, seed, *_plain(spec), spec.dx_dtype, list(needs))
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def failures() -> list[str]:
    """Why calls that Triton was chosen for ran on the torch backend, a sentence each."""
    return guarded.reasons()


def fallbacks() -> int:
    """How many calls ran on the torch backend so far because a kernel failed: whose time is whose."""
    return guarded.calls


def run_forward(x, W, bias, A, B, seed, spec):
    """What the operator does, on real or meta tensors."""
    x2, tf32, tiles = vendor.dense_rows(x), takes_tf32(x), tuning.load(x.device.index or 0)
    ranks, ps = tuple(spec.ranks), tuple(spec.ps)
    H = x.new_empty(x2.shape[0], 0)
    if ranks:
        H = skinny().shrink(x2, A, seed, ranks, tuple(spec.scalings), ps, tf32, tiles)
    if spec.plan == "fused":
        Wn = W.to(x.dtype).t() if spec.transposed else W.to(x.dtype)  # (N, K)
        bias = bias if bias is None else bias.contiguous()
        y = gemm().fused(x2, Wn, bias, H, B, None, ranks, (0.0,) * len(ranks), x.dtype, tf32, tiles)
    else:
        y = vendor.expand(x2, H, W, bias, B.to(x.dtype), spec.transposed, spec.plan)
    return shaped(y, x), H


def run_backward(g, x, W, bias, A, B, H, seed, spec, needs):
    """What the operator does, on real or meta tensors; None for what is not needed."""
    x2, g2 = vendor.dense_rows(x), vendor.dense_rows(g.to(x.dtype))
    tf32, tiles = takes_tf32(x), tuning.load(x.device.index or 0)
    ranks, scalings, ps = tuple(spec.ranks), tuple(spec.scalings), tuple(spec.ps)
    D = dx = dW = dbias = dA = dB = None
    if ranks and (needs[0] or needs[3] or needs[4]):
        # both also where one would do, which is rare: a gradient's bits do not hang on which others are wanted
        D, dB = skinny().shrink_outer(g2, B, H, ranks, scalings, B.dtype, tf32, tiles)
        dB = dB if needs[4] else None
    if needs[0]:
        dx = shaped(_dx(g2, D, W.to(x.dtype), A, seed, spec, tf32, tiles), x)
    if needs[1]:
        dW = vendor.weight_gradient(x2, g2, W, spec.transposed)
    if needs[2]:
        dbias = vendor.bias_gradient(g2, bias)
    if needs[3] and ranks:
        dA = skinny().outer(x2, D, seed, ranks, ps, A.dtype, tf32, tiles)
    return dx, dW, dbias, dA, dB


def run_mask(seed, M, K, p):
    """seed () int64 -> bool (M, K), by a kernel, or by the definition where the kernel fails."""

    def run():
        from peft_fast.kernels.dropout import dropout_mask

        return dropout_mask(seed, M, K, p)

    return guarded(("dropout_mask", seed.device), run, lambda: keep_mask(seed, M, K, p))


def skinny():
    """The skinny kernels, imported at the first call: importing peft_fast imports no Triton."""
    from peft_fast.kernels import skinny

    return skinny


def gemm():
    """The kernels of size M·N or M·K, imported at the first call."""
    from peft_fast.kernels import lora_linear

    return lora_linear


def expand_dx(D, A, seed, spec, tf32, tiles):
    """D (M, R), A (R, K) -> Σ mask∘(D·A)/(1 − p) (M, K) in dx's dtype."""
    if any(spec.ps):
        return gemm().expand(D, A, seed, tuple(spec.ranks), tuple(spec.ps), spec.dx_dtype, tf32, tiles)
    return (D @ A.to(D.dtype)).to(spec.dx_dtype)


def takes_tf32(x):
    """Are float32 products of x's dtype made in TF32?"""
    return x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _dx(g2, D, W, A, seed, spec, tf32, tiles):
    """g (M, N), D (M, R), W as stored, A (R, K) -> dx (M, K)."""
    if spec.plan == "fused":
        Wn, ranks, ps = W.t() if spec.transposed else W, tuple(spec.ranks), tuple(spec.ps)  # (N, K)
        return gemm().fused(g2, Wn.t(), None, D, A.t(), seed, ranks, ps, spec.dx_dtype, tf32, tiles)
    low = None if D is None else expand_dx(D, A, seed, spec, tf32, tiles)
    return vendor.add_base(low, [(g2, W, spec.transposed)], spec.dx_dtype)


def _plain(spec):
    return spec.ranks, spec.scalings, spec.ps, spec.transposed, spec.plan


def _signature(op, x, W, A, spec):
    return op, spec.plan, x.device, x.dtype, A.dtype, tuple(W.shape), tuple(spec.ranks), tuple(spec.ps)


def _vendors(x, W, ranks):
    """Calls that need no kernel of ours: nothing to compute, or too many adapters."""
    return not (x.numel() and W.numel()) or len(ranks) > MOST_ADAPTERS


def _forward_op(x, W, bias, A, B, seed, ranks, scalings, ps, transposed, plan):
    spec = Spec(ranks, scalings, ps, x.dtype, transposed, False, "triton", plan)
    plain = spec._replace(plan="accumulate")
    with vendor.no_autocast(x.device.type):
        if _vendors(x, W, ranks):
            return vendor.forward(x, W, bias, A, B, seed, plain)
        return guarded(
            _signature("lora_linear's forward", x, W, A, spec),
            lambda: run_forward(x, W, bias, A, B, seed, spec),
            lambda: vendor.forward(x, W, bias, A, B, seed, plain),
        )


def _backward_op(g, x, W, bias, A, B, H, seed, ranks, scalings, ps, transposed, plan, dx_dtype, needs):
    spec = Spec(ranks, scalings, ps, dx_dtype, transposed, False, "triton", plan)
    plain = spec._replace(plan="accumulate")
    with vendor.no_autocast(x.device.type):
        if _vendors(x, W, ranks):
            grads = vendor.backward(g, x, W, bias, A, B, H, seed, plain, needs)
        else:
            grads = guarded(
                _signature("lora_linear's backward", x, W, A, spec),
                lambda: run_backward(g, x, W, bias, A, B, H, seed, spec, needs),
                lambda: vendor.backward(g, x, W, bias, A, B, H, seed, plain, needs),
            )
    return tuple(x.new_empty(0) if grad is None else _dense(grad) for grad in grads)


def _dense(grad):
    # an operator's fake promises contiguous gradients
    return grad.contiguous()


register("triton", _forward_op, _backward_op)
define(
    "triton_dropout_mask",
    "(Tensor seed, SymInt M, SymInt K, float p) -> Tensor",
    run_mask,
    lambda seed, M, K, p: seed.new_empty(M, K, dtype=torch.bool),
)
