"""lora_quantized by the compiled operators: W is decoded where its panels are packed, and never dense."""

from __future__ import annotations

import torch


def forward(x, W, codes, bias, A, B, seed, spec):
    """As lora_linear's; W (N, K) is a shape alone, its values are in ``codes``."""
    lists = spec.ranks, spec.scalings, spec.ps
    return torch.ops.peft_fast.lora_quantized(x, W, *codes, bias, A, B, seed, *lists)


def backward(g, x, W, codes, bias, A, B, H, seed, spec, needs):
    """g (..., N) -> dx, dbias, dA, dB; None where ``needs`` (x, bias, A, B) says so."""
    lists = spec.ranks, spec.scalings, spec.ps
    dx, dA, dB, dbias = torch.ops.peft_fast.lora_quantized_backward(
        g.to(x.dtype), x, W, *codes, A, B, H, seed, *lists, list(needs), spec.dx_dtype == torch.float32
    )
    needs_x, needs_bias, needs_A, needs_B = needs
    return (
        dx if needs_x else None,
        dbias.to(bias.dtype) if needs_bias else None,
        dA if needs_A else None,
        dB if needs_B else None,
    )
