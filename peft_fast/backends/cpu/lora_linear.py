"""lora_linear by the compiled operators; one call forward, one backward."""

from __future__ import annotations

import torch

from peft_fast.backends.torch.lora_linear import rows, weight_gradient
from peft_fast.ops.packing import packed


def forward(x, W, bias, A, B, seed, spec):
    """x (..., K), W, bias (N,) | None, A (R, K), B (N, R) -> y (..., N), H (M, R) float32 = s·drop(x)·Aᵀ."""
    return torch.ops.peft_fast.lora_linear(x, W, bias, A, B, seed, *_plain(spec), packed(W, x, spec.transposed, False))


def backward(g, x, W, bias, A, B, H, seed, spec, needs):
    """g (..., N) -> dx, dW, dbias, dA, dB; None where ``needs`` (x, W, bias, A, B) says so."""
    g = g.to(x.dtype)
    weight = packed(W, x, spec.transposed, True) if needs[0] else None
    dx, dA, dB, dbias = torch.ops.peft_fast.lora_linear_backward(
        g, x, W, A, B, H, seed, *_plain(spec), list(needs), spec.dx_dtype == torch.float32, weight
    )
    return (
        dx if needs[0] else None,
        weight_gradient(rows(x), rows(g), W, spec.transposed) if needs[1] else None,
        dbias.to(bias.dtype) if needs[2] else None,
        dA if needs[3] else None,
        dB if needs[4] else None,
    )


def _plain(spec):
    return spec.ranks, spec.scalings, spec.ps, spec.transposed
