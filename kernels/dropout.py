"""mask (M, K): the definition of peft_fast/reference/dropout.py, tile by tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from peft_fast.kernels.device import cdiv, keep_tile, on


@triton.jit(do_not_specialize=["M", "threshold"])
def _dropout_mask_kernel(out_ptr, seed_ptr, M, K, threshold, BM: tl.constexpr, BK: tl.constexpr):
    blocks = tl.cdiv(K, BK)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * BM + tl.arange(0, BM)
    first = tl.program_id(0) % blocks * BK
    cols = first + tl.arange(0, BK)
    keep = keep_tile(tl.load(seed_ptr), rows, first, threshold, BM, BK)
    tl.store(
        out_ptr + rows[:, None] * K + cols[None, :], keep.to(tl.int8), mask=(rows < M)[:, None] & (cols < K)[None, :]
    )


def dropout_mask(seed, M, K, p):
    """seed () int64 -> bool (M, K), True = kept."""
    out = torch.empty(M, K, dtype=torch.bool, device=seed.device)
    if out.numel():
        BM, BK = 32, 128
        with on(seed):
            grid = (cdiv(M, BM) * cdiv(K, BK),)
            _dropout_mask_kernel[grid](out.view(torch.int8), seed, M, K, round(p * 65536), BM=BM, BK=BK)
    return out
