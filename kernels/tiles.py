"""pick(op, shape class, dtype, architecture) -> Tile, from a table, or from a tuning file's entries.

The table's tiles were chosen from compile reports (no spills, shared memory within the limit, tensor-core
instructions); `python -m peft_fast tune` times the candidates on a device and keeps the winners.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch

OPS = ("shrink", "shrink_outer", "outer", "expand", "fused", "decode")
# past this many stacked ranks the partial sums of the shared pass over dy outweigh a second pass
MOST_SHARED_RANK = 32
# bytes of shared memory one program may use
SHARED = {"sm80": 166912, "sm86": 101376, "sm90": 232448, "sm100": 232448, "hip": 65536}


class Tile(NamedTuple):
    """Block sizes along M, N and K (0 where an op has none), the launch's width and depth, and the GEMM's options."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    GM: int = 0  # row blocks that share their columns of W in the L2 cache
    persistent: int = 0  # as many programs as the device has processors
    tma: int = 0  # operands through tensor descriptors, where their strides allow it
    BR: int = 64  # the most rank columns one program holds


# columns under a dropout mask come in whole groups of 128; a float32 tile is half as wide as a 16-bit one
_HALF = {
    "shrink": [Tile(64, 0, 128, 4, 4), Tile(32, 0, 128, 4, 4), Tile(64, 0, 128, 8, 3)],
    "shrink_outer": [Tile(64, 256, 0, 8, 3), Tile(64, 128, 0, 4, 4), Tile(32, 256, 0, 4, 4)],
    "outer": [Tile(64, 0, 128, 4, 4), Tile(32, 0, 128, 4, 4), Tile(64, 0, 128, 8, 3)],
    "expand": [Tile(64, 0, 128, 8, 1, BR=32), Tile(32, 0, 128, 4, 1, BR=32)],
    "decode": [Tile(16, 64, 64, 4, 6), Tile(16, 32, 128, 4, 4), Tile(16, 128, 64, 8, 4)],
}
# twice the rank columns a program where the accumulators of more warps, or a memory of their own, hold the sums
_WIDE = {
    "shrink": [Tile(64, 0, 128, 8, 3, BR=128), Tile(64, 0, 128, 8, 3)],
    "outer": [Tile(64, 0, 128, 8, 3, BR=128), Tile(64, 0, 128, 4, 4)],
}
_FLOAT = {
    "shrink": [Tile(32, 0, 128, 8, 2, BR=16)],
    "shrink_outer": [Tile(32, 128, 0, 8, 2)],
    "outer": [Tile(32, 0, 128, 8, 2, BR=32), Tile(16, 0, 128, 8, 2, BR=32)],
    "expand": [Tile(32, 0, 128, 8, 1, BR=32)],
    "fused": [Tile(32, 128, 16, 8, 3, 8, BR=16)],
    "decode": [Tile(16, 32, 64, 4, 3), Tile(16, 32, 32, 4, 4)],
}
# where those spill
_FLOAT_ELSEWHERE = {("hip", "shrink_outer"): [Tile(32, 64, 0, 4, 2)]}
_FUSED = {
    "sm80": [Tile(128, 128, 32, 8, 4, 8, BR=32), Tile(128, 128, 64, 8, 3, 8, BR=32)],
    "sm86": [Tile(128, 128, 32, 8, 3, 8, BR=32), Tile(128, 128, 64, 8, 2, 8, BR=32)],
    "sm90": [
        Tile(128, 256, 64, 8, 3, 8),
        Tile(128, 256, 64, 8, 3, 8, 1, 1),
        Tile(128, 128, 64, 8, 4, 8),
        Tile(128, 128, 64, 8, 4, 8, 1, 1),
    ],
    "sm100": [
        Tile(128, 128, 64, 8, 4, 8, BR=32),
        Tile(128, 128, 64, 8, 4, 8, 1, 1, BR=32),
        Tile(128, 256, 64, 8, 3, 8, BR=32),
    ],
    "hip": [Tile(128, 128, 64, 8, 2, 8), Tile(128, 128, 32, 4, 2, 8), Tile(64, 128, 64, 4, 2, 8)],
}
# every block is crossed by small tests, and a second tile by the tuner's
_INTERPRETER = {
    "shrink": [Tile(32, 0, 128, 4, 1), Tile(16, 0, 256, 4, 1)],
    "shrink_outer": [Tile(32, 64, 0, 4, 1), Tile(16, 128, 0, 4, 1)],
    "outer": [Tile(32, 0, 128, 4, 1), Tile(16, 0, 256, 4, 1)],
    "expand": [Tile(32, 0, 128, 4, 1), Tile(16, 0, 256, 4, 1)],
    "decode": [Tile(16, 64, 64, 4, 1), Tile(16, 32, 128, 4, 1)],
    "fused": [Tile(32, 128, 64, 4, 1, 2), Tile(16, 128, 32, 4, 1, 3, 1, 0), Tile(32, 128, 64, 4, 1, 2, 1, 1)],
}


