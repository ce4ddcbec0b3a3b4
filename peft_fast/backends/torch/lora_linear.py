"""lora_linear by vendor GEMMs, in one of two plans.

`accumulate`: the base GEMM adds into the adapter's output, so no second tensor of size M·N or M·K is written.
`augmented`: one GEMM over [x | H] and [W | B].
Low-rank operands are rounded to x's dtype (`exact`: kept in float32).
"""

from __future__ import annotations

import contextlib

import torch

from peft_fast.ops.dropout import dropped


def forward(x, W, bias, A, B, seed, spec):
    """x (..., K), W, bias (N,) | None, A (R, K), B (N, R) -> y (..., N), H (M, R) = s·drop(x)·Aᵀ."""
    with no_autocast(x.device.type):
        Wt = W.to(x.dtype) if spec.transposed else W.to(x.dtype).t()  # (K, N)
        x2 = rows(x)
        narrow = _dtype(x, A, spec)
        A, B = A.to(narrow), B.to(narrow)
        H = _shrink(x2, A, seed, spec)
        y = x.new_empty(*x.shape[:-1], Wt.shape[1])
        y2 = rows(y)
        if narrow != x.dtype:
            # a bias of the base's dtype rounds with the base, one that holds the adapters' own stays in theirs
            late = bias is not None and bias.dtype == narrow
            base = torch.mm(x2, Wt) if bias is None or late else torch.addmm(bias, x2, Wt)
            base = base.to(narrow) + bias if late else base.to(narrow)
            y2.copy_(torch.addmm(base, H, B.t()))
        elif spec.plan == "augmented":
            wide, weight = torch.cat((x2, H), 1), torch.cat((Wt, B.t()), 0)
            y2.copy_(torch.mm(wide, weight) if bias is None else torch.addmm(bias.to(x.dtype), wide, weight))
        elif not spec.ranks:
            torch.mm(x2, Wt, out=y2) if bias is None else torch.addmm(bias.to(x.dtype), x2, Wt, out=y2)
        else:
            # bias rides in the small GEMM: a separate add would round y once more than PEFT does
            torch.mm(H, B.t(), out=y2) if bias is None else torch.addmm(bias.to(x.dtype), H, B.t(), out=y2)
            y2.addmm_(x2, Wt)
    return y, H


def backward(g, x, W, bias, A, B, H, seed, spec, needs):
    """g (..., N) -> dx, dW, dbias, dA, dB; None where ``needs`` (x, W, bias, A, B) says so."""
    with no_autocast(x.device.type):
        x2, g2 = rows(x), rows(g).to(x.dtype)
        narrow = _dtype(x, A, spec)
        gn = g2.to(narrow)
        D = None  # (M, R)
        if spec.ranks and (needs[0] or needs[3]):
            D = _cat([_mm(gn, b, s) for b, s in zip(B.to(narrow).split(spec.ranks, 1), spec.scalings, strict=True)])
        dx = dW = dbias = dA = dB = None
        if needs[0]:
            dx = _dx(g2, D, W.to(x.dtype), A.to(narrow), seed, spec).view(x.shape)
        if needs[1]:
            dW = (x2.t() @ g2 if spec.transposed else g2.t() @ x2).to(W.dtype)
        if needs[2]:
            dbias = g2.sum(0, dtype=torch.promote_types(g2.dtype, torch.float32)).to(bias.dtype)
        if needs[3] and spec.ranks:
            parts = zip(D.split(spec.ranks, 1), range(len(spec.ranks)), strict=True)
            dA = torch.cat([d.t() @ _drop(x2.to(narrow), seed, spec, i) for d, i in parts]).to(A.dtype)
        if needs[4] and spec.ranks:
            dB = (gn.t() @ H).to(B.dtype)
    return dx, dW, dbias, dA, dB


def rows(t):
    """t (..., K) -> (M, K), also where K = 0."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def no_autocast(device_type):
    """A context in which operators keep the dtypes they are given."""
    on = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else contextlib.nullcontext()


def _dtype(x, A, spec):
    return torch.promote_types(x.dtype, A.dtype) if spec.exact else x.dtype


def _drop(x2, seed, spec, i):
    return dropped(x2, seed[i], spec.ps[i]) if spec.ps[i] > 0 else x2


def _shrink(x2, A, seed, spec):
    if not spec.ranks:
        return x2.new_empty(x2.shape[0], 0)
    split = enumerate(zip(A.split(spec.ranks), spec.scalings, strict=True))
    return _cat([_mm(_drop(x2.to(A.dtype), seed, spec, i), a.t(), s) for i, (a, s) in split])


def _mm(a, b, scaling):
    # alpha scales the float32 accumulator: one rounding where a product and a multiplication would have two
    return torch.addmm(a.new_zeros(1, 1), a, b, beta=0, alpha=scaling)


def _cat(parts):
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _dx(g2, D, W, A, seed, spec):
    Wn = W.t() if spec.transposed else W  # (N, K)
    if D is None:
        return (g2 @ Wn).to(spec.dx_dtype)
    low = None
    for i, (d, a) in enumerate(zip(D.split(spec.ranks, 1), A.split(spec.ranks), strict=True)):
        part = _drop(d @ a, seed, spec, i)
        low = part if low is None else low.add_(part)
    if low.dtype != spec.dx_dtype or low.dtype != g2.dtype:
        return (low.to(torch.promote_types(low.dtype, spec.dx_dtype)) + g2 @ Wn).to(spec.dx_dtype)
    return low.addmm_(g2, Wn)
