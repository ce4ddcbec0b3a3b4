"""y = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ as the autograd.Function one writes first: in-place addmm, one dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Addmm(torch.autograd.Function):
    """x (M,K), W (N,K), bias (N,) or None, A (r,K), B (N,r), all of one dtype -> y (M,N)."""

    @staticmethod
    def forward(ctx, x, W, bias, A, B, s, p):
        xd, keep = (x, None) if p == 0 else torch.native_dropout(x, p, True)
        H = xd @ A.T  # (M, r)
        y = F.linear(x, W, bias).addmm_(H, B.T, alpha=s)
        ctx.save_for_backward(xd, keep, W, A, B, H)
        ctx.s, ctx.p = s, p
        return y

    @staticmethod
    def backward(ctx, g):
        xd, keep, W, A, B, H = ctx.saved_tensors
        D = (g @ B).mul_(ctx.s)  # (M, r)
        if keep is None:
            dx = (g @ W).addmm_(D, A)
        else:
            dx = (g @ W).add_((D @ A).mul_(keep), alpha=1 / (1 - ctx.p))
        return dx, None, None, D.T @ xd, (g.T @ H).mul_(ctx.s), None, None


def addmm(x: Tensor, w, A: Tensor, B: Tensor) -> Tensor:
    """The peer on the tensors of a gate.Weights, with A and B as the leaves."""
    return Addmm.apply(x, w.W, w.bias, A, B, w.scaling, w.p)


def addmm_mask(x: Tensor, p: float) -> Tensor:
    """The mask Addmm draws for x (M,K)."""
    return torch.native_dropout(torch.ones_like(x), p, True)[1]
