"""lora_linear by the skinny CUDA kernels, in one of two plans.

`accumulate`: cuBLASLt, or torch's GEMM where it does not, adds the base into what a kernel wrote.
`fused`: on Hopper one GEMM of ours with r more columns, the mask in it; elsewhere `accumulate`. By name only, since
it has not been measured.
Low-rank operands are rounded to x's dtype in registers; H and D are (M, R) in x's dtype. Kernels run on torch's
current stream, read seeds on the device and use no memory but torch's: they may be captured in a graph. They are
tried on a small problem first; from a failure on, the torch backend runs the calls, and failures() says why.
"""

from __future__ import annotations

import contextlib
from collections import Counter

import torch

from peft_fast.backends.cuda import selftest
from peft_fast.backends.fallback import Fallback
from peft_fast.backends.operators import register, shaped, traced
from peft_fast.backends.torch import lora_linear as vendor
from peft_fast.backends.triton import first_line
from peft_fast.ops.spec import Spec

CHUNK, MAX_CHUNKS = 64, 32  # csrc/cuda/skinny.h: one launch takes this many chunks of this many ranks

_refusals: Counter[str] = Counter()


def forward(x, W, bias, A, B, seed, spec):
    """x (..., K), W, bias (N,) | None, A (R, K), B (N, R) -> y (..., N), H (M, R) = s·drop(x)·Aᵀ."""
    run = torch.ops.peft_fast.cuda_lora_linear if traced(x) else _forward_op
    return run(x, W, bias, A, B, seed, *_plain(spec))


def backward(g, x, W, bias, A, B, H, seed, spec, needs):
    """g (..., N) -> dx, dW, dbias, dA, dB; None where ``needs`` (x, W, bias, A, B) says so."""
    run = torch.ops.peft_fast.cuda_lora_linear_backward if traced(x) else _backward_op
    grads = run(g, x, W, bias, A, B, H, seed, *_plain(spec), spec.dx_dtype, list(needs))
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def failures() -> list[str]:
    """Why calls that the CUDA kernels were chosen for ran on the torch backend, a sentence each."""
    return sorted({*guarded.reasons(), *selftest.failures()})


def fallbacks() -> int:
    """How many calls torch ran so far because a kernel had failed: whose time is whose."""
    return guarded.calls


def refusals() -> Counter[str]:
    """How many products the plan `fused` has left to `accumulate` so far, by the reason why it does not make them."""
    return _refusals.copy()


@contextlib.contextmanager
def uncounted():
    """For the self-test, whose products are nobody's call."""
    before = refusals()
    try:
        yield
    finally:
        _refusals.clear()
        _refusals.update(before)


def run_forward(x, W, bias, A, B, seed, spec):
    """What the operator does; every adapter has at least one rank, and x and W at least one element."""
    ops, ranks, none = torch.ops.peft_fast, spec.ranks, [0.0] * len(spec.ranks)
    x2 = vendor.dense_rows(x)
    Wn = W.to(x.dtype).t() if spec.transposed else W.to(x.dtype)  # (N, K)
    H = ops.lora_shrink(x2, A, seed, ranks, spec.scalings, spec.ps)
    y = _fused(x2, Wn, H, B, bias, None, 0.0) if spec.plan == "fused" else None
    if y is None:
        y = _add(ops.lora_expand(H, B.t(), bias, None, ranks, none), x2, Wn.t())
    return shaped(y, x), H


def run_backward(g, x, W, bias, A, B, H, seed, spec, needs):
    """What the operator does; None for what is not needed."""
    ops, ranks = torch.ops.peft_fast, spec.ranks
    dx = dW = dbias = dA = dB = D = None
    x2, g2 = vendor.dense_rows(x), vendor.dense_rows(g.to(x.dtype))
    if needs[0] or needs[3] or needs[4]:
        # both also where one would do, which is rare: a gradient's bits do not hang on which others are wanted
        D, dB = ops.lora_shrink_outer(g2, B.t(), H, ranks, spec.scalings)
        dB = dB if needs[4] else None
    if needs[0]:
        dx = shaped(_dx(g2, D, W.to(x.dtype), A, seed, spec), x)
    if needs[3]:
        dA = ops.lora_outer(D, x2, A, seed, ranks, spec.ps, False)
    if needs[1]:
        dW = vendor.weight_gradient(x2, g2, W, spec.transposed)
    if needs[2]:
        dbias = vendor.bias_gradient(g2, bias)
    return dx, dW, dbias, dA, dB


