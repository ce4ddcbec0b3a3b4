"""What all kernels share: the machine they run on, the dropout mask of a tile, masked low-rank products."""

from __future__ import annotations

import contextlib
import functools
import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

# what @triton.jit made of the kernels when these files were imported
INTERPRETED = triton.knobs.runtime.interpret


class Target(NamedTuple):
    """What tiles and grids are chosen from; ``arch`` is 90 for sm_90, "gfx942" for AMD, or "interpreter"."""

    arch: int | str
    processors: int


@functools.cache
def _target(index: int) -> Target:
    driver = triton.runtime.driver.active
    count = driver.utils.get_device_properties(index)["multiprocessor_count"]
    return Target(driver.get_current_target().arch, count)


def target() -> Target:
    """The current device of Triton's driver; two processors under the interpreter, which has none."""
    if INTERPRETED:
        return Target("interpreter", 2)
    return _target(triton.runtime.driver.active.get_current_device())


target.cache_clear = _target.cache_clear


def on(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Launches go to the current device: inside this, the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


class Parts(NamedTuple):
    """Runs of stacked rank columns with one mask each: first column, how many, the 16-bit threshold, 1/(1 − p)."""

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    thresholds: tuple[int, ...]
    scales: tuple[float, ...]


@functools.cache
def starts_of(ranks: tuple[int, ...]) -> tuple[int, ...]:
    """First column of each adapter among the stacked ones."""
    return tuple(itertools.accumulate((0, *ranks[:-1]))) if ranks else ()


@functools.cache
def parts_of(ranks: tuple[int, ...], ps: tuple[float, ...]) -> Parts:
    """One part an adapter; a single one where no adapter has dropout."""
    if not any(ps):
        return Parts((0,), (sum(ranks),), (0,), (1.0,)) if ranks else Parts((), (), (), ())
    return Parts(starts_of(ranks), tuple(ranks), tuple(round(p * 65536) for p in ps), tuple(map(kept_scale, ps)))


def kept_scale(p: float) -> float:
    """1/(1 − p), and 0 where nothing is kept."""
    return 1 / (1 - p) if p < 1 else 0.0


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up (triton.cdiv is a kernel's, and slow when the host calls it)."""
    return -(-a // b)


def block_of(n: int, least: int, most: int) -> int:
    """The power of two between ``least`` and ``most`` that covers n, if one does."""
    return min(most, max(least, 1 << (n - 1).bit_length()))


def rank_block(parts: Parts, most: int) -> int:
    """How many rank columns a product takes at once: the widest part's, padded, or as many as a tile allows."""
    return block_of(max(parts.counts, default=0), 16, most)


def precision(tf32: bool) -> str:
    """How float32 operands are multiplied."""
    return "tf32" if tf32 else "ieee"


@triton.jit
def keep_tile(seed, rows, first, threshold, BM: tl.constexpr, BK: tl.constexpr):
    """rows (BM,) int64, columns first … first + BK, both multiples of 128 -> (BM, BK) bool, True = kept.

    One call of Philox gives eight elements: column = 128·group + 32·word + 2·lane + half of counter 16·group + lane.
    """
    counters = (first // 8 + tl.arange(0, BK // 8)).to(tl.uint32)[None, :]
    low = (rows & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = (rows >> 32).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = tl.philox(seed, counters, low, high, tl.zeros_like(counters), n_rounds=7)
    # 16-bit halves travel to their columns and are compared there: fewer instructions than moving truth values
    h0, h1, h2, h3 = _halves(w0), _halves(w1), _halves(w2), _halves(w3)  # (BM, BK/8, half)
    halves = tl.join(tl.join(h0, h2), tl.join(h1, h3))  # (BM, BK/8, half, 2, 2): the last two are the word
    halves = tl.permute(tl.reshape(halves, (BM, BK // 128, 32, 4)), (0, 1, 3, 2))
    return tl.reshape(halves, (BM, BK)).to(tl.int32) >= threshold


@triton.jit
def _halves(word):
    return tl.join((word & 0xFFFF).to(tl.uint16), (word >> 16).to(tl.uint16))


@triton.jit
def column_scales(columns, scales, STARTS: tl.constexpr, ADAPTERS: tl.constexpr):
    """columns (…) of stacked ranks -> float32, the scale of the adapter that owns each."""
    out = tl.zeros(columns.shape, tl.float32)
    for i in tl.static_range(ADAPTERS):
        out = tl.where(columns >= STARTS[i], scales[i], out)
    return out


@triton.jit
def chosen(i, values, COUNT: tl.constexpr):
    """values[i], where i is a number of the run time and ``values`` a tuple."""
    found = values[0]
    for j in tl.static_range(1, COUNT):
        found = tl.where(i == j, values[j], found)
    return found


@triton.jit
def low_rank_part(
    D_ptr,
    A_ptr,
    rows,
    first,
    M,
    K,
    D_sm,
    A_sr,
    A_sk,
    start,
    count,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """D (M, R), A (R, K) -> D·A at (rows, first … first + BK) over count ranks from start on, float32."""
    cols = first + tl.arange(0, BK)
    part = tl.zeros((BM, BK), tl.float32)
    for r in tl.range(start, start + count, BR, num_stages=1):
        ranks = r + tl.arange(0, BR)
        valid = ranks < start + count
        d = tl.load(D_ptr + rows[:, None] * D_sm + ranks[None, :], mask=(rows < M)[:, None] & valid[None, :], other=0.0)
        a = tl.load(
            A_ptr + ranks[:, None] * A_sr + cols[None, :].to(tl.int64) * A_sk,
            mask=valid[:, None] & (cols < K)[None, :],
            other=0.0,
        )
        part = tl.dot(d, a.to(d.dtype), part, input_precision=PRECISION)
    return part


@triton.jit
def low_rank_tile(
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
    STARTS: tl.constexpr,
    COUNTS: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """D (M, R), A (R, K) -> Σ over parts of mask∘(D·A)·scale at (rows, first … first + BK), float32."""
    if PARTS == 0:
        total = tl.zeros((BM, BK), tl.float32)
    elif PARTS == 1:
        total = low_rank_part(D_ptr, A_ptr, rows, first, M, K, D_sm, A_sr, A_sk, 0, COUNTS[0], PRECISION, BM, BK, BR)
        if THRESHOLDS[0] > 0:
            keep = keep_tile(tl.load(seed_ptr), rows, first, THRESHOLDS[0], BM, BK)
            total = tl.where(keep, total * scales[0], 0.0)
    else:
        # a loop, which stays one however many adapters there are
        total = tl.zeros((BM, BK), tl.float32)
        for i in range(PARTS):
            start, count = chosen(i, STARTS, PARTS), chosen(i, COUNTS, PARTS)
            part = low_rank_part(D_ptr, A_ptr, rows, first, M, K, D_sm, A_sr, A_sk, start, count, PRECISION, BM, BK, BR)
            keep = keep_tile(tl.load(seed_ptr + i), rows, first, chosen(i, THRESHOLDS, PARTS), BM, BK)
            total += tl.where(keep, part * chosen(i, scales, PARTS), 0.0)
    return total
