"""y_e = x_e·W_eᵀ + bias_e + H_e·B_eᵀ of all experts as one launch, dx as one, and the skinny products beside them.

Rows lie expert after expert. Which rows a program has follows from the experts' counts, which it reads on the device,
so the host waits for nothing; grids cover the worst routing. A row that is no expert's gives NaN.
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
    low_rank_part,
    on,
    precision,
    starts_of,
    target,
)
from peft_fast.kernels.gemm import add_strips, place
from peft_fast.kernels.launch import launch
from peft_fast.kernels.tiles import Tile

# where experts have fewer rows than this on average, wide blocks would be mostly empty
MANY = 96
FEW = {
    "sm80": Tile(64, 128, 64, 4, 3, 8, BR=32),
    "sm86": Tile(64, 128, 64, 4, 3, 8, BR=32),
    "sm90": Tile(64, 128, 64, 4, 4, 8, BR=32),
    "sm100": Tile(64, 128, 64, 4, 4, 8, BR=32),
    "hip": Tile(64, 128, 64, 4, 2, 8, BR=32),
    "interpreter": Tile(16, 128, 64, 4, 1, 3),
}
# no mask is made here, so columns need not come in groups of 128
SHRINK = Tile(64, 0, 64, num_warps=4, num_stages=3, BR=64)
# where lora_linear's tile of float32, beside pointers to gathered rows, spills
FLOAT = {"sm100": Tile(32, 64, 16, 4, 3, 8, BR=16)}
COLLECT = Tile(4, 0, 256, num_warps=4, num_stages=1)


@triton.jit
def _counts(counts_ptr, S, E, BE: tl.constexpr):
    """Rows of each expert (BE,), behind them those that are no expert's."""
    at = tl.arange(0, BE)
    counts = tl.load(counts_ptr + at, mask=at < E, other=0).to(tl.int32)
    return tl.where(at == E, S - tl.sum(counts, 0), counts)


@triton.jit
def _owner(counts, blocks, block, BM: tl.constexpr, BE: tl.constexpr):
    """counts, blocks (BE,) of each expert, number of a block -> the expert, the block's rows (BM,), and their end."""
    at = tl.arange(0, BE)
    e = tl.sum((tl.cumsum(blocks, 0) <= block).to(tl.int32), 0)
    before = at < e
    begin, first = tl.sum(tl.where(before, counts, 0), 0), tl.sum(tl.where(before, blocks, 0), 0)
    end = begin + tl.sum(tl.where(at == e, counts, 0), 0)
    return e, (begin + (block - first) * BM + tl.arange(0, BM)).to(tl.int64), end


@triton.jit
def _read(sources_ptr, rows, end, TOKENS: tl.constexpr):
    """Rows (BM,) -> the rows of x that they read; past the end, some that are there."""
    if TOKENS:
        return tl.load(sources_ptr + rows, mask=rows < end, other=0)
    else:
        return tl.minimum(rows, end - 1)


@triton.jit(do_not_specialize=["S"])
def _lora_experts_shrink_kernel(
    x_ptr,
    A_ptr,
    H_ptr,
    sources_ptr,
    counts_ptr,
    scales,
    S,
    E,
    K,
    R,
    x_sm,
    A_se,
    A_sr,
    A_sk,
    H_sm,
    STARTS: tl.constexpr,
    ADAPTERS: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    BE: tl.constexpr,
):
    # rank columns of one row block are neighbours, so that all but the first find x in the L2 cache
    slots = tl.cdiv(R, BR)
    block, ranks = tl.program_id(0) // slots, tl.program_id(0) % slots * BR + tl.arange(0, BR)
    counts = _counts(counts_ptr, S, E, BE)
    e, rows, end = _owner(counts, tl.cdiv(counts, BM), block, BM, BE)
    if e < E:
        dtype = x_ptr.dtype.element_ty
        valid, inside = ranks < R, rows < end
        x_ptrs = x_ptr + _read(sources_ptr, rows, end, TOKENS)[:, None] * x_sm
        A_ptrs = A_ptr + e.to(tl.int64) * A_se + ranks[None, :] * A_sr
        acc = tl.zeros((BM, BR), tl.float32)
        for first in range(0, K, BK):
            cols = first + tl.arange(0, BK)
            x = tl.load(x_ptrs + cols[None, :], mask=inside[:, None] & (cols < K)[None, :], other=0.0)
            a = tl.load(
                A_ptrs + cols[:, None].to(tl.int64) * A_sk, mask=(cols < K)[:, None] & valid[None, :], other=0.0
            )
            acc = tl.dot(x, a.to(dtype), acc, input_precision=PRECISION)
        acc *= column_scales(ranks, scales, STARTS, ADAPTERS)[None, :]
        H_ptrs = H_ptr + rows[:, None] * H_sm + ranks[None, :]
        tl.store(H_ptrs, acc.to(H_ptr.dtype.element_ty), mask=inside[:, None] & valid[None, :])


