"""W[i] = code[nibble i]·absmax[i // block]: 4-bit values made dense, a byte's two by one lane, scales nested or not.

One pass: reads half a byte a value, writes it once. A block's scale is found in the first-level cache by its lanes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from peft_fast.kernels.device import cdiv, on
from peft_fast.kernels.launch import launch
from peft_fast.kernels.tiles import Tile

# bytes that a program reads: 16 a lane is one load of its own
TILE = Tile(2048, 0, 0, num_warps=4, num_stages=1)


@triton.jit
def _nf4_scale(absmax_ptr, code_ptr, outer_ptr, offset_ptr, block, mask, inner, NESTED: tl.constexpr):
    scale = tl.load(absmax_ptr + block, mask=mask, other=0)
    if NESTED:
        scale = tl.load(code_ptr + scale.to(tl.int32), mask=mask, other=0.0)
        # rounded before the sum: these are launched without fused multiply-adds
        scale = scale * tl.load(outer_ptr + block // inner, mask=mask, other=0.0) + tl.load(offset_ptr)
    return scale


@triton.jit
def _nf4_kernel(
    data_ptr,
    absmax_ptr,
    code_ptr,
    inner_ptr,
    outer_ptr,
    offset_ptr,
    W_ptr,
    n,
    size,
    inner,
    NESTED: tl.constexpr,
    EVEN: tl.constexpr,
    BYTES: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    first = 2 * places
    mask = first < n
    pair = tl.load(data_ptr + places, mask=mask, other=0).to(tl.int32)
    left = _nf4_scale(absmax_ptr, inner_ptr, outer_ptr, offset_ptr, first // size, mask, inner, NESTED)
    right = left
    if not EVEN:
        # the second of a byte may belong to the next block
        more = first + 1 < n
        right = _nf4_scale(absmax_ptr, inner_ptr, outer_ptr, offset_ptr, (first + 1) // size, more, inner, NESTED)
    left *= tl.load(code_ptr + (pair >> 4))
    right *= tl.load(code_ptr + (pair & 15))
    values = tl.reshape(tl.join(left, right), (2 * BYTES,)).to(W_ptr.dtype.element_ty)
    at = 2 * BYTES * tl.program_id(0).to(tl.int64) + tl.arange(0, 2 * BYTES)
    tl.store(W_ptr + at, values, mask=at < n)


def dequantize(data, absmax, code, size, shape, dtype, nested=None):
    """data (⌈n/2⌉,) uint8, absmax (⌈n/size⌉,), code (16,) float32 -> W (N, K) in ``dtype``, n = N·K, rounded once.

    ``nested`` = (code (256,), absmax, offset (), size): absmax then holds uint8 and is quantized itself.
    """
    W = torch.empty(shape, dtype=dtype, device=data.device)
    n = W.numel()
    inner, outer, offset, inner_size = nested or (None, None, None, 1)
    if n:
        with on(data):
            launch(
                _nf4_kernel,
                (cdiv(n, 2 * TILE.BM),),
                (data, absmax, code, inner, outer, offset, W),
                (),
                (n, size, inner_size),
                (nested is not None, size % 2 == 0, TILE.BM),
                TILE,
                enable_fp_fusion=False,
            )
    return W
