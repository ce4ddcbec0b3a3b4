"""What DoRA does around vendor GEMMs: y in one pass over the products, and one pass over dy for its gradients.

y = base + (c − 1)∘P + c∘(H·Bᵀ), where base = x·Wᵀ + bias, and P = drop(x)·Wᵀ, which without dropout is base − bias.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from peft_fast.kernels.device import block_of, cdiv, keep_tile, kept_scale, low_rank_part, on, precision
from peft_fast.kernels.launch import launch
from peft_fast.kernels.split import split
from peft_fast.kernels.tiles import Tile

# passes over memory: one tile each, for every dtype
MIX = Tile(32, 128, 0, num_warps=8, num_stages=1, BR=32)
SCALE = Tile(32, 128, 0, num_warps=4, num_stages=3)
DROP = Tile(32, 0, 128, num_warps=4, num_stages=1)


@triton.jit(do_not_specialize=["M"])
def _dora_linear_mix_kernel(
    base_ptr,
    P_ptr,
    H_ptr,
    B_ptr,
    c_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    R,
    H_sm,
    B_sn,
    B_sr,
    DROPS: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    blocks = tl.cdiv(N, BN)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * BM + tl.arange(0, BM)
    first = tl.program_id(0) % blocks * BN
    cols = first + tl.arange(0, BN)
    inside = cols < N
    mask = (rows < M)[:, None] & inside[None, :]
    low = low_rank_part(H_ptr, B_ptr, rows, first, M, N, H_sm, B_sr, B_sn, 0, R, PRECISION, BM, BN, BR)
    at = rows[:, None] * N + cols[None, :]
    base = tl.load(base_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if DROPS:
        plain = tl.load(P_ptr + at, mask=mask, other=0.0).to(tl.float32)
    elif BIAS:
        plain = base - tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    else:
        plain = base
    c = tl.load(c_ptr + cols, mask=inside, other=1.0)[None, :]
    # as PEFT adds it up: with c = 1 and no adapter it is the base bit for bit
    y = low * c + plain * (c - 1) + base
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "m_blocks"])
def _dora_linear_scale_kernel(
    g_ptr,
    P_ptr,
    by_ptr,
    bias_ptr,
    out_ptr,
    dm_ptr,
    db_ptr,
    M,
    m_blocks,
    N,
    g_sm,
    BIAS: tl.constexpr,
    SCALES: tl.constexpr,
    DM: tl.constexpr,
    DB: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = cols < N
    by = tl.load(by_ptr + cols, mask=inside, other=0.0)[None, :]
    if BIAS:
        bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    dm = tl.zeros((BN,), tl.float32)
    db = tl.zeros((BN,), tl.float32)
    first = tl.program_id(1) * m_blocks
    for block in range(first, min(first + m_blocks, tl.cdiv(M, BM))):
        rows = (block * BM + tl.arange(0, BM)).to(tl.int64)
        mask = (rows < M)[:, None] & inside[None, :]
        g = tl.load(g_ptr + rows[:, None] * g_sm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        at = rows[:, None] * N + cols[None, :]
        if SCALES:
            tl.store(out_ptr + at, (g * by).to(out_ptr.dtype.element_ty), mask=mask)
        if DM:
            plain = tl.load(P_ptr + at, mask=mask, other=0.0).to(tl.float32)
            if BIAS:
                plain -= bias
            dm += tl.sum(g * plain, 0)
        if DB:
            db += tl.sum(g, 0)
    to = tl.program_id(1).to(tl.int64) * N + cols
    if DM:
        tl.store(dm_ptr + to, dm, mask=inside)
    if DB:
        tl.store(db_ptr + to, db, mask=inside)


@triton.jit(do_not_specialize=["M"])
def _dora_linear_drop_kernel(
    x_ptr, out_ptr, seed_ptr, scales, M, K, x_sm, THRESHOLD: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr
):
    blocks = tl.cdiv(K, BK)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * BM + tl.arange(0, BM)
    first = tl.program_id(0) % blocks * BK
    cols = first + tl.arange(0, BK)
    mask = (rows < M)[:, None] & (cols < K)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_sm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    keep = keep_tile(tl.load(seed_ptr), rows, first, THRESHOLD, BM, BK)
    x = tl.where(keep, x * scales[0], 0.0)
    tl.store(out_ptr + rows[:, None] * K + cols[None, :], x.to(out_ptr.dtype.element_ty), mask=mask)


def mix(base, P, H, B, c, bias, tf32=False):
    """base and P (M, N) dense, P None without dropout, H (M, r), B (N, r), c (N,) float32, bias (N,) -> y (M, N)."""
    y = torch.empty_like(base)
    if base.numel():
        (M, N), R = base.shape, B.shape[1]
        with on(base):
            launch(
                _dora_linear_mix_kernel,
                (cdiv(M, MIX.BM) * cdiv(N, MIX.BN),),
                (base, base if P is None else P, H, B, c, bias, y),
                (M,),
                (N, R, H.stride(0), *B.stride()),
                (
                    P is not None,
                    bias is not None,
                    precision(tf32),
                    MIX.BM,
                    MIX.BN,
                    block_of(R, 16, MIX.BR),
                ),
                MIX,
            )
    return y


def scale(g, P, by, bias, scales, dm, db):
    """g (M, N) with unit column stride, P (M, N) dense, by (N,) float32 -> by∘g (M, N), Σ g∘(P − bias), Σ g of tokens.

    The sums are (N,) float32, bias (N,) is what P has in it, or None; not made is what ``scales``, ``dm``, ``db`` deny.
    """
    M, N = g.shape
    out = g.new_empty(g.shape if scales else 0)
    with on(g):
        chunks, each = split(M, SCALE.BM, max(1, cdiv(N, SCALE.BN))) if M else (0, 0)
        sums = [g.new_empty((chunks, N) if need else 0, dtype=torch.float32) for need in (dm, db)]
        if g.numel():
            launch(
                _dora_linear_scale_kernel,
                (cdiv(N, SCALE.BN), chunks),
                (g, P, by, bias, out, *sums),
                (M, each),
                (N, g.stride(0)),
                (bias is not None, scales, dm, db, SCALE.BM, SCALE.BN),
                SCALE,
            )
    return out if scales else None, *(s.sum(0) if need else None for s, need in zip(sums, (dm, db), strict=True))


def drop(x, seed, p):
    """x (M, K) with unit column stride, seed (1,) int64 -> mask∘x/(1 − p) (M, K)."""
    (M, K), out = x.shape, x.new_empty(x.shape)
    if x.numel():
        with on(x):
            launch(
                _dora_linear_drop_kernel,
                (cdiv(M, DROP.BM) * cdiv(K, DROP.BK),),
                (x, out, seed, (kept_scale(p),)),
                (M,),
                (K, x.stride(0)),
                (round(p * 65536), DROP.BM, DROP.BK),
                DROP,
            )
    return out
