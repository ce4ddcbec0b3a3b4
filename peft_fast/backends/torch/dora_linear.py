"""dora_linear by vendor GEMMs: the product that the columns' scale is for, P = drop(x)·Wᵀ, and the adapter's beside it.

Kept for the magnitude's gradient is P alone, as Σ g∘(H·Bᵀ) over the tokens is Σ (gᵀ·H)∘B over the ranks. Without
dropout it is the base's output, else a product of its own. Low-rank operands are rounded to x's dtype (`exact`: kept
in float32).
"""

from __future__ import annotations

import torch

# a module, not its names: whoever imports it first imports this one halfway
from peft_fast.backends.torch import lora_linear as vendor


def forward(x, W, bias, A, B, c, seed, spec, keep):
    """x (..., K), W, bias (N,) | None, A (r, K), B (N, r), c (N,) -> y (..., N), H (M, r), P (M, N) | None."""
    with vendor.no_autocast(x.device.type):
        narrow, x2, drops = vendor.low_dtype(x, A, spec), vendor.rows(x), spec.ps[0] > 0
        H = vendor.shrink(x2, A.to(narrow), seed, spec)
        base = P = _base(x2, W, spec, bias)
        if drops:  # in float32 where the adapter is
            P = _base(_drop(x2.to(narrow), seed, spec), W, spec)
        low = (H @ B.to(narrow).t()).to(c.dtype)
        # as PEFT adds it up: with c = 1 and no adapter it is the base bit for bit
        whole = low.mul_(c).addcmul_(_plain(P, bias, spec, c.dtype), c - 1).add_(base)
        y = x.new_empty(*x.shape[:-1], P.shape[1])
        y.view(P.shape).copy_(whole)
        return y, H, P if keep else None


def backward(g, x, W, bias, A, B, c, H, P, norm, seed, spec, needs):
    """g (..., N) -> dx, dW, dbias, dA, dB, dm; None where ``needs`` (x, W, bias, A, B, m) says so."""
    with vendor.no_autocast(x.device.type):
        x2, g2 = vendor.rows(x), vendor.rows(g).to(x.dtype)
        narrow, drops = vendor.low_dtype(x, A, spec), spec.ps[0] > 0
        dx = dW = dbias = dA = dB = dm = None
        if needs[2]:
            dbias = vendor.bias_gradient(g2, bias)
        if needs[4] or needs[5]:
            outer = (g2.to(narrow).t() @ H).to(c.dtype)
            dB = (outer * c.unsqueeze(1)).to(B.dtype) if needs[4] else None
        if needs[5]:
            dm = (g2 * _plain(P, bias, spec, c.dtype)).sum(0).add_((outer * B.to(narrow)).sum(1)).div_(norm)
        if needs[0] or needs[3]:
            scaled = B.to(c.dtype) * c.unsqueeze(1)
            D = vendor.mm(g2.to(narrow), scaled.to(narrow), spec.scalings[0])
        if needs[0] or needs[1]:
            # with dropout the base sees g itself, and the dropped base what is left of c∘g
            through = (g2 * (c - 1)).to(narrow) if drops else (g2 * c).to(x.dtype)
        if needs[0]:
            low = D @ A.to(narrow)
            if drops:
                low = _drop(vendor.add_base(low, [(through, W, spec.transposed)], narrow), seed, spec)
            dx = vendor.add_base(low, [(g2 if drops else through, W, spec.transposed)], spec.dx_dtype).view(x.shape)
        if needs[1]:
            dW = vendor.weight_gradient(_drop(x2.to(through.dtype), seed, spec), through, W, spec.transposed)
            if drops:
                dW += vendor.weight_gradient(x2, g2, W, spec.transposed)
        if needs[3]:
            dA = vendor.outer(D, x2.to(narrow), seed, spec).to(A.dtype)
    return dx, dW, dbias, dA, dB, dm


def _plain(P, bias, spec, wide):
    """P without the bias that it has where nothing is dropped."""
    return P.to(wide) if bias is None or spec.ps[0] > 0 else P.to(wide) - bias


def _drop(x2, seed, spec):
    return vendor._drop(x2, seed, spec, 0)


def _base(x2, W, spec, bias=None):
    W = W.to(x2.dtype) if spec.transposed else W.to(x2.dtype).t()
    return torch.mm(x2, W) if bias is None else torch.addmm(bias.to(x2.dtype), x2, W)
