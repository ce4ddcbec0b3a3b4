"""y = scale·(W[ids] + Σ s·A[:, ids]ᵀ·Bᵀ), the definition."""

from __future__ import annotations

import torch.nn.functional as F


def forward(ids, W, adapters, padding_idx=None, scale=None, wide=None):
    """ids (...,) int, W (V, D), adapters of (A (r, V), B (D, r), scaling, ...) -> y (..., D).

    The token ``padding_idx`` gets no gradient. ``scale`` is (of the base, of the adapters): each is rounded to its own
    dtype. ``wide`` is the dtype of products and sums.
    """
    base_scale, scale = (1, 1) if scale is None else scale
    y = F.embedding(ids, W, padding_idx)
    y = (y * base_scale).to(y.dtype).to(wide)
    for A, B, scaling, *_ in adapters:
        H = F.embedding(ids, A.mT, padding_idx).to(wide)
        y = y + (H @ B.mT.to(wide)) * (scaling * scale)
    return y
