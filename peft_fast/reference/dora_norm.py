"""‖W + s·B·A‖ of each row, the definition."""

from __future__ import annotations

import torch


def forward(W, A, B, scaling=1.0, transposed=False):
    """W (N, K), or (K, N) if transposed, A (r, K), B (N, r) -> (N,)."""
    return torch.linalg.vector_norm((W.mT if transposed else W) + scaling * torch.matmul(B, A), dim=1)
