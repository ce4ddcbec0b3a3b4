"""lora_mixed by the compiled operator: one call for all adapters of a batch."""

from __future__ import annotations

import torch


def forward(y, x, As, Bs, biases, spec):
    """y (b, T, N) += s·x·Aᵀ·Bᵀ + s·b_B of each row's adapter, x (b, T, K) or ids (b, T)."""
    torch.ops.peft_fast.lora_mixed(y, x, As, Bs, biases, spec.order, spec.counts, spec.scalings)