@triton.jit(do_not_specialize=["S"])
def _lora_experts_product_kernel(
    x_ptr,
    W_ptr,
    bias_ptr,
    H_ptr,
    B_ptr,
    y_ptr,
    sources_ptr,
    counts_ptr,
    S,
    E,
    N,
    K,
    R,
    x_sm,
    W_se,
    W_sn,
    W_sk,
    bias_se,
    H_sm,
    B_se,
    B_sn,
    B_sr,
    y_sm,
    RANKS: tl.constexpr,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GM: tl.constexpr,
    BE: tl.constexpr,
):
    counts = _counts(counts_ptr, S, E, BE)
    blocks = tl.cdiv(counts, BM)
    tiles_m, tiles_n = tl.sum(blocks, 0), tl.cdiv(N, BN)
    if tl.program_id(0) < tiles_m * tiles_n:
        block, block_n = place(tl.program_id(0), tiles_m, tiles_n, GM)
        e, rows, end = _owner(counts, blocks, block, BM, BE)
        nobody = e == E
        e = tl.minimum(e, E - 1).to(tl.int64)
        n = block_n * BN
        cols = n + tl.arange(0, BN)
        if RANKS:
            B = B_ptr + e * B_se
            acc = low_rank_part(H_ptr, B, rows, n, end, N, H_sm, B_sr, B_sn, 0, R, LOW_PRECISION, BM, BN, BR)
        else:
            acc = tl.zeros((BM, BN), tl.float32)
        # rows and columns past the end read others: what they give is not stored
        x_ptrs = x_ptr + _read(sources_ptr, rows, end, TOKENS)[:, None] * x_sm + tl.arange(0, BK)[None, :]
        W_ptrs = W_ptr + e * W_se + (cols % N).to(tl.int64)[None, :] * W_sn
        W_ptrs += tl.arange(0, BK)[:, None].to(tl.int64) * W_sk
        acc = add_strips(acc, x_ptrs, W_ptrs, K, W_sk, EVEN_K, PRECISION, BK)
        if BIAS:
            acc += tl.load(bias_ptr + e * bias_se + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        acc = tl.where(nobody, float("nan"), acc)
        y_ptrs = y_ptr + rows[:, None] * y_sm + cols[None, :]
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(rows < end)[:, None] & (cols < N)[None, :])


@triton.jit(do_not_specialize=["S"])
def _lora_experts_outer_kernel(
    x_ptr,
    D_ptr,
    out_ptr,
    sources_ptr,
    counts_ptr,
    S,
    E,
    K,
    R,
    x_sm,
    D_sm,
    out_se,
    out_sr,
    out_sk,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    BE: tl.constexpr,
):
    slots = tl.cdiv(R, BR)
    cols = tl.program_id(0) // slots * BK + tl.arange(0, BK)
    ranks = tl.program_id(0) % slots * BR + tl.arange(0, BR)
    e, at = tl.program_id(1), tl.arange(0, BE)
    counts = _counts(counts_ptr, S, E, BE)
    begin = tl.sum(tl.where(at < e, counts, 0), 0)
    end = begin + tl.sum(tl.where(at == e, counts, 0), 0)
    acc = tl.zeros((BR, BK), tl.float32)
    for first in range(begin, end, BM):
        rows = (first + tl.arange(0, BM)).to(tl.int64)
        inside = rows < end
        d = tl.load(
            D_ptr + rows[None, :] * D_sm + ranks[:, None], mask=inside[None, :] & (ranks < R)[:, None], other=0.0
        )
        x = tl.load(
            x_ptr + _read(sources_ptr, rows, end, TOKENS)[:, None] * x_sm + cols[None, :],
            mask=inside[:, None] & (cols < K)[None, :],
            other=0.0,
        )
        acc = tl.dot(d, x.to(d.dtype), acc, input_precision=PRECISION)
    out = out_ptr + e.to(tl.int64) * out_se + ranks[:, None].to(tl.int64) * out_sr + cols[None, :].to(tl.int64) * out_sk
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(ranks < R)[:, None] & (cols < K)[None, :])


