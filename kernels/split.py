"""Work divided among programs: rank columns into slots, long sums into partial ones that are added in a fixed order."""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from peft_fast.kernels.device import block_of, cdiv, column_scales, parts_of, precision, rank_block, starts_of, target
from peft_fast.kernels.launch import launch
from peft_fast.kernels.tiles import Tile

FINALIZE = Tile(0, 0, 0, num_warps=4, num_stages=3)


@triton.jit(do_not_specialize=["parts", "X"])
def _lora_linear_finalize_kernel(
    work_ptr,
    out_ptr,
    scales,
    parts,
    X,
    Y,
    out_sx,
    out_sy,
    STARTS: tl.constexpr,
    ADAPTERS: tl.constexpr,
    RANKS_FIRST: tl.constexpr,
    BX: tl.constexpr,
    BY: tl.constexpr,
):
    blocks = tl.cdiv(Y, BY)
    xs = (tl.program_id(0) // blocks).to(tl.int64) * BX + tl.arange(0, BX)
    ys = tl.program_id(0) % blocks * BY + tl.arange(0, BY)
    mask = (xs < X)[:, None] & (ys < Y)[None, :]
    offsets = xs[:, None] * Y + ys[None, :]
    acc = tl.zeros((BX, BY), tl.float32)
    for _ in range(parts):
        acc += tl.load(work_ptr + offsets, mask=mask, other=0.0)
        offsets += X.to(tl.int64) * Y
    if RANKS_FIRST:
        acc *= column_scales(xs, scales, STARTS, ADAPTERS)[:, None]
    else:
        acc *= column_scales(ys, scales, STARTS, ADAPTERS)[None, :]
    out = out_ptr + xs[:, None] * out_sx + ys[None, :].to(tl.int64) * out_sy
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


class Slots(NamedTuple):
    """Constants of a kernel that runs once a slot, in the order of its parameters."""

    STARTS: tuple[int, ...]
    COUNTS: tuple[int, ...]
    OWNERS: tuple[int, ...]
    THRESHOLDS: tuple[int, ...]
    SLOTS: int
    DROPOUT: bool
    PRECISION: str
    BM: int
    BK: int
    BR: int


@functools.cache
def slots_of(ranks: tuple[int, ...], ps: tuple[float, ...], tile: Tile, tf32: bool) -> Slots:
    """One slot a block of rank columns, which are all of one adapter."""
    parts = parts_of(ranks, ps)
    BR = rank_block(parts, tile.BR)
    slots = [
        (r, min(BR, start + count - r), owner, threshold)
        for owner, (start, count, threshold, _) in enumerate(zip(*parts, strict=True))
        for r in range(start, start + count, BR)
    ]
    starts, counts, owners, thresholds = zip(*slots, strict=True)
    dropout = any(thresholds)
    return Slots(starts, counts, owners, thresholds, len(slots), dropout, precision(tf32), tile.BM, tile.BK, BR)


@triton.jit
def slot_of(
    slot,
    seed_ptr,
    STARTS: tl.constexpr,
    COUNTS: tl.constexpr,
    OWNERS: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    SLOTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    BR: tl.constexpr,
):
    """Number of a slot -> its rank columns (BR,), which of them are its own, its adapter's seed and threshold."""
    start, count, owner, threshold = STARTS[0], COUNTS[0], OWNERS[0], THRESHOLDS[0]
    for i in tl.static_range(1, SLOTS):
        start = tl.where(slot == i, STARTS[i], start)
        count = tl.where(slot == i, COUNTS[i], count)
        owner = tl.where(slot == i, OWNERS[i], owner)
        threshold = tl.where(slot == i, THRESHOLDS[i], threshold)
    ranks = start + tl.arange(0, BR)
    seed = tl.load(seed_ptr + owner) if DROPOUT else 0
    return ranks, ranks < start + count, seed, threshold


def split(size, block, programs):
    """(splits, blocks of each): enough programs for the device, a few blocks each at least."""
    blocks = cdiv(size, block)
    splits = max(1, min(2 * target().processors // programs, blocks // 4))
    each = cdiv(blocks, splits)
    return cdiv(blocks, each), each


def finalize(work, out, ranks, scales, ranks_first=False):
    """work (parts, X, Y) float32 -> out (X, Y), summed in order and scaled along the axis of ranks."""
    parts, X, Y = work.shape
    BY = block_of(Y, 16, 128)
    BX = 2048 // BY
    launch(
        _lora_linear_finalize_kernel,
        (cdiv(X, BX) * cdiv(Y, BY),),
        (work, out, scales),
        (parts, X),
        (Y, *out.stride()),
        (starts_of(ranks), len(ranks), ranks_first, BX, BY),
        FINALIZE,
    )
