"""lora_linear by Triton kernels, in one of two plans.

`accumulate`: the vendor's GEMM adds into the adapter's output, which a kernel writes with the mask in it.
`fused`: one GEMM of ours with r more columns, the mask applied in the accumulator before the main loop.
Everything is an operator of torch.ops.peft_fast with a fake, so that torch.compile traces it. Kernels run on the
current stream of x's device, read seeds there, and use no memory but torch's: they may be captured in a graph.
One that does not compile or fit is tried once per signature; from then on the torch backend runs the call, and
failures() says why.
"""

from __future__ import annotations

import warnings

import torch

from peft_fast.backends.operators import define, register, shaped, traced
from peft_fast.backends.torch import lora_linear as vendor
from peft_fast.backends.triton import first_line, interpreting, tuning
from peft_fast.ops.spec import Spec
from peft_fast.reference.dropout import keep_mask

# each adapter is unrolled code in the kernels; a crowd of them would compile for minutes
MOST_ADAPTERS = 8

_failed: dict[tuple, str] = {}
_fallbacks = 0


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
    return sorted(set(_failed.values()))


def fallbacks() -> int:
    """How many calls ran on the torch backend so far because a kernel failed: whose time is whose."""
    return _fallbacks


def run_forward(x, W, bias, A, B, seed, spec):
    """What the operator does, on real or meta tensors."""
    x2, tf32, tiles = _rows(x), _tf32(x), tuning.load(x.device.index or 0)
    Wn = W.to(x.dtype).t() if spec.transposed else W.to(x.dtype)  # (N, K)
    ranks, ps = tuple(spec.ranks), tuple(spec.ps)
    H = skinny().shrink(x2, A, seed, ranks, tuple(spec.scalings), ps, tf32, tiles) if ranks else None
    if spec.plan == "fused":
        bias = bias if bias is None else bias.contiguous()
        y = gemm().fused(x2, Wn, bias, H, B, None, ranks, (0.0,) * len(ranks), x.dtype, tf32, tiles)
    else:
        y = x.new_empty(x2.shape[0], Wn.shape[0])
        bias = bias if bias is None else bias.to(x.dtype)
        if not ranks:
            torch.mm(x2, Wn.t(), out=y) if bias is None else torch.addmm(bias, x2, Wn.t(), out=y)
        else:
            low = B.to(x.dtype).t()
            torch.mm(H, low, out=y) if bias is None else torch.addmm(bias, H, low, out=y)
            y.addmm_(x2, Wn.t())
    return shaped(y, x), x.new_empty(x2.shape[0], 0) if H is None else H


def run_backward(g, x, W, bias, A, B, H, seed, spec, needs):
    """What the operator does, on real or meta tensors; None for what is not needed."""
    x2, g2, tf32, tiles = _rows(x), _rows(g.to(x.dtype)), _tf32(x), tuning.load(x.device.index or 0)
    ranks, scalings, ps = tuple(spec.ranks), tuple(spec.scalings), tuple(spec.ps)
    D = dx = dW = dbias = dA = dB = None
    if ranks and (needs[0] or needs[3] or needs[4]):
        # both also where one would do, which is rare: a gradient's bits do not hang on which others are wanted
        D, dB = skinny().shrink_outer(g2, B, H, ranks, scalings, B.dtype, tf32, tiles)
        dB = dB if needs[4] else None
    if needs[0]:
        dx = shaped(_dx(g2, D, W.to(x.dtype), A, seed, spec, tf32, tiles), x)
    if needs[1]:
        dW = (x2.t() @ g2 if spec.transposed else g2.t() @ x2).to(W.dtype)
    if needs[2]:
        dbias = g2.sum(0, dtype=torch.float32).to(bias.dtype)
    if needs[3] and ranks:
        dA = skinny().outer(x2, D, seed, ranks, ps, A.dtype, tf32, tiles)
    return dx, dW, dbias, dA, dB


def run_mask(seed, M, K, p):
    """seed () int64 -> bool (M, K), by a kernel, or by the definition where the kernel fails."""

    def run():
        from peft_fast.kernels.dropout import dropout_mask

        return dropout_mask(seed, M, K, p)

    return _guarded(("dropout_mask", seed.device), run, lambda: keep_mask(seed, M, K, p))


def skinny():
    """The skinny kernels, imported at the first call: importing peft_fast imports no Triton."""
    from peft_fast.kernels import skinny

    return skinny


def gemm():
    """The kernels of size M·N or M·K, imported at the first call."""
    from peft_fast.kernels import lora_linear

    return lora_linear


def _dx(g2, D, W, A, seed, spec, tf32, tiles):
    """g (M, N), D (M, R), W as stored, A (R, K) -> dx (M, K)."""
    Wn = W.t() if spec.transposed else W  # (N, K)
    ranks, ps = tuple(spec.ranks), tuple(spec.ps)
    if spec.plan == "fused":
        return gemm().fused(g2, Wn.t(), None, D, A.t(), seed, ranks, ps, spec.dx_dtype, tf32, tiles)
    if D is None:
        return (g2 @ Wn).to(spec.dx_dtype)
    if any(ps):
        low = gemm().expand(D, A, seed, ranks, ps, spec.dx_dtype, tf32, tiles)
    else:
        low = (D @ A.to(D.dtype)).to(spec.dx_dtype)
    return low.addmm_(g2, Wn) if low.dtype == g2.dtype else low + g2 @ Wn


def _rows(t):
    """(..., K) -> (M, K) with unit column stride."""
    t = vendor.rows(t)
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _tf32(x):
    return x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _plain(spec):
    return spec.ranks, spec.scalings, spec.ps, spec.transposed, spec.plan


def _guarded(signature, run, otherwise):
    """run(), or otherwise() from the first time on that a kernel of this signature did not compile or launch."""
    global _fallbacks
    if signature not in _failed:
        try:
            return run()
        except Exception as error:
            if type(error) is RuntimeError and "out of memory" in str(error):  # from Triton's loader
                raise torch.OutOfMemoryError(str(error)) from error
            if not _is_ours(error):
                raise
            why = f"a Triton kernel of {signature[0]} failed and torch runs it instead ({_what(error)})"
            # what a stream refuses while it is captured may work on the next call
            if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
                _failed[signature] = why
            warnings.warn(why, RuntimeWarning, stacklevel=2)
    _fallbacks += 1
    return otherwise()


def _is_ours(error):
    """Compilers and launches that fail; not exhausted memory, a vendor's GEMM, a broken device, or a bug in ours."""
    from triton.runtime.errors import InterpreterError

    bugs = (InterpreterError, AssertionError) if interpreting() else ()
    theirs = torch.OutOfMemoryError, torch.AcceleratorError, *bugs
    return not isinstance(error, theirs) and "CUBLAS" not in str(error)


def _what(error):
    from triton.compiler.errors import CompilationError

    # a compilation error shows the source before it says what is wrong
    line = str(error).strip().splitlines()[-1] if isinstance(error, CompilationError) else first_line(error)
    return f"{type(error).__name__}: {line}"


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
        return _guarded(
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
            grads = _guarded(
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
    "(Tensor seed, int M, int K, float p) -> Tensor",
    run_mask,
    lambda seed, M, K, p: seed.new_empty(M, K, dtype=torch.bool),
)