@triton.jit(do_not_specialize=["T"])
def _lora_experts_collect_kernel(z_ptr, inverse_ptr, y_ptr, T, k, N, z_sm, y_sm, BM: tl.constexpr, BN: tl.constexpr):
    blocks = tl.cdiv(N, BN)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    mask = (rows < T)[:, None] & (cols < N)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for j in range(k):
        at = tl.load(inverse_ptr + rows * k + j, mask=rows < T, other=0).to(tl.int64)
        acc += tl.load(z_ptr + at[:, None] * z_sm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows[:, None] * y_sm + cols[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


def shrink(x, A, counts, sources, ranks, scalings, dtype, tf32=False, overrides=None):
    """x (S, K), or (T, K) of which ``sources`` (S,) names each row, columns adjacent, A (E, R, K), counts (E,) int64
    -> H (S, R) = s·x_e·A_eᵀ in ``dtype``.

    Rows of H that are no expert's are not written to.
    """
    S, (E, R, K) = _rows(x, sources), A.shape
    H = x.new_empty(S, R, dtype=dtype)
    if not H.numel():
        return H
    with on(x):
        tile = _skinny("shrink", R, x.dtype, overrides)
        BR = block_of(R, 16, tile.BR)
        launch(
            _lora_experts_shrink_kernel,
            (most_blocks(S, E, tile.BM) * cdiv(R, BR),),
            (x, A, H, sources, counts, tuple(scalings)),
            (S,),
            (E, K, R, x.stride(0), *A.stride(), H.stride(0)),
            (starts_of(ranks), len(ranks), sources is not None, precision(tf32), tile.BM, tile.BK, BR, _experts(E)),
            tile,
        )
    return H


def product(x, W, bias, H, B, counts, sources, tf32=False, overrides=None):
    """x and counts as in shrink, W (E, N, K), bias (E, N) | None, H (S, R), B (E, N, R)
    -> y (S, N) = x_e·W_eᵀ + bias_e + H_e·B_eᵀ in x's dtype, the low-rank product made in H's.

    W and B may have any strides: with g, W turned, D and A turned in the places of x, W, H and B this is dx.
    """
    S, (E, N, K), R = _rows(x, sources), W.shape, B.shape[2]
    y = x.new_empty(S, N)
    if not y.numel():
        return y
    with on(x):
        tile = product_tile(S, E, N, K, R, x.dtype, overrides)
        launch(
            _lora_experts_product_kernel,
            (most_blocks(S, E, tile.BM) * cdiv(N, tile.BN),),
            (x, W, bias, H, B, y, sources, counts),
            (S,),
            (
                E,
                N,
                K,
                R,
                x.stride(0),
                *W.stride(),
                0 if bias is None else bias.stride(0),
                H.stride(0) if R else 0,
                *(B.stride() if R else (0, 0, 0)),
                y.stride(0),
            ),
            (
                R > 0,
                bias is not None,
                sources is not None,
                K % tile.BK == 0,
                precision(tf32),
                _low_precision(x.dtype, tf32),
                tile.BM,
                tile.BN,
                tile.BK,
                block_of(R, 16, tile.BR),
                tile.GM,
                _experts(E),
            ),
            tile,
        )
    return y


def outer(x, D, counts, sources, out, tf32=False, overrides=None):
    """x and counts as in shrink, D (S, R), columns adjacent -> out (E, R, K) = D_eᵀ·x_e.

    The product is made in D's dtype; ``out`` may have any strides. An expert without rows has zeros.
    """
    S, (E, R, K) = _rows(x, sources), out.shape
    if not out.numel():
        return out
    with on(x):
        tile = _skinny("outer", R, D.dtype, overrides)
        if sources is not None:  # what is read through another read is one stage behind it
            tile = tile._replace(num_stages=tile.num_stages + 1)
        BR = block_of(R, 16, tile.BR)
        launch(
            _lora_experts_outer_kernel,
            (cdiv(K, tile.BK) * cdiv(R, BR), E),
            (x, D, out, sources, counts),
            (S,),
            (E, K, R, x.stride(0), D.stride(0), *out.stride()),
            (sources is not None, _low_precision(x.dtype, tf32), tile.BM, tile.BK, BR, _experts(E)),
            tile,
        )
    return out


def collect(z, inverse, T):
    """z (S, N) with unit column stride -> y (T, N), the sum over each token's rows, in float32 and rounded once."""
    N = z.shape[1]
    y = z.new_empty(T, N)
    if y.numel():
        with on(z):
            launch(
                _lora_experts_collect_kernel,
                (cdiv(T, COLLECT.BM) * cdiv(N, COLLECT.BK),),
                (z, inverse, y),
                (T,),
                (inverse.shape[0] // T, N, z.stride(0), y.stride(0)),
                (COLLECT.BM, COLLECT.BK),
                COLLECT,
            )
    return y


def product_tile(S, E, N, K, R, dtype, overrides=None):
    """The tile of ``product``: lora_linear's own, or one with smaller blocks of rows where experts have few."""
    arch = target().arch
    family = tiles.family(arch)
    if dtype == torch.float32 and family in FLOAT:
        return FLOAT[family]
    if S < MANY * E and dtype != torch.float32:
        return FEW[family]
    return tiles.pick("fused", tiles.shape_class("fused", S, K, N, R), dtype, arch, overrides)


def _skinny(op, R, dtype, overrides):
    arch = target().arch
    if op == "shrink" and dtype != torch.float32 and arch != "interpreter":
        # tensor memory's sums pass through registers, of which four warps have too few
        return SHRINK._replace(num_warps=8) if tiles.family(arch) == "sm100" and R > 16 else SHRINK
    return tiles.pick(op, tiles.shape_class(op, 0, 0, 0, R), dtype, arch, overrides)


def _low_precision(dtype, tf32):
    """How low-rank rows are multiplied: beside float16 they are float32, of which TF32 keeps as many digits."""
    return precision(tf32 or dtype == torch.float16)


def _rows(x, sources):
    return x.shape[0] if sources is None else sources.shape[0]


def most_blocks(S, E, BM):
    """Blocks of BM rows that S rows of E experts, and of none, are at most."""
    groups = min(E + 1, S)
    return groups + (S - groups) // BM


def _experts(E):
    return block_of(E + 1, 16, 1 << 30)
