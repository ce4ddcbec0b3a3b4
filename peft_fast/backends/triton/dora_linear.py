"""dora_linear by Triton kernels around vendor GEMMs: one pass over the products for y, one over dy for its gradients.

The magnitude's gradient needs P = drop(x)·Wᵀ; without dropout that is the base's output, which is there anyway.
"""

from __future__ import annotations

import torch

from peft_fast.backends.operators import define, shaped, traced
from peft_fast.backends.torch import dora_linear as otherwise
from peft_fast.backends.torch import lora_linear as vendor
from peft_fast.backends.triton import tuning
from peft_fast.backends.triton.guard import guarded
from peft_fast.backends.triton.lora_linear import skinny, takes_tf32
from peft_fast.ops.spec import Spec

_PLAIN = "float scaling, float p, bool transposed"
_FORWARD = (
    "(Tensor x, Tensor W, Tensor? bias, Tensor A, Tensor B, Tensor c, Tensor? seed,"
    f" {_PLAIN}, bool keep) -> (Tensor, Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor g, Tensor x, Tensor W, Tensor? bias, Tensor A, Tensor B, Tensor c, Tensor H, Tensor? P, Tensor norm,"
    f" Tensor? seed, {_PLAIN}, ScalarType dx_dtype, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def forward(x, W, bias, A, B, c, seed, spec, keep):
    """x (..., K), W, bias (N,) | None, A (r, K), B (N, r), c (N,) -> y (..., N), H (M, r), P (M, N) | None."""
    run = torch.ops.peft_fast.triton_dora_linear if traced(x) else _forward_op
    y, H, P = run(x, W, bias, A, B, c, seed, *_plain(spec), keep)
    return y, H, P if keep else None


def backward(g, x, W, bias, A, B, c, H, P, norm, seed, spec, needs):
    """g (..., N) -> dx, dW, dbias, dA, dB, dm; None where ``needs`` (x, W, bias, A, B, m) says so."""
    run = torch.ops.peft_fast.triton_dora_linear_backward if traced(x) else _backward_op
    grads = run(g, x, W, bias, A, B, c, H, P, norm, seed, *_plain(spec), spec.dx_dtype, list(needs))
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def run_forward(x, W, bias, A, B, c, seed, spec, keep):
    """What the operator does, on real or meta tensors."""
    x2, tf32, tiles = vendor.dense_rows(x), takes_tf32(x), tuning.load(x.device.index or 0)
    ((rank,), (p,)), bias = (spec.ranks, spec.ps), bias if bias is None else bias.contiguous()
    H = skinny().shrink(x2, A, seed, (rank,), tuple(spec.scalings), (p,), tf32, tiles)
    base = otherwise._base(x2, W, spec, bias)
    P = otherwise._base(kernels().drop(x2, seed, p), W, spec) if p > 0 else None
    y = kernels().mix(base, P, H, B, c.float(), bias, tf32)
    return shaped(y, x), H, (base if P is None else P) if keep else None


def run_backward(g, x, W, bias, A, B, c, H, P, norm, seed, spec, needs):
    """What the operator does, on real or meta tensors; None for what is not needed."""
    x2, g2 = vendor.dense_rows(x), vendor.dense_rows(g.to(x.dtype))
    tf32, tiles = takes_tf32(x), tuning.load(x.device.index or 0)
    (rank,), (p,), c = spec.ranks, spec.ps, c.float()
    dx = dW = dA = dB = dm = None
    held = bias.contiguous() if bias is not None and p == 0 else None  # in P
    # with dropout the base sees g itself, and the dropped base what is left of c∘g
    through, sums, dbias = kernels().scale(
        g2, g2 if P is None else P, c - 1 if p > 0 else c, held, needs[0] or needs[1], needs[5], needs[2]
    )
    D, outer = skinny().shrink_outer(
        g2, B * c.unsqueeze(1), H, (rank,), tuple(spec.scalings), torch.float32, tf32, tiles
    )
    if needs[4]:
        dB = (outer * c.unsqueeze(1)).to(B.dtype)
    if needs[5]:
        # Σ g∘(H·Bᵀ) over the tokens is Σ (gᵀ·H)∘B over the ranks
        dm = sums.add_((outer * B.to(H.dtype)).sum(1)) / norm
    if needs[0]:
        low = D @ A.to(D.dtype)
        if p > 0:
            low = kernels().drop(vendor.add_base(low, [(through, W, spec.transposed)], x.dtype), seed, p)
        base = g2 if p > 0 else through
        dx = shaped(vendor.add_base(low, [(base, W, spec.transposed)], spec.dx_dtype), x)
    if needs[1]:
        seen = kernels().drop(x2, seed, p) if p > 0 else x2
        dW = vendor.weight_gradient(seen, through, W, spec.transposed)
        if p > 0:
            dW += vendor.weight_gradient(x2, g2, W, spec.transposed)
    if needs[3]:
        dA = skinny().outer(x2, D, seed, (rank,), (p,), A.dtype, tf32, tiles)
    return dx, dW, None if dbias is None else dbias.to(bias.dtype), dA, dB, dm


def kernels():
    """The kernels, imported at the first call."""
    from peft_fast.kernels import dora_linear

    return dora_linear


def _plain(spec):
    return spec.scalings[0], spec.ps[0], spec.transposed


def _signature(what, x, W, A, spec):
    return what, x.device, x.dtype, A.dtype, tuple(W.shape), tuple(A.shape), spec.ps[0]


def _forward_op(x, W, bias, A, B, c, seed, scaling, p, transposed, keep):
    spec = Spec([A.shape[0]], [scaling], [p], x.dtype, transposed, False, "triton", "accumulate")
    with vendor.no_autocast(x.device.type):
        tensors = x, W, bias, A, B, c, seed, spec, keep
        if not (x.numel() and W.numel()):
            y, H, P = otherwise.forward(*tensors)
        else:
            y, H, P = guarded(
                _signature("dora_linear's forward", x, W, A, spec),
                lambda: run_forward(*tensors),
                lambda: otherwise.forward(*tensors),
            )
    return y, H, x.new_empty(0) if P is None else P


def _backward_op(g, x, W, bias, A, B, c, H, P, norm, seed, scaling, p, transposed, dx_dtype, needs):
    spec = Spec([A.shape[0]], [scaling], [p], dx_dtype, transposed, False, "triton", "accumulate")
    with vendor.no_autocast(x.device.type):
        tensors = g, x, W, bias, A, B, c, H, P, norm, seed, spec, needs
        if not (x.numel() and W.numel()):
            grads = otherwise.backward(*tensors)
        else:
            grads = guarded(
                _signature("dora_linear's backward", x, W, A, spec),
                lambda: run_backward(*tensors),
                lambda: otherwise.backward(*tensors),
            )
    # an operator returns tensors only, and its fake promises contiguous ones
    return tuple(x.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


def _forward_fake(x, W, bias, A, B, c, seed, scaling, p, transposed, keep):
    M, N = _tokens(x), W.shape[1 if transposed else 0]
    P = x.new_empty(M, N) if keep else x.new_empty(0)
    return x.new_empty(*x.shape[:-1], N), x.new_empty(M, A.shape[0]), P


def _backward_fake(g, x, W, bias, A, B, c, H, P, norm, seed, scaling, p, transposed, dx_dtype, needs):
    like = (
        (x, dx_dtype),
        (W, W.dtype),
        (bias, None if bias is None else bias.dtype),
        (A, A.dtype),
        (B, B.dtype),
        (c, c.dtype),
    )
    return tuple(
        x.new_empty(t.shape, dtype=dtype) if need else x.new_empty(0)
        for (t, dtype), need in zip(like, needs, strict=True)
    )


def _tokens(x):
    M = 1
    for size in x.shape[:-1]:
        M = M * size
    return M


define("triton_dora_linear", _FORWARD, _forward_op, _forward_fake)
define("triton_dora_linear_backward", _BACKWARD, _backward_op, _backward_fake)
