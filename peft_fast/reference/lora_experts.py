"""y_e = x_e·W_eᵀ + bias_e + Σ s·x_e·A_eᵀ·B_eᵀ for the rows x_e of each expert e, the definition."""

from __future__ import annotations

import torch


def forward(x, W, bias, adapters, counts, transposed=False):
    """x (S, K), counts[e] rows of it expert e's, W (E, N, K) or (E, K, N) if transposed, bias (E, N) -> y (S, N).

    An adapter's A (E·r, K) has expert after expert, its B (N, r·E) rank after rank.
    """
    E, N = W.shape[0], W.shape[2 if transposed else 1]
    ys = []
    for e, xe in enumerate(x.split(counts)):
        y = xe @ (W[e] if transposed else W[e].mT)
        if bias is not None:
            y = y + bias[e]
        for A, B, scaling, *_ in adapters:
            Ae, Be = A.reshape(E, -1, x.shape[1])[e], B.reshape(N, -1, E)[:, :, e]
            y = y + ((xe.to(A.dtype) @ Ae.mT @ Be.mT) * scaling).to(y.dtype)
        ys.append(y)
    return torch.cat(ys)


def combine(z, weights, inverse):
    """z (S, N), weights (T, k), inverse (T·k,) rows of the pairs -> y (T, N), the weighted sum of each token's."""
    return (z[inverse].view(*weights.shape, z.shape[1]) * weights.unsqueeze(-1)).sum(1)
