"""y = W[ids] + s·A[:, ids]ᵀ·Bᵀ, the base and the adapter each times a scale, and dA: columns of A that tokens read.

dA is summed over tokens in the order of their sorted ids: a program for each run of one id, no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from peft_fast.kernels.device import block_of, cdiv, low_rank_part, on, precision
from peft_fast.kernels.launch import launch
from peft_fast.kernels.tiles import Tile

# tokens, columns and ranks that a program holds at once
GATHER = Tile(64, 0, 0, num_warps=4, num_stages=1)
FORWARD = Tile(32, 0, 128, num_warps=4, num_stages=1, BR=16)
SCATTER = Tile(32, 0, 0, num_warps=1, num_stages=1)


@triton.jit(do_not_specialize=["M"])
def _lora_embedding_gather_kernel(ids_ptr, A_ptr, H_ptr, M, V, R, A_sr, A_sv, H_sm, BM: tl.constexpr, BR: tl.constexpr):
    blocks = tl.cdiv(R, BR)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * BM + tl.arange(0, BM)
    ranks = tl.program_id(0) % blocks * BR + tl.arange(0, BR)
    ids = tl.load(ids_ptr + rows, mask=rows < M, other=0).to(tl.int64)
    mask = (rows < M)[:, None] & (ranks < R)[None, :]
    # a token that is none reads nothing, and its row is NaN
    known = ((ids >= 0) & (ids < V))[:, None]
    h = tl.load(A_ptr + ids[:, None] * A_sv + ranks[None, :].to(tl.int64) * A_sr, mask=mask & known, other=float("nan"))
    tl.store(H_ptr + rows[:, None] * H_sm + ranks[None, :], h, mask=mask)


@triton.jit(do_not_specialize=["M"])
def _lora_embedding_forward_kernel(
    ids_ptr,
    W_ptr,
    H_ptr,
    B_ptr,
    scale_ptr,
    y_ptr,
    scalings,
    M,
    V,
    D,
    R,
    W_sv,
    W_sd,
    H_sm,
    B_sd,
    B_sr,
    y_sm,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    blocks = tl.cdiv(D, BD)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * BM + tl.arange(0, BM)
    first = tl.program_id(0) % blocks * BD
    cols = first + tl.arange(0, BD)
    mask = (rows < M)[:, None] & (cols < D)[None, :]
    ids = tl.load(ids_ptr + rows, mask=rows < M, other=0).to(tl.int64)
    known = ((ids >= 0) & (ids < V))[:, None]
    dtype = y_ptr.dtype.element_ty
    low = low_rank_part(H_ptr, B_ptr, rows, first, M, D, H_sm, B_sr, B_sd, 0, R, PRECISION, BM, BD, BR) * scalings[0]
    base = tl.load(
        W_ptr + ids[:, None] * W_sv + cols[None, :].to(tl.int64) * W_sd, mask=mask & known, other=float("nan")
    ).to(tl.float32)
    if SCALED:
        # the base is rounded as the layer itself rounds it
        base = (base * tl.load(scale_ptr)).to(dtype).to(tl.float32)
        low *= tl.load(scale_ptr + 1)
    tl.store(y_ptr + rows[:, None] * y_sm + cols[None, :], (base + low).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _lora_embedding_scatter_kernel(
    ids_ptr,
    order_ptr,
    D_ptr,
    scale_ptr,
    dA_ptr,
    M,
    V,
    R,
    padding,
    D_sm,
    dA_sr,
    SCALED: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    token = tl.load(ids_ptr + at).to(tl.int64)
    before = tl.load(ids_ptr + at - 1, mask=at > 0, other=-1).to(tl.int64)
    # the program of the first of a run adds up the whole run
    if (token != before) & (token != padding) & (token >= 0) & (token < V):
        acc = tl.zeros((BR,), tl.float32)
        more = True
        while more:
            places = at + tl.arange(0, BM)
            own = tl.load(ids_ptr + places, mask=places < M, other=-1).to(tl.int64) == token
            rows = tl.load(order_ptr + places, mask=own, other=0)
            d = tl.load(
                D_ptr + rows[:, None] * D_sm + ranks[None, :], mask=own[:, None] & (ranks < R)[None, :], other=0.0
            )
            acc += tl.sum(d.to(tl.float32), 0)
            at += BM
            more = tl.load(ids_ptr + at, mask=at < M, other=-1).to(tl.int64) == token
        if SCALED:
            acc *= tl.load(scale_ptr + 1)
        tl.store(dA_ptr + ranks.to(tl.int64) * dA_sr + token, acc.to(dA_ptr.dtype.element_ty), mask=ranks < R)


def gather(ids, A):
    """ids (M,), A (R, V) -> H (M, R) = A[:, ids]ᵀ."""
    M, (R, V) = ids.shape[0], A.shape
    H = A.new_empty(M, R)
    if H.numel():
        with on(A):
            BR = block_of(R, 16, 64)
            launch(
                _lora_embedding_gather_kernel,
                (cdiv(M, GATHER.BM) * cdiv(R, BR),),
                (ids, A, H),
                (M,),
                (V, R, *A.stride(), H.stride(0)),
                (GATHER.BM, BR),
                GATHER,
            )
    return H


def forward(ids, W, H, B, scale, scaling, tf32=False):
    """ids (M,), W (V, D), H (M, R), B (D, R), scale (2,) | None -> y (M, D) in W's dtype.

    y = W[ids]·scale[0], rounded, + s·scale[1]·H·Bᵀ, rounded once.
    """
    M, (V, D), R = ids.shape[0], W.shape, B.shape[1]
    y = W.new_empty(M, D)
    if y.numel():
        with on(W):
            launch(
                _lora_embedding_forward_kernel,
                (cdiv(M, FORWARD.BM) * cdiv(D, FORWARD.BK),),
                (ids, W, H, B, scale, y, (float(scaling),)),
                (M,),
                (V, D, R, *W.stride(), H.stride(0), *B.stride(), y.stride(0)),
                (scale is not None, precision(tf32), FORWARD.BM, FORWARD.BK, FORWARD.BR),
                FORWARD,
            )
    return y


def scatter(ids, D, scale, V, padding, dtype):
    """ids (M,), D (M, R), scale (2,) | None -> dA (R, V) in ``dtype``: rows of D summed by token, times scale[1].

    The token ``padding`` has none; -1 for no such token.
    """
    M, R = D.shape
    dA = torch.zeros(R, V, dtype=dtype, device=D.device)
    if D.numel() and V:
        ids, order = torch.sort(ids, stable=True)
        with on(D):
            BR = block_of(R, 16, 64)
            launch(
                _lora_embedding_scatter_kernel,
                (M, cdiv(R, BR)),
                (ids, order, D, scale, dA),
                (M,),
                (V, R, padding, D.stride(0), dA.stride(0)),
                (scale is not None, SCATTER.BM, BR),
                SCATTER,
            )
    return dA
