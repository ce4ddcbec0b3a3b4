"""y = x·Wᵀ + H·Bᵀ + bias, and dx = g·W + Σ mask∘(D·A)/(1 − p), each as one GEMM (plan `fused`).

For plan `accumulate`, `expand` writes the second term of dx, into which the vendor's GEMM then adds the first.

The adapter's product is the accumulator's first value: r more columns in the K loop, and in backward the mask is
applied to it while the accumulator holds nothing else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from peft_fast.kernels import tiles
from peft_fast.kernels.device import cdiv, low_rank_tile, on, parts_of, precision, rank_block, target
from peft_fast.kernels.gemm import add_product, place
from peft_fast.kernels.launch import launch


@triton.jit(do_not_specialize=["M"])
def _lora_linear_expand_kernel(
    D_ptr,
    A_ptr,
    out_ptr,
    seed_ptr,
    scales,
    M,
    K,
    D_sm,
    A_sr,
    A_sk,
    out_sm,
    STARTS: tl.constexpr,
    COUNTS: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    blocks = tl.cdiv(K, BK)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * BM + tl.arange(0, BM)
    first = tl.program_id(0) % blocks * BK
    acc = low_rank_tile(
        D_ptr,
        A_ptr,
        seed_ptr,
        scales,
        rows,
        first,
        M,
        K,
        D_sm,
        A_sr,
        A_sk,
        STARTS,
        COUNTS,
        THRESHOLDS,
        PARTS,
        PRECISION,
        BM,
        BK,
        BR,
    )
    cols = first + tl.arange(0, BK)
    out = out_ptr + rows[:, None] * out_sm + cols[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (cols < K)[None, :])


@triton.jit(do_not_specialize=["M"])
def _lora_linear_fused_kernel(
    x,
    W,
    bias_ptr,
    H_ptr,
    B_ptr,
    y_ptr,
    seed_ptr,
    scales,
    M,
    N,
    K,
    x_sm,
    W_sn,
    W_sk,
    H_sm,
    B_sn,
    B_sr,
    y_sm,
    STARTS: tl.constexpr,
    COUNTS: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    TMA: tl.constexpr,
    K_LAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GM: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        block_m, block_n = place(tile, tiles_m, tiles_n, GM)
        m, n = block_m * BM, block_n * BN
        rows = (m + tl.arange(0, BM)).to(tl.int64)
        cols = n + tl.arange(0, BN)

        acc = low_rank_tile(
            H_ptr,
            B_ptr,
            seed_ptr,
            scales,
            rows,
            n,
            M,
            N,
            H_sm,
            B_sr,
            B_sn,
            STARTS,
            COUNTS,
            THRESHOLDS,
            PARTS,
            PRECISION,
            BM,
            BN,
            BR,
        )
        acc = add_product(acc, x, W, m, n, M, N, K, x_sm, W_sn, W_sk, TMA, K_LAST, EVEN_K, PRECISION, BM, BN, BK)
        if BIAS:
            acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        y_ptrs = y_ptr + rows[:, None] * y_sm + cols[None, :]
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :])


def expand(D, A, seed, ranks, ps, dtype, tf32=False, overrides=None):
    """D (M, R), A (R, K) -> (M, K) in ``dtype``: Σ over adapters of mask∘(D·A)/(1 − p), rounded once."""
    (M, R), K = D.shape, A.shape[1]
    out = D.new_empty(M, K, dtype=dtype)
    if not out.numel():
        return out
    with on(D):
        shape = tiles.shape_class("expand", M, K, 0, R, any(ps))
        tile = tiles.pick("expand", shape, D.dtype, target().arch, overrides)
        parts = parts_of(ranks, ps)
        launch(
            _lora_linear_expand_kernel,
            (cdiv(M, tile.BM) * cdiv(K, tile.BK),),
            (D, A, out, seed, parts.scales),
            (M,),
            (K, D.stride(0), *A.stride(), out.stride(0)),
            (
                *parts[:3],
                len(parts.starts),
                precision(tf32),
                tile.BM,
                tile.BK,
                rank_block(parts, tile.BR),
            ),
            tile,
        )
    return out


def fused(x, W, bias, H, B, seed, ranks, ps, dtype, tf32=False, overrides=None):
    """x (M, K) with unit column stride, W (N, K), bias (N,) dense | None, H (M, R), B (N, R) -> y (M, N) in ``dtype``.

    y = x·Wᵀ + Σ over adapters of mask∘(H·Bᵀ)/(1 − p) + bias. W and B may have any strides: with g, Wᵀ, D and Aᵀ in
    the places of x, W, H and B this is dx. Without ranks it is the frozen layer.
    """
    (M, K), N = x.shape, W.shape[0]
    y = x.new_empty(M, N, dtype=dtype)
    if not y.numel():
        return y
    with on(x):
        shape = tiles.shape_class("fused", M, K, N, sum(ranks), any(ps))
        tile = tiles.pick("fused", shape, x.dtype, target().arch, overrides)
        parts = parts_of(ranks, ps)
        count = cdiv(M, tile.BM) * cdiv(N, tile.BN)
        tma, k_last = bool(tile.tma and K and _describable(x, W)), W.stride(1) == 1
        operands = x, W
        if tma:
            operands = (
                TensorDescriptor.from_tensor(x, [tile.BM, tile.BK]),
                TensorDescriptor.from_tensor(W, [tile.BN, tile.BK])
                if k_last
                else TensorDescriptor.from_tensor(W.t(), [tile.BK, tile.BN]),
            )
        launch(
            _lora_linear_fused_kernel,
            (min(count, target().processors) if tile.persistent else count,),
            (*operands, bias, H, B, y, seed, parts.scales),
            (M,),
            (N, K, x.stride(0), *W.stride(), H.stride(0) if ranks else 0, *B.stride(), y.stride(0)),
            (
                *parts[:3],
                len(parts.starts),
                bias is not None,
                tma,
                k_last,
                K % tile.BK == 0,
                precision(tf32),
                tile.BM,
                tile.BN,
                tile.BK,
                rank_block(parts, tile.BR),
                tile.GM,
            ),
            tile,
        )
    return y


def _describable(x: torch.Tensor, W: torch.Tensor) -> bool:
    """Do both suit the tensor memory accelerator: neighbouring columns, rows apart, everything at 16 bytes?"""
    W = W if W.stride(1) == 1 else W.t()
    return all(
        t.stride(1) == 1
        and t.stride(0) >= t.shape[1]
        and t.stride(0) * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0
        for t in (x, W)
    )
