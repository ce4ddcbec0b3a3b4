"""lora_add by the compiled operators of lora_linear, whose W here has no columns: its product is nothing."""

from __future__ import annotations

import torch


def forward(base, x, bias, A, B, seed, spec):
    """base (..., N), x (..., K), bias (N,) | None, A (R, K), B (N, R) -> y (..., N), H (M, R) float32."""
    low, H = torch.ops.peft_fast.lora_linear(x, A.new_empty(B.shape[0], 0), bias, A, B, seed, *_plain(spec), None)
    return low.add_(base) if low.dtype == base.dtype else (base + low).to(base.dtype), H


def backward(g, x, bias, A, B, H, seed, spec, needs):
    """g (..., N) -> dx, dbias, dA, dB; None where ``needs`` (x, bias, A, B) says so."""
    needs_x, needs_bias, needs_A, needs_B = needs
    W, wanted = A.new_empty(B.shape[0], 0), [needs_x, False, needs_bias, needs_A, needs_B]
    dx, dA, dB, dbias = torch.ops.peft_fast.lora_linear_backward(
        g.to(x.dtype), x, W, A, B, H, seed, *_plain(spec), wanted, spec.dx_dtype == torch.float32, None
    )
    return (
        dx if needs_x else None,
        dbias.to(bias.dtype) if needs_bias else None,
        dA if needs_A else None,
        dB if needs_B else None,
    )


def _plain(spec):
    return spec.ranks, spec.scalings, spec.ps, spec.transposed
