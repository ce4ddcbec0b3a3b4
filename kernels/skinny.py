"""The skinny products: H = s·drop(x)·Aᵀ, D = s·dy·B with dB = dyᵀ·H, and dA = Dᵀ·drop(x).

Each reads its wide operand once. Split work goes to a float32 workspace that a second kernel sums in a fixed order,
so results are the same bits every time. Sizes M of tokens enter as run-time numbers that specialise nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from peft_fast.kernels import tiles
from peft_fast.kernels.device import (
    block_of,
    cdiv,
    column_scales,
    keep_tile,
    kept_scale,
    on,
    precision,
    starts_of,
    target,
)
from peft_fast.kernels.launch import launch
from peft_fast.kernels.split import finalize, slot_of, slots_of, split


@triton.jit(do_not_specialize=["M", "k_blocks"])
def _lora_linear_shrink_kernel(
    x_ptr,
    A_ptr,
    H_ptr,
    work_ptr,
    seed_ptr,
    scales,
    M,
    k_blocks,
    K,
    R,
    x_sm,
    A_sr,
    A_sk,
    H_sm,
    ADAPTER_STARTS: tl.constexpr,
    ADAPTERS: tl.constexpr,
    STARTS: tl.constexpr,
    COUNTS: tl.constexpr,
    OWNERS: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    SLOTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    # slots of one row block are neighbours, so that all but the first find x in the L2 cache
    slot = tl.program_id(0) % SLOTS
    rows = (tl.program_id(0) // SLOTS).to(tl.int64) * BM + tl.arange(0, BM)
    ranks, valid, seed, threshold = slot_of(slot, seed_ptr, STARTS, COUNTS, OWNERS, THRESHOLDS, SLOTS, DROPOUT, BR)

    dtype = H_ptr.dtype.element_ty
    first = tl.program_id(1) * k_blocks
    acc = tl.zeros((BM, BR), tl.float32)
    for block in range(first, min(first + k_blocks, tl.cdiv(K, BK))):
        # from the block's number, so that the compiler sees an aligned column and loads whole vectors
        k = block * BK
        cols = k + tl.arange(0, BK)
        x = tl.load(
            x_ptr + rows[:, None] * x_sm + cols[None, :], mask=(rows < M)[:, None] & (cols < K)[None, :], other=0.0
        )
        if DROPOUT:
            x = tl.where(keep_tile(seed, rows, k, threshold, BM, BK), x, 0.0)
        a = tl.load(
            A_ptr + cols[:, None].to(tl.int64) * A_sk + ranks[None, :] * A_sr,
            mask=(cols < K)[:, None] & valid[None, :],
            other=0.0,
        )
        acc = tl.dot(x.to(dtype), a.to(dtype), acc, input_precision=PRECISION)

    mask = (rows < M)[:, None] & valid[None, :]
    if tl.num_programs(1) == 1:
        acc *= column_scales(ranks, scales, ADAPTER_STARTS, ADAPTERS)[None, :]
        tl.store(H_ptr + rows[:, None] * H_sm + ranks[None, :], acc.to(dtype), mask=mask)
    else:
        work = work_ptr + tl.program_id(1).to(tl.int64) * M * R
        tl.store(work + rows[:, None] * R + ranks[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["M", "m_blocks"])
def _lora_linear_shrink_outer_kernel(
    g_ptr,
    B_ptr,
    H_ptr,
    D_ptr,
    dB_ptr,
    M,
    m_blocks,
    N,
    R,
    g_sm,
    B_sn,
    B_sr,
    H_sm,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    dtype = H_ptr.dtype.element_ty
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    ranks = tl.arange(0, BR)
    b = tl.load(
        B_ptr + cols[:, None].to(tl.int64) * B_sn + ranks[None, :] * B_sr,
        mask=(cols < N)[:, None] & (ranks < R)[None, :],
        other=0.0,
    ).to(dtype)

    first = tl.program_id(1) * m_blocks
    dB = tl.zeros((BN, BR), tl.float32)
    for block in range(first, min(first + m_blocks, tl.cdiv(M, BM))):
        rows = (block * BM + tl.arange(0, BM)).to(tl.int64)
        g = tl.load(
            g_ptr + rows[:, None] * g_sm + cols[None, :], mask=(rows < M)[:, None] & (cols < N)[None, :], other=0.0
        ).to(dtype)
        mask = (rows < M)[:, None] & (ranks < R)[None, :]
        h = tl.load(H_ptr + rows[:, None] * H_sm + ranks[None, :], mask=mask, other=0.0)
        d = tl.dot(g, b, input_precision=PRECISION)
        work = D_ptr + tl.program_id(0).to(tl.int64) * M * R
        tl.store(work + rows[:, None] * R + ranks[None, :], d, mask=mask)
        dB = tl.dot(tl.trans(g), h, dB, input_precision=PRECISION)
    tl.store(
        dB_ptr + tl.program_id(1).to(tl.int64) * N * R + cols[:, None].to(tl.int64) * R + ranks[None, :],
        dB,
        mask=(cols < N)[:, None] & (ranks < R)[None, :],
    )


@triton.jit(do_not_specialize=["M", "m_blocks"])
def _lora_linear_outer_kernel(
    x_ptr,
    D_ptr,
    work_ptr,
    seed_ptr,
    M,
    m_blocks,
    K,
    R,
    x_sm,
    D_sm,
    STARTS: tl.constexpr,
    COUNTS: tl.constexpr,
    OWNERS: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    SLOTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    slot = tl.program_id(0) % SLOTS
    k = tl.program_id(0) // SLOTS * BK
    cols = k + tl.arange(0, BK)
    ranks, valid, seed, threshold = slot_of(slot, seed_ptr, STARTS, COUNTS, OWNERS, THRESHOLDS, SLOTS, DROPOUT, BR)

    first = tl.program_id(1) * m_blocks
    acc = tl.zeros((BR, BK), tl.float32)
    for block in range(first, min(first + m_blocks, tl.cdiv(M, BM))):
        rows = (block * BM + tl.arange(0, BM)).to(tl.int64)
        x = tl.load(
            x_ptr + rows[:, None] * x_sm + cols[None, :], mask=(rows < M)[:, None] & (cols < K)[None, :], other=0.0
        )
        if DROPOUT:
            x = tl.where(keep_tile(seed, rows, k, threshold, BM, BK), x, 0.0)
        d = tl.load(D_ptr + rows[None, :] * D_sm + ranks[:, None], mask=(rows < M)[None, :] & valid[:, None], other=0.0)
        acc = tl.dot(d, x.to(d.dtype), acc, input_precision=PRECISION)
    tl.store(
        work_ptr + tl.program_id(1).to(tl.int64) * R * K + ranks[:, None].to(tl.int64) * K + cols[None, :],
        acc,
        mask=valid[:, None] & (cols < K)[None, :],
    )


def shrink(x, A, seed, ranks, scalings, ps, tf32=False, overrides=None, out=None):
    """x (M, K) with unit column stride, A (R, K), seed (adapters,) int64 | None -> H (M, R) = s·drop(x)·Aᵀ.

    ``out``, with unit column stride, takes H; the product is made in its dtype, which is x's without it.
    """
    (M, K), R = x.shape, A.shape[0]
    H = x.new_empty(M, R) if out is None else out
    if not H.numel():
        return H
    with on(x):
        tile = tiles.pick("shrink", tiles.shape_class("shrink", M, K, 0, R, any(ps)), H.dtype, target().arch, overrides)
        slots = slots_of(ranks, ps, tile, tf32)
        programs = slots.SLOTS * cdiv(M, tile.BM)
        splits, each = split(K, tile.BK, programs)
        work = x.new_empty((splits, M, R) if splits > 1 else 0, dtype=torch.float32)
        scales = tuple(s * kept_scale(p) for s, p in zip(scalings, ps, strict=True))
        launch(
            _lora_linear_shrink_kernel,
            (programs, splits),
            (x, A, H, work, seed, scales),
            (M, each),
            (K, R, x.stride(0), *A.stride(), H.stride(0)),
            (starts_of(ranks), len(ranks), *slots),
            tile,
        )
        if splits > 1:
            finalize(work, H, ranks, scales)
    return H


def shrink_outer(g, B, H, ranks, scalings, dtype, tf32=False, overrides=None, out=None):
    """g (M, N) with unit column stride, B (N, R), H (M, R) -> D (M, R) = s·g·B, dB (N, R) = gᵀ·H in ``dtype``.

    H and ``out``, which takes D, may be columns of wider ones; the products are made in H's dtype.
    One pass over g while the partial sums stay small beside it; past rank 32 two passes move fewer bytes.
    """
    (M, N), R = g.shape, B.shape[1]
    D = H.new_empty(M, R) if out is None else out
    if R > tiles.MOST_SHARED_RANK:
        no = (0.0,) * len(ranks)
        shrink(g, B.t(), None, ranks, scalings, no, tf32, overrides, D)
        return D, outer(g, H, None, ranks, no, dtype, tf32, overrides).t()
    dB = g.new_zeros(N, R, dtype=dtype) if not M else g.new_empty(N, R, dtype=dtype)
    if not M or not dB.numel():
        return D.zero_(), dB
    with on(g):
        shape = tiles.shape_class("shrink_outer", M, 0, N, R, False)
        tile = tiles.pick("shrink_outer", shape, H.dtype, target().arch, overrides)
        slices = cdiv(N, tile.BN)
        chunks, each = split(M, tile.BM, slices)
        D_work = g.new_empty(slices, M, R, dtype=torch.float32)
        dB_work = g.new_empty(chunks, N, R, dtype=torch.float32)
        launch(
            _lora_linear_shrink_outer_kernel,
            (slices, chunks),
            (g, B, H, D_work, dB_work),
            (M, each),
            (N, R, g.stride(0), *B.stride(), H.stride(0)),
            (precision(tf32), tile.BM, tile.BN, block_of(R, 16, tile.BR)),
            tile,
        )
        finalize(D_work, D, ranks, scalings)
        finalize(dB_work, dB, ranks, (1.0,) * len(ranks))
    return D, dB


def outer(x, D, seed, ranks, ps, dtype, tf32=False, overrides=None):
    """x (M, K) and D (M, R) with unit column stride -> dA (R, K) = Dᵀ·drop(x) in ``dtype``, the product in D's."""
    (M, K), R = x.shape, D.shape[1]
    dA = x.new_empty(R, K, dtype=dtype)
    if not M or not dA.numel():
        return dA.zero_()
    with on(x):
        tile = tiles.pick("outer", tiles.shape_class("outer", M, K, 0, R, any(ps)), D.dtype, target().arch, overrides)
        slots = slots_of(ranks, ps, tile, tf32)
        programs = slots.SLOTS * cdiv(K, tile.BK)
        chunks, each = split(M, tile.BM, programs)
        work = x.new_empty(chunks, R, K, dtype=torch.float32)
        launch(
            _lora_linear_outer_kernel,
            (programs, chunks),
            (x, D, work, seed),
            (M, each),
            (K, R, x.stride(0), D.stride(0)),
            slots,
            tile,
        )
        finalize(work, dA, ranks, tuple(map(kept_scale, ps)), ranks_first=True)
    return dA
