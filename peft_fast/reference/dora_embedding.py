"""y = c∘scale·(W[ids] + s·A[:, ids]ᵀ·Bᵀ) with c = m/‖W + s·(B·A)ᵀ‖ of each column, the definition."""

from __future__ import annotations

from peft_fast.reference import dora_norm, lora_embedding


def forward(ids, W, adapter, m, padding_idx=None, scale=None, wide=None, norm=None):
    """ids (...,) int, W (V, D), adapter of (A (r, V), B (D, r), scaling, ...), m (D,) -> y (..., D).

    ``norm`` (D,) is what m is divided by, else that of the columns; the rest as in lora_embedding.
    """
    A, B, scaling, *_ = adapter
    if norm is None:
        norm = dora_norm.forward(W.to(wide), A.to(wide), B.to(wide), scaling, transposed=True).detach()
    return (m.to(wide) / norm.to(wide)) * lora_embedding.forward(ids, W, [adapter], padding_idx, scale, wide)
