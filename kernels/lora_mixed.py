"""y[b] += s·(x[b]·Aᵀ·Bᵀ + b_B) with the adapter of row b: all adapters of a batch in two launches.

Tokens are taken adapter by adapter, in blocks. A table on the device, one small copy a call, says which rows of the
batch an adapter has and where its ranks begin; a block finds its adapter there, so that no code depends on how many
adapters there are or on who has how many tokens. A's are stacked as (R, K), B's as (N, R).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from peft_fast.kernels.device import block_of, cdiv, on, precision, starts_of
from peft_fast.kernels.launch import launch
from peft_fast.kernels.split import split
from peft_fast.kernels.tiles import Tile

# one tile for one token a row and for many: a block that is not full reads no more than it has
SHRINK = Tile(32, 0, 128, num_warps=4, num_stages=3, BR=32)
SHRINK_FLOAT = Tile(32, 0, 64, num_warps=4, num_stages=2, BR=16)
EXPAND = Tile(32, 128, 0, num_warps=4, num_stages=1, BR=32)
NO_BLOCK = tl.constexpr(2**31 - 1)


class Batch(NamedTuple):
    """What the kernels know of a batch beside tensors; ``table`` is int32, on the device that they run on."""

    table: torch.Tensor  # of each adapter: first block, first row in the order, rows, first rank, rank, scaling; order
    adapters: int
    blocks: int
    tokens: int  # of a row
    places: int  # tokens that have an adapter
    rank: int  # the largest
    aligned: bool  # every adapter's first rank is a multiple of 16


def batch(
    order: Sequence[int], counts: Sequence[int], ranks: Sequence[int], scalings: Sequence[float], tokens: int
) -> Batch:
    """Rows of the batch by adapter, ``counts[i]`` of them adapter i's -> its Batch, the table on the CPU."""
    starts = starts_of(tuple(ranks))
    blocks = [cdiv(count * tokens, SHRINK.BM) for count in counts]
    begins, firsts = ([0, *itertools.accumulate(sizes[:-1])] for sizes in (blocks, list(counts)))
    scales = torch.tensor(scalings, dtype=torch.float32).view(torch.int32)
    head = torch.tensor([*begins, *firsts, *counts, *starts, *ranks], dtype=torch.int32)
    table = torch.cat([head, scales, torch.tensor(order, dtype=torch.int32)])
    aligned = all(start % 16 == 0 for start in starts)
    return Batch(table, len(counts), sum(blocks), tokens, len(order) * tokens, max(ranks), aligned)


