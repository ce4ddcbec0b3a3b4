"""dora_embedding by torch's gathers; the vectors are gathered anew for the magnitude's gradient, not kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# modules, not their names: whoever imports them first imports this one halfway
from peft_fast.backends.torch import lora_embedding as plain
from peft_fast.backends.torch import lora_linear as vendor


def forward(ids, W, A, B, c, scale, spec):
    """ids (M,), W (V, D), A (r, V), B (D, r), c (D,), scale (2,) | None -> y (M, D) in W's dtype, H (M, r)."""
    with vendor.no_autocast(W.device.type):
        H = A.index_select(1, ids).t().to(plain._wide(A, B))
        low = vendor.mm(H, B.to(H.dtype).t(), spec.scaling)
        y = _base(ids, W, scale, H.dtype) + (low if scale is None else low.mul_(scale[1]))
        return y.mul_(c).to(W.dtype), H


def backward(g, ids, W, A, B, c, norm, H, scale, spec, needs):
    """g (M, D) -> dW (V, D), dA (r, V), dB (D, r), dm (D,); None where ``needs`` (W, A, B, m) says so."""
    dW = dB = dm = None
    with vendor.no_autocast(g.device.type):
        if needs[0]:
            own = (g * (c if scale is None else c * scale[0])).to(W.dtype)
            dW = torch.ops.aten.embedding_dense_backward(own, ids, W.shape[0], spec.padding_idx, False)
        wide = g.to(H.dtype)
        if needs[2] or needs[3]:
            # Σ g∘(H·Bᵀ) over the tokens is Σ (gᵀ·H)∘B over the ranks, and gᵀ·H is dB without c
            outer = vendor.mm(wide.t(), H, spec.scaling)
            if scale is not None:
                outer = outer * scale[1]
            dB = (outer * c.unsqueeze(1)).to(B.dtype) if needs[2] else None
        if needs[3]:
            total = (wide * _base(ids, W, scale, H.dtype)).sum(0)
            dm = total.add_((outer * B).sum(1)) / norm
        dA, _ = plain.backward(wide * c, ids, A, B, H, scale, spec, (needs[1], False))
    return dW, dA, dB, dm


def _base(ids, W, scale, wide):
    y = F.embedding(ids, W)
    return (y if scale is None else (y * scale[0]).to(W.dtype)).to(wide)