def family(arch: int | str) -> str:
    """90, "gfx942", "interpreter" -> the row of the table: compute capabilities that share their limits."""
    if isinstance(arch, str):
        return arch if arch == "interpreter" else "hip"
    if arch in (90, 100, 103):
        return "sm90" if arch == 90 else "sm100"
    return "sm80" if arch in (80, 87) else "sm86"


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in the table and in tuning files."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")


@functools.cache
def _rank_class(R: int, dropout: bool) -> str:
    return (f"r{max(16, 1 << (R - 1).bit_length())}" if R else "r0") + ("-drop" if dropout else "")


def shape_class(op: str, M: int, K: int, N: int, R: int, dropout: bool = False) -> str:
    """What a tile may depend on: the rank, rounded up, and whether there is a mask. Never the token count M.

    For op "lora_linear", whose choice is a plan, it is the layer: N, K and the rank.
    """
    rank = _rank_class(R, dropout)
    return f"{N}x{K}-{rank}" if op == "lora_linear" else rank


def candidates(op: str, shape: str, dtype: str, arch: int | str) -> list[Tile]:
    """Tiles that may be launched for an op, the shipped choice first."""
    where, rank = family(arch), _rank(shape)
    if where == "interpreter":
        found = _INTERPRETER[op]
    elif dtype == "fp32":
        found = _FLOAT_ELSEWHERE.get((where, op), _FLOAT[op])
    elif op == "fused":
        found = _FUSED[where]
        if shape.endswith("-drop"):
            # the mask of a 256 wide tile does not fit beside its sums in registers
            found = [t for t in found if t.BN == 128]
    elif op == "shrink" and rank > 16 and where in ("sm80", "sm86", "sm100"):
        # four warps cannot hold a tile of x under its mask and the sums in registers
        found = [t for t in _HALF[op] if t.num_warps == 8]
    elif op in _WIDE and rank > 64 and where not in ("sm80", "sm86"):
        found = _WIDE[op]
    else:
        found = _HALF[op]
    return [_fit(op, tile, shape, dtype, where) for tile in found]


def pick(
    op: str,
    shape: str,
    dtype: torch.dtype,
    arch: int | str,
    overrides: Mapping[tuple[str, str, str], Tile] | None = None,
) -> Tile:
    """The tile of an op: the override of (op, shape, dtype's name) if there is one, else the shipped one."""
    key = op, shape, dtype_name(dtype)
    return overrides[key] if overrides and key in overrides else _shipped(*key, arch)


@functools.cache
def _shipped(op, shape, dtype, arch):
    return candidates(op, shape, dtype, arch)[0]


def _rank(shape):
    return int(shape.partition("-")[0][1:])


def _fit(op, tile, shape, dtype, where):
    """The tile with as many stages as the shared memory holds; adapters count as float32, which they may be."""
    if where == "interpreter" or op == "expand":
        return tile
    rank = min(tile.BR, _rank(shape))
    size = 4 if dtype == "fp32" else 2
    stage = {
        "shrink": tile.BM * tile.BK * size + tile.BK * rank * 4,
        "shrink_outer": tile.BM * (tile.BN + rank) * size,
        "outer": tile.BM * (tile.BK + rank) * size,
        "fused": (tile.BM + tile.BN) * tile.BK * size,
        "decode": (tile.BM + tile.BN) * tile.BK * size,
    }[op]
    return tile._replace(num_stages=max(1, min(tile.num_stages, SHARED[where] * 7 // 8 // stage)))
