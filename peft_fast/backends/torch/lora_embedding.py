"""lora_embedding by torch's gathers: r-vectors of the tokens that occur, and a scatter into dA."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# a module, not its names: whoever imports it first imports this one halfway
from peft_fast.backends.torch import lora_linear as vendor


def forward(ids, W, A, B, scale, spec):
    """ids (M,), W (V, D), A (r, V), B (D, r), scale (2,) | None -> y (M, D) in W's dtype, H (M, r) = A[:, ids]ᵀ."""
    with vendor.no_autocast(W.device.type):
        y = F.embedding(ids, W)
        # gathered row by row of A: its transpose as a table would be a copy of the whole
        H = A.index_select(1, ids).t().to(_wide(A, B))
        if scale is not None:
            y = y * scale[0]
        y = y.to(W.dtype)
        low = vendor.mm(H, B.to(H.dtype).t(), spec.scaling)
        return y.add_(low if scale is None else low * scale[1]), H


def backward(g, ids, A, B, H, scale, spec, needs):
    """g (M, D) -> dA (r, V), zero at padding_idx, and dB (D, r); None where ``needs`` (A, B) says so."""
    dA = dB = None
    with vendor.no_autocast(g.device.type):
        g = g.to(H.dtype)
        if scale is not None:
            g = g * scale[1]
        if needs[0]:
            D = vendor.mm(g, B.to(H.dtype), spec.scaling)  # (M, r)
            if spec.padding_idx >= 0:
                D = D.masked_fill_((ids == spec.padding_idx).unsqueeze(1), 0)
            dA = _scatter(torch.zeros_like(A, dtype=D.dtype), ids, D).to(A.dtype)
        if needs[1]:
            dB = vendor.mm(g.t(), H, spec.scaling).to(B.dtype)
    return dA, dB


def _scatter(dA, ids, D):
    """Adds row m of D (M, r) to column ids[m] of dA (r, V), in an order that does not change."""
    if dA.is_cuda:  # index_add_ uses atomics there, index_put_ sorts
        return torch.ops.aten.index_put_(dA, [None, ids], D.t(), True)
    return dA.index_add_(1, ids, D.t())


def _wide(A, B):
    return torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
