"""dora_norm by the compiled operators: ‖W‖² and W·Aᵀ in one call, the rest of Gram's identity as torch has it."""

from __future__ import annotations

import torch

from peft_fast.backends import operators
from peft_fast.backends.torch import dora_norm as vendor


def norm(W, A, B, scaling, transposed):
    """W (N, K) or (K, N), A (r, K), B (N, r) -> (N,) float32."""
    if operators.traced(W):
        return torch.ops.peft_fast.torch_dora_norm(W, A, B, scaling, transposed)
    squares, product = torch.ops.peft_fast.dora_rows(W, A, transposed)
    return vendor.finish(squares, product, W, A, B, scaling, transposed).float()
