"""W[i] = code[nibble i]·absmax[i // blocksize], the definition of a 4-bit weight as bitsandbytes keeps it."""

from __future__ import annotations

import torch


def dequantize(data, absmax, code, blocksize, shape, nested=None):
    """data (⌈n/2⌉,) uint8, earlier value in the high nibble, absmax (⌈n/blocksize⌉,), code (16,) -> W (N, K).

    ``nested`` = (code (256,), absmax, offset, blocksize): absmax then holds uint8 and is quantized itself.
    """
    n = shape[0] * shape[1]
    if nested is not None:
        code2, absmax2, offset, blocksize2 = nested
        absmax = code2[absmax.long()] * absmax2.repeat_interleave(blocksize2)[: absmax.numel()] + offset
    nibbles = torch.stack((data >> 4, data & 15), -1).reshape(-1)[:n]
    return (code[nibbles.long()] * absmax.repeat_interleave(blocksize)[:n]).view(shape)
