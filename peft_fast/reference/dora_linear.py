"""y = x·Wᵀ + bias + (c−1)∘drop(x)·Wᵀ + c∘s·drop(x)·Aᵀ·Bᵀ with c = m/‖W + s·B·A‖, the definition."""

from __future__ import annotations

import torch

from peft_fast.reference import dora_norm


def forward(x, W, bias, adapter, m, mask=None, transposed=False, norm=None):
    """x (..., K), W (N, K) or (K, N) if transposed, adapter of (A (r, K), B (N, r), scaling, p, ...), m (N,) -> y.

    ``norm`` (N,) is what m is divided by, else that of the rows of W + s·B·A: either way a constant to autograd.
    """
    A, B, scaling, p, *_ = adapter
    if norm is None:
        norm = dora_norm.forward(W, A, B, scaling, transposed).detach()
    c = m / norm
    Wt = W if transposed else W.mT
    dropped = x
    if p > 0:
        dropped = x * mask.to(x.dtype) * (1 / (1 - p) if p < 1 else 0.0)
    low = torch.matmul(torch.matmul(dropped.to(A.dtype), A.mT), B.mT)
    y = torch.matmul(x, Wt) + (c - 1) * torch.matmul(dropped, Wt) + c * (low * scaling)
    return y if bias is None else y + bias
