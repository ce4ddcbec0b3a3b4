"""dora_norm by the compiled operator: one pass over W, and Gram's identity row by row."""

from __future__ import annotations

import torch


def norm(W, A, B, scaling, transposed):
    """W (N, K) or (K, N), A (r, K), B (N, r) -> (N,) in float32."""
    return torch.ops.peft_fast.dora_norm(W, A, B, scaling, transposed)
