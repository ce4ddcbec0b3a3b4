"""y = x·Wᵀ + bias + Σ s·(x·Aᵀ)·Bᵀ for few tokens and no gradients: W is read once, as it lies in memory.

The rows of A are more columns of y: one launch makes partial sums of x·Wᵀ and of H = x·Aᵀ alike, a second one adds
them in order, multiplies H by B and rounds once. Adapters keep their own dtype; H and all sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from peft_fast.kernels import tiles
from peft_fast.kernels.device import cdiv, column_scales, on, precision, starts_of, target
from peft_fast.kernels.launch import launch
from peft_fast.kernels.split import split
from peft_fast.kernels.tiles import Tile

# rank columns that a program holds at once
RANKS = 16
# columns of y that a program of the second launch makes
FINISH = Tile(16, 64, 0, num_warps=4, num_stages=2)


@triton.jit
def _product(
    x_ptr,
    W_ptr,
    rows,
    cols,
    first,
    last,
    M,
    N,
    K,
    x_sm,
    W_sn,
    W_sk,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """x (M, K), W (N, K) -> x·Wᵀ at (rows, cols) over blocks first … last of K, in W's dtype, (BM, BN) float32."""
    acc = tl.zeros((BM, BN), tl.float32)
    for block in range(first, last):
        # from the block's number, so that the compiler sees an aligned column and loads whole vectors
        ks = block * BK + tl.arange(0, BK)
        x = tl.load(x_ptr + rows[:, None] * x_sm + ks[None, :], mask=(rows < M)[:, None] & (ks < K)[None, :], other=0.0)
        w = tl.load(
            W_ptr + cols[None, :].to(tl.int64) * W_sn + ks[:, None].to(tl.int64) * W_sk,
            mask=(cols < N)[None, :] & (ks < K)[:, None],
            other=0.0,
        )
        acc = tl.dot(x.to(w.dtype), w, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["M", "k_blocks"])
def _lora_decode_partial_kernel(
    x_ptr,
    W_ptr,
    A_ptr,
    work_ptr,
    M,
    k_blocks,
    N,
    K,
    R,
    x_sm,
    W_sn,
    W_sk,
    A_sr,
    A_sk,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    # row blocks of the same columns are neighbours, so that all but the first find W in the L2 cache
    row_blocks, col_blocks = tl.cdiv(M, BM), tl.cdiv(N, BN)
    rows = (tl.program_id(0) % row_blocks).to(tl.int64) * BM + tl.arange(0, BM)
    block = tl.program_id(0) // row_blocks
    first = tl.program_id(1) * k_blocks
    last = min(first + k_blocks, tl.cdiv(K, BK))
    work = work_ptr + (tl.program_id(1).to(tl.int64) * M + rows[:, None]) * (N + R)
    if block < col_blocks:
        cols = block * BN + tl.arange(0, BN)
        y = _product(x_ptr, W_ptr, rows, cols, first, last, M, N, K, x_sm, W_sn, W_sk, PRECISION, BM, BN, BK)
        tl.store(work + cols[None, :], y, mask=(rows < M)[:, None] & (cols < N)[None, :])
    else:
        ranks = (block - col_blocks) * BR + tl.arange(0, BR)
        h = _product(x_ptr, A_ptr, rows, ranks, first, last, M, R, K, x_sm, A_sr, A_sk, PRECISION, BM, BR, BK)
        tl.store(work + N + ranks[None, :], h, mask=(rows < M)[:, None] & (ranks < R)[None, :])


@triton.jit(do_not_specialize=["M", "splits"])
def _lora_decode_finish_kernel(
    work_ptr,
    B_ptr,
    bias_ptr,
    y_ptr,
    scales,
    M,
    splits,
    N,
    R,
    B_sn,
    B_sr,
    y_sm,
    STARTS: tl.constexpr,
    ADAPTERS: tl.constexpr,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    blocks = tl.cdiv(N, BN)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    step = M.to(tl.int64) * (N + R)
    own = work_ptr + rows[:, None] * (N + R)
    acc = tl.zeros((BM, BN), tl.float32)
    at = own + cols[None, :]
    for _ in range(splits):
        acc += tl.load(at, mask=mask, other=0.0)
        at += step
    for r in range(0, R, BR):
        ranks = r + tl.arange(0, BR)
        h = tl.zeros((BM, BR), tl.float32)
        low_at = own + N + ranks[None, :]
        for _ in range(splits):
            h += tl.load(low_at, mask=(rows < M)[:, None] & (ranks < R)[None, :], other=0.0)
            low_at += step
        h *= column_scales(ranks, scales, STARTS, ADAPTERS)[None, :]
        b = tl.load(
            B_ptr + cols[None, :].to(tl.int64) * B_sn + ranks[:, None] * B_sr,
            mask=(cols < N)[None, :] & (ranks < R)[:, None],
            other=0.0,
        )
        acc = tl.dot(h, b.to(tl.float32), acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + rows[:, None] * y_sm + cols[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


def decode(x, W, bias, A, B, ranks, scalings, tf32=False, overrides=None):
    """x (M, K) with unit column stride, W (N, K), bias (N,) dense | None, A (R, K), B (N, R) -> y (M, N) in x's dtype.

    W is of x's dtype, A of that or of a wider one; W, A and B may have any strides. Without ranks it is the base's.
    """
    (M, K), N, R = x.shape, W.shape[0], A.shape[0]
    y = x.new_empty(M, N)
    if not y.numel():
        return y
    with on(x):
        tile = tiles.pick("decode", tiles.shape_class("decode", M, K, N, R), x.dtype, target().arch, overrides)
        programs = cdiv(M, tile.BM) * (cdiv(N, tile.BN) + cdiv(R, RANKS))
        splits, each = split(K, tile.BK, programs)
        work = x.new_empty(splits, M, N + R, dtype=torch.float32)
        launch(
            _lora_decode_partial_kernel,
            (programs, splits),
            (x, W, A, work),
            (M, each),
            (N, K, R, x.stride(0), *W.stride(), *A.stride()),
            (precision(tf32), tile.BM, tile.BN, tile.BK, RANKS),
            tile,
        )
        launch(
            _lora_decode_finish_kernel,
            (cdiv(M, FINISH.BM) * cdiv(N, FINISH.BN),),
            (work, B, bias, y, tuple(scalings)),
            (M, splits),
            (N, R, *B.stride(), y.stride(0)),
            (starts_of(tuple(ranks)), len(ranks), bias is not None, FINISH.BM, FINISH.BN, RANKS),
            FINISH,
        )
    return y
