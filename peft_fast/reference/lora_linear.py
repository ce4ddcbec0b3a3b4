"""y = x·Wᵀ + bias + Σ s·drop(x)·Aᵀ·Bᵀ + s·b_B, the definition."""

from __future__ import annotations

import torch


def forward(x, W, bias, adapters, masks=None, transposed=False):
    """x (..., K), W (N, K) or (K, N) if transposed, adapters of (A (r, K), B (N, r), scaling, p, bias) -> y (..., N).

    ``masks[i]`` is adapter i's keep-mask, broadcastable to x, or None; differentiable by torch's own autograd.
    """
    y = torch.matmul(x, W if transposed else W.mT)
    if bias is not None:
        y = y + bias
    for i, (A, B, scaling, p, bias_B) in enumerate(adapters):
        xi = x
        if p > 0:
            xi = x * masks[i].to(x.dtype) * (1 / (1 - p) if p < 1 else 0.0)
        z = torch.matmul(torch.matmul(xi.to(A.dtype), A.mT), B.mT)
        if bias_B is not None:
            z = z + bias_B
        y = y + (z * scaling).to(y.dtype)
    return y