def _dx(g2, D, W, A, seed, spec):
    """g (M, N), D (M, R), W as stored, A (R, K) -> dx (M, K)."""
    Wn = W.t() if spec.transposed else W  # (N, K)
    if spec.plan == "fused":
        if len(spec.ranks) > 1 and any(spec.ps):
            dx = _refused("the Hopper GEMM has one dropout mask")
        elif spec.dx_dtype != g2.dtype:
            dx = _refused("the Hopper GEMM's dx has the dtype of its product")
        else:
            dx = _fused(g2, Wn.t(), D, A.t(), None, seed, spec.ps[0])
        if dx is not None:
            return dx
    low = torch.ops.peft_fast.lora_expand(D, A, None, seed, spec.ranks, spec.ps)
    if spec.dx_dtype == low.dtype:
        return _add(low, g2, Wn)
    return low.to(torch.promote_types(low.dtype, spec.dx_dtype)).add_(g2 @ Wn).to(spec.dx_dtype)


def _add(out, a, b):
    """out (M, N) += a (M, K)·b (K, N)."""
    tf32 = out.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return out if torch.ops.peft_fast.gemm_add_(out, a, b, tf32) else out.addmm_(a, b)


def _fused(left, right, low, low_right, bias, seed, p):
    """left (M, K)·rightᵀ (N, K) + mask∘(low (M, R)·low_rightᵀ (N, R))/(1 − p) + bias, or None where Hopper's cannot."""
    turned = right.stride(1) != 1
    if turned and right.stride(0) != 1:
        return _refused("the Hopper GEMM wants a weight with neighbouring rows or columns")
    low_right = low_right.to(left.dtype)
    if pad := -low.shape[1] % 8:  # the hardware copies rows of 16 bytes
        low, low_right = (torch.nn.functional.pad(t, (0, pad)) for t in (low, low_right))
    right, low_right = (right.t(), low_right.t()) if turned else (right, low_right)
    if bias is not None:
        bias = (bias if bias.dtype == torch.float32 else bias.to(left.dtype)).contiguous()
    seed = None if seed is None else seed[:1]
    out, why = torch.ops.peft_fast.lora_gemm(left, right, low, low_right.contiguous(), bias, seed, p, turned)
    return _refused(why) if why else out


def _refused(why):
    _refusals[why] += 1


def _plain(spec):
    return spec.ranks, spec.scalings, spec.ps, spec.transposed, spec.plan


def _takes(x, W, ranks):
    # no adapter leaves no skinny work, and a crowd of tiny ones does not fit a launch
    chunks = sum((r + CHUNK - 1) // CHUNK for r in ranks)
    return x.numel() and W.numel() and 0 < chunks <= MAX_CHUNKS


def _judge(error):
    """What a launch refused comes again; exhausted memory, seen through the stable ABI, is any RuntimeError."""
    if not isinstance(error, RuntimeError) or isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
        raise error
    return first_line(error), selftest.LAUNCH in str(error)


guarded = Fallback("CUDA", _judge)


def _forward_op(x, W, bias, A, B, seed, ranks, scalings, ps, transposed, plan):
    spec = Spec(ranks, scalings, ps, x.dtype, transposed, False, "cuda", plan)
    return _run("forward", run_forward, vendor.forward, x, W, (x, W, bias, A, B, seed), spec)


def _backward_op(g, x, W, bias, A, B, H, seed, ranks, scalings, ps, transposed, plan, dx_dtype, needs):
    spec = Spec(ranks, scalings, ps, dx_dtype, transposed, False, "cuda", plan)
    tensors = g, x, W, bias, A, B, H, seed
    grads = _run("backward", run_backward, vendor.backward, x, W, tensors, spec, needs)
    # an operator returns tensors only, and its fake promises contiguous ones
    return tuple(x.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


def _run(what, run, otherwise, x, W, tensors, spec, *more):
    """run(...), or the torch backend where the kernels do not take the call, or have failed."""
    plain = spec._replace(plan="accumulate")
    with vendor.no_autocast(x.device.type):
        if not _takes(x, W, spec.ranks):
            return otherwise(*tensors, plain, *more)
        return guarded(
            (f"lora_linear's {what}", spec.plan, x.device, x.dtype),
            lambda: run(*tensors, spec, *more),
            lambda: otherwise(*tensors, plain, *more),
            trusted=not selftest.reason(x.device, x.dtype, spec.plan),
        )


register("cuda", _forward_op, _backward_op)
