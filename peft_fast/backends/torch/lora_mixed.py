"""lora_mixed by vendor GEMMs: rows are sorted by adapter once, and each adapter's are two products."""

from __future__ import annotations

import torch

# a module, not its names: whoever imports it first imports this one halfway
from peft_fast.backends.torch import lora_linear as vendor


def forward(y, x, As, Bs, biases, spec):
    """y (b, T, N) += s·x·Aᵀ·Bᵀ + s·b_B of each row's adapter, x (b, T, K) or ids (b, T); in the adapters' own dtype."""
    with vendor.no_autocast(y.device.type):
        sorted_already = spec.order == list(range(y.shape[0]))
        at = None if sorted_already else torch.tensor(spec.order, device=y.device)
        xs, ys = (x, y) if sorted_already else (x.index_select(0, at), y.index_select(0, at))
        begin = 0
        for A, B, bias, count, scaling in zip(As, Bs, biases, spec.counts, spec.scalings, strict=True):
            some, end = xs[begin : begin + count], begin + count
            if x.is_floating_point():
                H = vendor.mm(vendor.rows(some).to(A.dtype), A.t(), scaling)
            else:
                # gathered row by row of A: its transpose as a table would be a copy of the whole
                H = A.index_select(1, some.reshape(-1)).t().to(torch.promote_types(A.dtype, torch.float32)) * scaling
            B = B.to(H.dtype)
            z = H @ B.t() if bias is None else torch.addmm(bias, H, B.t(), beta=scaling)
            ys[begin:end].add_(z.view(count, *y.shape[1:]))
            begin = end
        if not sorted_already:
            y.index_copy_(0, at, ys)
