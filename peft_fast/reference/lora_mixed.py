"""y[b] = base[b] + s·x[b]·Aᵀ·Bᵀ + s·b_B with the adapter of row b, the definition; of tokens, A[:, ids] for x·Aᵀ."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def forward(x, base, adapters, owners, padding_idx=None):
    """x (b, ..., K) or ids (b, ...), base (b, ..., N), adapters of (A (r, K), B (N, r), ...) -> y (b, ..., N).

    ``owners[b]`` is the adapter of row b, -1 for none; the token ``padding_idx`` gives A no gradient.
    """
    ys = list(base)
    for row, owner in enumerate(owners):
        if owner < 0:
            continue
        A, B, scaling, _, bias = adapters[owner]
        H = x[row].to(A.dtype) @ A.mT if x.is_floating_point() else F.embedding(x[row], A.mT, padding_idx)
        z = H @ B.mT if bias is None else H @ B.mT + bias
        ys[row] = ys[row] + (z * scaling).to(base.dtype)
    return torch.stack(ys) if ys else base.clone()
