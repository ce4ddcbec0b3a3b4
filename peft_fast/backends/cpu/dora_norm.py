"""dora_norm by the compiled operator: one pass over W, and Gram's identity row by row."""

from __future__ import annotations

import torch

from peft_fast.backends import operators


def norm(W, A, B, scaling, transposed):
    """W (N, K) or (K, N), A (r, K), B (N, r) -> (N,) float32."""
    if operators.traced(W):
        return torch.ops.peft_fast.torch_dora_norm(W, A, B, scaling, transposed)
    wide = A.double()
    return torch.ops.peft_fast.dora_norm(W, A, B, wide @ wide.t(), scaling, transposed)
