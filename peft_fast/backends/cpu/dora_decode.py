"""dora_decode by the compiled operator."""

from __future__ import annotations

import torch


def forward(x, W, bias, adapter, m, norm, probe, transposed):
    """x (..., K), m, norm (N,), probe (K,) | None -> y (..., N), rounded once, and the probe's sums (N,)."""
    A, B, scaling, *_ = adapter
    return torch.ops.peft_fast.dora_decode.default(x, W, bias, A, B, scaling, m, norm.float(), probe, transposed)
