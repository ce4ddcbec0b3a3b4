"""lora_group by the compiled operators: one call forward, one backward, for all siblings."""

from __future__ import annotations

import torch

from peft_fast.backends.torch.lora_linear import rows, weight_gradient
from peft_fast.ops.packing import packed


def forward(x, Ws, biases, A, Bs, seed, spec):
    """x (..., K), A (R, K), of each sibling W, bias (N,) | None, B (N, r) -> [y (..., N)], H (M, R) = s·drop(x)·Aᵀ."""
    weights = [packed(W, x, t, False) for W, t in zip(Ws, spec.transposed, strict=True)]
    return torch.ops.peft_fast.lora_group(x, Ws, biases, A, Bs, seed, *_plain(spec), weights)


def backward(gs, x, Ws, biases, A, Bs, H, seed, spec, needs):
    """gs [(..., N)] -> dx, dWs, dbiases, dA, dBs; None where ``needs`` (x, [W], [bias], A, [B]) says so."""
    needs_x, needs_W, needs_bias, needs_A, needs_B = needs
    gs = [g.to(x.dtype) for g in gs]
    weights = [packed(W, x, t, True) if needs_x else None for W, t in zip(Ws, spec.transposed, strict=True)]
    wide = spec.dx_dtype == torch.float32
    dx, dA, dBs, dbiases = torch.ops.peft_fast.lora_group_backward(
        gs, x, Ws, A, Bs, H, seed, *_plain(spec), needs_x, needs_bias, needs_A, needs_B, wide, weights
    )
    dWs = [None] * len(Ws)
    if any(needs_W):
        x2 = rows(x)
        parts = zip(gs, Ws, spec.transposed, needs_W, strict=True)
        dWs = [weight_gradient(x2, rows(g), W, t) if need else None for g, W, t, need in parts]
    dbiases = [d.to(b.dtype) if need else None for d, b, need in zip(dbiases, biases, needs_bias, strict=True)]
    dBs = [dB if need else None for dB, need in zip(dBs, needs_B, strict=True)]
    return dx if needs_x else None, dWs, dbiases, dA if needs_A else None, dBs


def _plain(spec):
    return spec.counts, spec.ranks, spec.scalings, spec.ps, spec.transposed
