"""lora_group by vendor GEMMs: one skinny product for all A's without dropout, one accumulation for dx.

Each y is a GEMM of its own, which owns its storage: weights lie apart, and a copy side by side would cost their memory.
"""

from __future__ import annotations

# a module, not its names: whoever imports it first imports this one halfway
from peft_fast.backends.torch import lora_linear as vendor


def forward(x, Ws, biases, A, Bs, seed, spec):
    """x (..., K), A (R, K), of each sibling W, bias (N,) | None, B (N, r) -> [y (..., N)], H (M, R) = s·drop(x)·Aᵀ."""
    with vendor.no_autocast(x.device.type):
        narrow = vendor.low_dtype(x, A, spec)
        H = vendor.shrink(vendor.rows(x), A.to(narrow), seed, spec)
        parts = zip(H.split(spec.widths(), 1), Ws, biases, Bs, spec.transposed, strict=True)
        return [vendor.expand(x, h, W, bias, B.to(narrow), t, spec.plan) for h, W, bias, B, t in parts], H


def backward(gs, x, Ws, biases, A, Bs, H, seed, spec, needs):
    """gs [(..., N)] -> dx, dWs, dbiases, dA, dBs; None where ``needs`` (x, [W], [bias], A, [B]) says so."""
    with vendor.no_autocast(x.device.type):
        x2, gs = vendor.rows(x), [vendor.rows(g).to(x.dtype) for g in gs]
        narrow = vendor.low_dtype(x, A, spec)
        D = dx = dA = None  # D (M, R)
        if spec.ranks and (needs[0] or needs[3]):
            D = vendor.cat(list(_shrink_gradients(gs, [B.to(narrow) for B in Bs], spec)))
        if needs[0]:
            low = None if D is None else vendor.expand_dx(D, A.to(narrow), seed, spec)
            dx = vendor.add_base(low, zip(gs, Ws, spec.transposed, strict=True), spec.dx_dtype).view(x.shape)
        if needs[3]:
            dA = vendor.outer(D, x2.to(narrow), seed, spec).to(A.dtype)
        dWs = [
            vendor.weight_gradient(x2, g, W, t) if need else None
            for g, W, t, need in zip(gs, Ws, spec.transposed, needs[1], strict=True)
        ]
        dbiases = [
            vendor.bias_gradient(g, b) if need else None for g, b, need in zip(gs, biases, needs[2], strict=True)
        ]
        parts = zip(gs, Bs, H.split(spec.widths(), 1), needs[4], strict=True)
        dBs = [(g.to(narrow).t() @ h).to(B.dtype) if need else None for g, B, h, need in parts]
    return dx, dWs, dbiases, dA, dBs


def _shrink_gradients(gs, Bs, spec):
    """[s·g·B] of each adapter."""
    adapter = 0
    for g, B, count in zip(gs, Bs, spec.counts, strict=True):
        ranks = spec.ranks[adapter : adapter + count]
        for b in B.split(ranks, 1) if count else ():
            yield vendor.mm(g.to(B.dtype), b, spec.scalings[adapter])
            adapter += 1
