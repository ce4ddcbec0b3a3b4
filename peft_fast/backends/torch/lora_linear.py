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
        narrow = low_dtype(x, A, spec)
        H = shrink(rows(x), A.to(narrow), seed, spec)
        return expand(x, H, W, bias, B.to(narrow), spec.transposed, spec.plan), H


def backward(g, x, W, bias, A, B, H, seed, spec, needs):
    """g (..., N) -> dx, dW, dbias, dA, dB; None where ``needs`` (x, W, bias, A, B) says so."""
    with no_autocast(x.device.type):
        x2, g2 = rows(x), rows(g).to(x.dtype)
        narrow = low_dtype(x, A, spec)
        gn = g2.to(narrow)
        D = None  # (M, R)
        if spec.ranks and (needs[0] or needs[3]):
            D = cat([mm(gn, b, s) for b, s in zip(B.to(narrow).split(spec.ranks, 1), spec.scalings, strict=True)])
        dx = dW = dbias = dA = dB = None
        if needs[0]:
            low = None if D is None else expand_dx(D, A.to(narrow), seed, spec)
            dx = add_base(low, [(g2, W, spec.transposed)], spec.dx_dtype).view(x.shape)
        if needs[1]:
            dW = weight_gradient(x2, g2, W, spec.transposed)
        if needs[2]:
            dbias = bias_gradient(g2, bias)
        if needs[3] and spec.ranks:
            dA = outer(D, x2.to(narrow), seed, spec).to(A.dtype)
        if needs[4] and spec.ranks:
            dB = (gn.t() @ H).to(B.dtype)
    return dx, dW, dbias, dA, dB


def rows(t):
    """t (..., K) -> (M, K), also where K = 0."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def dense_rows(t):
    """t (..., K) -> (M, K) with neighbouring columns, a view where that is one."""
    t = rows(t)
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


def no_autocast(device_type):
    """A context in which operators keep the dtypes they are given."""
    on = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else contextlib.nullcontext()


def low_dtype(x, A, spec):
    """The dtype of the low-rank products."""
    return torch.promote_types(x.dtype, A.dtype) if spec.exact else x.dtype


def shrink(x2, A, seed, spec):
    """x (M, K), A (R, K) -> H (M, R) = s·drop(x)·Aᵀ; neighbours without dropout that share a scaling are one GEMM."""
    if not spec.ranks:
        return x2.new_empty(x2.shape[0], 0)
    xn = x2.to(A.dtype)
    return cat([mm(_drop(xn, seed, spec, i), A[a:b].t(), spec.scalings[i]) for a, b, i in _runs(spec, spec.scalings)])


def expand(x, H, W, bias, B, transposed, plan):
    """x (..., K), H (M, r), W, bias (N,) | None, B (N, r) -> y (..., N) = x·Wᵀ + bias + H·Bᵀ, rounded once."""
    x2 = rows(x)
    Wt = W.to(x.dtype) if transposed else W.to(x.dtype).t()  # (K, N)
    y = x.new_empty(*x.shape[:-1], Wt.shape[1])
    y2 = rows(y)
    if B.dtype != x.dtype and B.shape[1]:
        # a bias of the base's dtype rounds with the base, one that holds the adapters' own stays in theirs
        late = bias is not None and bias.dtype == B.dtype
        base = torch.mm(x2, Wt) if bias is None or late else torch.addmm(bias, x2, Wt)
        base = base.to(B.dtype) + bias if late else base.to(B.dtype)
        y2.copy_(torch.addmm(base, H, B.t()))
    elif plan == "augmented":
        wide, weight = torch.cat((x2, H), 1), torch.cat((Wt, B.t()), 0)
        y2.copy_(torch.mm(wide, weight) if bias is None else torch.addmm(bias.to(x.dtype), wide, weight))
    elif not B.shape[1]:
        torch.mm(x2, Wt, out=y2) if bias is None else torch.addmm(bias.to(x.dtype), x2, Wt, out=y2)
    else:
        # bias rides in the small GEMM: a separate add would round y once more than PEFT does
        torch.mm(H, B.t(), out=y2) if bias is None else torch.addmm(bias.to(x.dtype), H, B.t(), out=y2)
        y2.addmm_(x2, Wt)
    return y


def expand_dx(D, A, seed, spec):
    """D (M, R), A (R, K) -> Σ drop(D·A) (M, K), the adapters' part of dx."""
    low = None
    for a, b, i in _runs(spec):
        part = _drop(D[:, a:b] @ A[a:b], seed, spec, i)
        low = part if low is None else low.add_(part)
    return low


def add_base(low, parts, dx_dtype):
    """low (M, K) | None, written into where that fits, and (g (M, N), W, transposed) of each part -> dx (M, K)."""
    if not torch.compiler.is_compiling():  # which cannot sort by sizes it does not know
        # the largest last: every sum but that is then rounded at a smaller size
        parts = sorted(parts, key=lambda part: part[0].shape[1])
    for g2, W, transposed in parts:
        Wn = W.to(g2.dtype).t() if transposed else W.to(g2.dtype)  # (N, K)
        if low is None:
            low = g2 @ Wn
        elif low.dtype == g2.dtype == dx_dtype:
            low.addmm_(g2, Wn)
        else:
            low = low.to(torch.promote_types(low.dtype, dx_dtype)) + g2 @ Wn
    return low.to(dx_dtype)


def outer(D, x2, seed, spec):
    """D (M, R), x (M, K) -> dA (R, K) = Dᵀ·drop(x)."""
    return torch.cat([D[:, a:b].t() @ _drop(x2, seed, spec, i) for a, b, i in _runs(spec)])


def weight_gradient(x2, g2, W, transposed):
    """x (M, K), g (M, N) -> dW in W's shape and dtype."""
    return (x2.t() @ g2 if transposed else g2.t() @ x2).to(W.dtype)


def bias_gradient(g2, bias):
    """g (M, N) -> (N,), summed in float32 at least."""
    return g2.sum(0, dtype=torch.promote_types(g2.dtype, torch.float32)).to(bias.dtype)


def mm(a, b, scaling):
    """a·b·scaling."""
    # alpha scales the float32 accumulator: one rounding where a product and a multiplication would have two
    return torch.addmm(a.new_zeros(1, 1), a, b, beta=0, alpha=scaling)


def cat(parts):
    """Parts (M, r) side by side."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _drop(x2, seed, spec, i):
    return dropped(x2, seed[i], spec.ps[i]) if spec.ps[i] > 0 else x2


def _runs(spec, keys=None):
    """(first rank, last + 1, adapter): neighbours without dropout, and of one key, as one."""
    found, end = [], 0
    for i, rank in enumerate(spec.ranks):
        a, b, last = found[-1] if found else (0, 0, 0)
        plain = bool(found) and spec.ps[i] == 0 == spec.ps[last] and (keys is None or keys[i] == keys[last])
        if plain:
            found[-1] = (a, b + rank, last)
        else:
            found.append((end, end + rank, i))
        end += rank
    return found
