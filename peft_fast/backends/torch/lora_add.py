"""lora_add by vendor GEMMs; low-rank operands are rounded as lora_linear's are."""

from __future__ import annotations

import torch

from peft_fast.backends.torch.lora_linear import (
    bias_gradient,
    cat,
    expand_dx,
    low_dtype,
    mm,
    no_autocast,
    outer,
    rows,
    shrink,
)


def forward(base, x, bias, A, B, seed, spec):
    """base (..., N), x (..., K), bias (N,) | None, A (R, K), B (N, R) -> y (..., N), H (M, R) = s·drop(x)·Aᵀ."""
    with no_autocast(x.device.type):
        narrow = low_dtype(x, A, spec)
        H = shrink(rows(x), A.to(narrow), seed, spec)
        wide = torch.promote_types(base.dtype, narrow)
        if bias is not None:
            wide = torch.promote_types(wide, bias.dtype)
        sum_ = rows(base).to(wide)
        if bias is not None:
            sum_ = sum_ + bias.to(wide)
        y = torch.addmm(sum_, H.to(wide), B.to(narrow).to(wide).t())
        return y.to(base.dtype).view(base.shape), H


def backward(g, x, bias, A, B, H, seed, spec, needs):
    """g (..., N) -> dx, dbias, dA, dB; None where ``needs`` (x, bias, A, B) says so."""
    with no_autocast(x.device.type):
        narrow = low_dtype(x, A, spec)
        x2, g2 = rows(x), rows(g)
        gn = g2.to(narrow)
        D = None  # (M, R)
        if needs[0] or needs[2]:
            D = cat([mm(gn, b, s) for b, s in zip(B.to(narrow).split(spec.ranks, 1), spec.scalings, strict=True)])
        dx = dbias = dA = dB = None
        if needs[0]:
            dx = expand_dx(D, A.to(narrow), seed, spec).to(spec.dx_dtype).view(x.shape)
        if needs[1]:
            dbias = bias_gradient(g2, bias)
        if needs[2]:
            dA = outer(D, x2.to(narrow), seed, spec).to(A.dtype)
        if needs[3]:
            dB = (gn.t() @ H).to(B.dtype)
    return dx, dbias, dA, dB
