"""lora_decode by the compiled operator."""

from __future__ import annotations

import torch


def forward(x, W, bias, adapters, transposed):
    """x (..., K), adapters whose scaling is a number -> y (..., N), rounded once; no gradients."""
    return torch.ops.peft_fast.lora_decode.default(
        x,
        W,
        bias,
        [a.A for a in adapters],
        [a.B for a in adapters],
        [a.bias for a in adapters],
        [a.scaling for a in adapters],
        transposed,
    )
