"""yᵢ = x·Wᵢᵀ + Hᵢ·Bᵢᵀ + biasᵢ of all siblings as one launch, dx = Σ gᵢ·Wᵢ + Σ mask∘(D·A)/(1 − p) as one (plan `fused`).

Forward is one GEMM whose columns are the siblings' side by side: a program finds the sibling that its tile belongs to
and reads that one's weight where it lies. Backward is one GEMM over their columns end to end, rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peft_fast.kernels import tiles
from peft_fast.kernels.device import (
    block_of,
    cdiv,
    chosen,
    low_rank_part,
    low_rank_tile,
    on,
    parts_of,
    precision,
    rank_block,
    starts_of,
    target,
)
from peft_fast.kernels.gemm import add_product, place
from peft_fast.kernels.launch import launch


@triton.jit(do_not_specialize=["M"])
def _lora_group_forward_kernel(
    x_ptr,
    W_ptrs,
    bias_ptrs,
    H_ptr,
    B_ptrs,
    y_ptrs,
    M,
    K,
    x_sm,
    H_sm,
    Ns,
    W_sn,
    W_sk,
    B_sn,
    B_sr,
    y_sm,
    STARTS: tl.constexpr,
    COUNTS: tl.constexpr,
    BIASES: tl.constexpr,
    SIBLINGS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GM: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BM), 0
    for i in tl.static_range(SIBLINGS):
        tiles_n += tl.cdiv(Ns[i], BN)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        block_m, block_n = place(tile, tiles_m, tiles_n, GM)
        sibling, first, end = 0, 0, 0
        for i in tl.static_range(SIBLINGS - 1):
            end += tl.cdiv(Ns[i], BN)
            sibling = tl.where(block_n >= end, i + 1, sibling)
            first = tl.where(block_n >= end, end, first)
        N = chosen(sibling, Ns, SIBLINGS)
        m, n = block_m * BM, (block_n - first) * BN
        rows = (m + tl.arange(0, BM)).to(tl.int64)
        cols = n + tl.arange(0, BN)
        acc = low_rank_part(
            H_ptr + chosen(sibling, STARTS, SIBLINGS),
            chosen(sibling, B_ptrs, SIBLINGS),
            rows,
            n,
            M,
            N,
            H_sm,
            chosen(sibling, B_sr, SIBLINGS),
            chosen(sibling, B_sn, SIBLINGS),
            0,
            chosen(sibling, COUNTS, SIBLINGS),
            PRECISION,
            BM,
            BN,
            BR,
        )
        acc = add_product(
            acc,
            x_ptr,
            chosen(sibling, W_ptrs, SIBLINGS),
            m,
            n,
            M,
            N,
            K,
            x_sm,
            chosen(sibling, W_sn, SIBLINGS),
            chosen(sibling, W_sk, SIBLINGS),
            False,
            True,
            EVEN_K,
            PRECISION,
            BM,
            BN,
            BK,
        )
        for i in tl.static_range(SIBLINGS):
            if BIASES[i]:
                mask = (cols < N) & (sibling == i)
                acc += tl.load(bias_ptrs[i] + cols, mask=mask, other=0.0).to(tl.float32)[None, :]
        tl.store(
            chosen(sibling, y_ptrs, SIBLINGS) + rows[:, None] * chosen(sibling, y_sm, SIBLINGS) + cols[None, :],
            acc.to(x_ptr.dtype.element_ty),
            mask=(rows < M)[:, None] & (cols < N)[None, :],
        )


@triton.jit(do_not_specialize=["M"])
def _lora_group_backward_kernel(
    g_ptrs,
    W_ptrs,
    D_ptr,
    A_ptr,
    dx_ptr,
    seed_ptr,
    scales,
    M,
    K,
    Ns,
    g_sm,
    W_sn,
    W_sk,
    D_sm,
    A_sr,
    A_sk,
    dx_sm,
    STARTS: tl.constexpr,
    COUNTS: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,
    SIBLINGS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GM: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(K, BN)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        block_m, block_n = place(tile, tiles_m, tiles_n, GM)
        m, n = block_m * BM, block_n * BN
        rows = (m + tl.arange(0, BM)).to(tl.int64)
        cols = n + tl.arange(0, BN)
        acc = low_rank_tile(
            D_ptr,
            A_ptr,
            seed_ptr,
            scales,
            rows,
            n,
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
            BN,
            BR,
        )
        for i in range(SIBLINGS):
            acc = add_product(
                acc,
                chosen(i, g_ptrs, SIBLINGS),
                chosen(i, W_ptrs, SIBLINGS),
                m,
                n,
                M,
                K,
                chosen(i, Ns, SIBLINGS),
                chosen(i, g_sm, SIBLINGS),
                chosen(i, W_sk, SIBLINGS),
                chosen(i, W_sn, SIBLINGS),
                False,
                True,
                EVEN,
                PRECISION,
                BM,
                BN,
                BK,
            )
        tl.store(
            dx_ptr + rows[:, None] * dx_sm + cols[None, :],
            acc.to(dx_ptr.dtype.element_ty),
            mask=(rows < M)[:, None] & (cols < K)[None, :],
        )


def forward(x, Ws, biases, H, Bs, tf32=False, overrides=None):
    """x (M, K) with unit column stride, Ws [(N, K)], biases [(N,) dense | None], H (M, R), Bs [(N, r)] -> [y (M, N)].

    Sibling i owns as many columns of H, one sibling's after another's, as Bs[i] has.
    """
    (M, K), ranks = x.shape, tuple(B.shape[1] for B in Bs)
    ys = [x.new_empty(M, W.shape[0]) for W in Ws]
    if not M or not any(W.shape[0] for W in Ws):
        return ys
    with on(x):
        Ns = tuple(W.shape[0] for W in Ws)
        tile = _pick(M, K, sum(Ns), max(ranks), False, x.dtype, overrides)
        launch(
            _lora_group_forward_kernel,
            (_programs(tile, cdiv(M, tile.BM) * sum(cdiv(N, tile.BN) for N in Ns)),),
            (x, tuple(Ws), tuple(biases), H, tuple(Bs), tuple(ys)),
            (M,),
            (K, x.stride(0), H.stride(0), Ns, *_strides(Ws), *_strides(Bs), _strides(ys)[0]),
            (
                starts_of(ranks),
                ranks,
                tuple(b is not None for b in biases),
                len(Ws),
                K % tile.BK == 0,
                precision(tf32),
                tile.BM,
                tile.BN,
                tile.BK,
                block_of(max(ranks), 16, tile.BR),
                tile.GM,
            ),
            tile,
        )
    return ys


def backward(gs, Ws, D, A, seed, ranks, ps, dtype, tf32=False, overrides=None):
    """gs [(M, N)] with unit column stride, Ws [(N, K)], D (M, R), A (R, K) -> dx (M, K) in ``dtype``.

    dx = Σ g·W over siblings + Σ mask∘(D·A)/(1 − p) over all their adapters.
    """
    M, K = gs[0].shape[0], Ws[0].shape[1]
    dx = gs[0].new_empty(M, K, dtype=dtype)
    if not dx.numel():
        return dx
    with on(dx):
        Ns, parts = tuple(W.shape[0] for W in Ws), parts_of(ranks, ps)
        tile = _pick(M, sum(Ns), K, sum(ranks), any(ps), gs[0].dtype, overrides)
        launch(
            _lora_group_backward_kernel,
            (_programs(tile, cdiv(M, tile.BM) * cdiv(K, tile.BN)),),
            (tuple(gs), tuple(Ws), D, A, dx, seed, parts.scales),
            (M,),
            (K, Ns, _strides(gs)[0], *_strides(Ws), D.stride(0) if ranks else 0, *A.stride(), dx.stride(0)),
            (
                *parts[:3],
                len(parts.starts),
                all(N % tile.BK == 0 for N in Ns),
                len(Ws),
                precision(tf32),
                tile.BM,
                tile.BN,
                tile.BK,
                rank_block(parts, tile.BR),
                tile.GM,
            ),
            tile,
        )
    return dx


def _pick(M, K, N, R, dropout, dtype, overrides):
    return tiles.pick("fused", tiles.shape_class("fused", M, K, N, R, dropout), dtype, target().arch, overrides)


def _programs(tile, count):
    return min(count, target().processors) if tile.persistent else count


def _strides(tensors):
    """[(N, K)] -> the strides of the rows, and those of the columns."""
    return tuple(t.stride(0) for t in tensors), tuple(t.stride(1) for t in tensors)
