"""What the kernels of size M·N or M·K share: the order of their tiles, and a product added to an accumulator."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(tile, tiles_m, tiles_n, GM: tl.constexpr):
    """Number of a tile -> its block of rows and its block of columns.

    GM row blocks go through the same columns of W before the next ones.
    """
    group = tile // (GM * tiles_n) * GM
    height = min(tiles_m - group, GM)
    return group + tile % (GM * tiles_n) % height, tile % (GM * tiles_n) // height


@triton.jit
def add_strips(acc, x_ptrs, W_ptrs, K, W_sk, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr):
    """x_ptrs (BM, BK), W_ptrs (BK, BN) at the first of K columns -> acc (BM, BN) + x·Wᵀ; those of x are neighbours."""
    for k in range(0, K, BK):
        if EVEN_K:
            xt, wt = tl.load(x_ptrs), tl.load(W_ptrs)
        else:
            inside = k + tl.arange(0, BK) < K
            xt = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
            wt = tl.load(W_ptrs, mask=inside[:, None], other=0.0)
        acc = tl.dot(xt, wt, acc, input_precision=PRECISION)
        x_ptrs += BK
        W_ptrs += BK * W_sk
    return acc


@triton.jit
def add_product(
    acc,
    x,
    W,
    m,
    n,
    M,
    N,
    K,
    x_sm,
    W_sn,
    W_sk,
    TMA: tl.constexpr,
    K_LAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """x (M, K), W (N, K), pointers or descriptors, acc (BM, BN) -> acc + x·Wᵀ at (m … m + BM, n … n + BN)."""
    if TMA:
        for k in range(0, K, BK):
            xt = x.load([m, k])
            wt = W.load([n, k]).T if K_LAST else W.load([k, n])
            acc = tl.dot(xt, wt, acc, input_precision=PRECISION)
    else:
        # rows and columns past the end wrap around: what they give is not stored
        rows = ((m + tl.arange(0, BM)) % M).to(tl.int64)
        cols = ((n + tl.arange(0, BN)) % N).to(tl.int64)
        x_ptrs = x + rows[:, None] * x_sm + tl.arange(0, BK)[None, :]
        W_ptrs = W + cols[None, :] * W_sn + tl.arange(0, BK)[:, None].to(tl.int64) * W_sk
        acc = add_strips(acc, x_ptrs, W_ptrs, K, W_sk, EVEN_K, PRECISION, BK)
    return acc