@triton.jit
def _owner(table_ptr, block, adapters, T, ADAPTERS: tl.constexpr, BM: tl.constexpr):
    """A block's tokens -> their places in the order (BM,), rows of x, which of them are; its adapter, as in Batch."""
    at = tl.arange(0, ADAPTERS)
    begins = tl.load(table_ptr + at, mask=at < adapters, other=NO_BLOCK)
    own = tl.sum((begins <= block).to(tl.int32), 0) - 1
    tokens = (block - tl.load(table_ptr + own)).to(tl.int64) * BM + tl.arange(0, BM)
    first = tl.load(table_ptr + adapters + own)
    valid = tokens < tl.load(table_ptr + 2 * adapters + own).to(tl.int64) * T
    start = tl.load(table_ptr + 3 * adapters + own)
    rank = tl.load(table_ptr + 4 * adapters + own)
    rows = tl.load(table_ptr + 6 * adapters + first + tokens // T, mask=valid, other=0).to(tl.int64) * T + tokens % T
    return first.to(tl.int64) * T + tokens, rows, valid, start, rank, own


@triton.jit(do_not_specialize=["adapters", "T", "P", "k_blocks"])
def _lora_mixed_shrink_kernel(
    x_ptr,
    A_ptr,
    table_ptr,
    H_ptr,
    adapters,
    T,
    P,
    k_blocks,
    K,
    R,
    x_sm,
    A_sr,
    A_sk,
    ADAPTERS: tl.constexpr,
    SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    # slots of one block are neighbours, so that all but the first find x in the L2 cache
    block = tl.program_id(0) // SLOTS
    ranks = tl.program_id(0) % SLOTS * BR + tl.arange(0, BR)
    places, rows, valid, start, rank, _ = _owner(table_ptr, block, adapters, T, ADAPTERS, BM)
    dtype = A_ptr.dtype.element_ty
    first = tl.program_id(1) * k_blocks
    acc = tl.zeros((BM, BR), tl.float32)
    for step in range(first, min(first + k_blocks, tl.cdiv(K, BK))):
        cols = step * BK + tl.arange(0, BK)
        x = tl.load(x_ptr + rows[:, None] * x_sm + cols[None, :], mask=valid[:, None] & (cols < K)[None, :], other=0.0)
        a = tl.load(
            A_ptr + (start + ranks)[None, :].to(tl.int64) * A_sr + cols[:, None].to(tl.int64) * A_sk,
            mask=(cols < K)[:, None] & (ranks < rank)[None, :],
            other=0.0,
        )
        acc = tl.dot(x.to(dtype), a, acc, input_precision=PRECISION)
    H = H_ptr + tl.program_id(1).to(tl.int64) * P * R
    tl.store(H + places[:, None] * R + ranks[None, :], acc, mask=valid[:, None] & (ranks < rank)[None, :])


@triton.jit(do_not_specialize=["adapters", "T"])
def _lora_mixed_gather_kernel(
    ids_ptr,
    A_ptr,
    table_ptr,
    H_ptr,
    adapters,
    T,
    V,
    R,
    A_sr,
    A_sv,
    ADAPTERS: tl.constexpr,
    SLOTS: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
):
    block = tl.program_id(0) // SLOTS
    ranks = tl.program_id(0) % SLOTS * BR + tl.arange(0, BR)
    places, rows, valid, start, rank, _ = _owner(table_ptr, block, adapters, T, ADAPTERS, BM)
    ids = tl.load(ids_ptr + rows, mask=valid, other=0).to(tl.int64)
    mask = valid[:, None] & (ranks < rank)[None, :]
    # a token that is none reads nothing, and its row is NaN
    known = ((ids >= 0) & (ids < V))[:, None]
    at = (start + ranks)[None, :].to(tl.int64) * A_sr + ids[:, None] * A_sv
    h = tl.load(A_ptr + at, mask=mask & known, other=float("nan"))
    tl.store(H_ptr + places[:, None] * R + ranks[None, :], h.to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=["adapters", "T", "P", "parts"])
def _lora_mixed_expand_kernel(
    H_ptr,
    B_ptr,
    bias_ptr,
    table_ptr,
    y_ptr,
    adapters,
    T,
    P,
    parts,
    N,
    R,
    B_sn,
    B_sr,
    y_sm,
    ADAPTERS: tl.constexpr,
    BIAS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    slices = tl.cdiv(N, BN)
    cols = tl.program_id(0) % slices * BN + tl.arange(0, BN)
    places, rows, valid, start, rank, own = _owner(table_ptr, tl.program_id(0) // slices, adapters, T, ADAPTERS, BM)
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    dtype = B_ptr.dtype.element_ty
    acc = tl.zeros((BM, BN), tl.float32)
    for r in tl.range(0, rank, BR, num_stages=1):
        ranks = r + tl.arange(0, BR)
        at = places[:, None] * R + ranks[None, :]
        h = tl.zeros((BM, BR), tl.float32)
        for _ in range(parts):
            h += tl.load(H_ptr + at, mask=valid[:, None] & (ranks < rank)[None, :], other=0.0)
            at += P.to(tl.int64) * R
        b = tl.load(
            B_ptr + cols[None, :].to(tl.int64) * B_sn + (start + ranks)[:, None].to(tl.int64) * B_sr,
            mask=(cols < N)[None, :] & (ranks < rank)[:, None],
            other=0.0,
        )
        acc = tl.dot(h.to(dtype), b, acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias_ptr + own.to(tl.int64) * N + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    acc *= tl.load(table_ptr + 5 * adapters + own).to(tl.float32, bitcast=True)
    y = y_ptr + rows[:, None] * y_sm + cols[None, :]
    mask = valid[:, None] & (cols < N)[None, :]
    tl.store(y, (tl.load(y, mask=mask, other=0.0).to(tl.float32) + acc).to(y_ptr.dtype.element_ty), mask=mask)


def shrink(x, A, made, tf32=False):
    """x (b·T, K) with unit column stride, A (R, K) -> H (parts, places, rank) float32, x·Aᵀ cut along K in parts."""
    K = x.shape[1]
    tile = SHRINK_FLOAT if A.dtype == torch.float32 else SHRINK
    BR = block_of(made.rank, 16, tile.BR)
    slots = cdiv(made.rank, BR)
    with on(x):
        parts, each = split(K, tile.BK, max(1, made.blocks * slots))
        H = x.new_empty(parts, made.places, made.rank, dtype=torch.float32)
        if H.numel():
            launch(
                _lora_mixed_shrink_kernel,
                (made.blocks * slots, parts),
                (x, A, made.table, H),
                (made.adapters, made.tokens, made.places, each),
                (K, made.rank, x.stride(0), *A.stride()),
                (_crowd(made), slots, precision(tf32), tile.BM, tile.BK, BR),
                tile,
            )
    return H


def gather(ids, A, made):
    """ids (b·T,), A (R, V) -> H (1, places, rank) float32: the columns of A that tokens name."""
    H = A.new_empty(1, made.places, made.rank, dtype=torch.float32)
    BR = block_of(made.rank, 16, SHRINK.BR)
    slots = cdiv(made.rank, BR)
    if H.numel():
        with on(A):
            launch(
                _lora_mixed_gather_kernel,
                (made.blocks * slots,),
                (ids, A, made.table, H),
                (made.adapters, made.tokens),
                (A.shape[1], made.rank, *A.stride()),
                (_crowd(made), slots, SHRINK.BM, BR),
                SHRINK,
            )
    return H


def expand_(y, H, B, bias, made, tf32=False):
    """y (b·T, N) with unit column stride += s·(H·Bᵀ + bias), of H (parts, places, rank), B (N, R), bias (adapters, N).

    H's parts are summed in order and rounded to B's dtype, in which the product is made; y is rounded once.
    """
    N = y.shape[1]
    if y.numel() and made.places:
        with on(y):
            launch(
                _lora_mixed_expand_kernel,
                (made.blocks * cdiv(N, EXPAND.BN),),
                (H, B, bias, made.table, y),
                (made.adapters, made.tokens, made.places, H.shape[0]),
                (N, made.rank, *B.stride(), y.stride(0)),
                (
                    _crowd(made),
                    bias is not None,
                    made.aligned,
                    precision(tf32),
                    EXPAND.BM,
                    EXPAND.BN,
                    block_of(made.rank, 16, EXPAND.BR),
                ),
                EXPAND,
            )
    return y


def _crowd(made):
    # code for few adapters and for many, not for each number of them
    return block_of(made.adapters, 16, 1 << 20)
