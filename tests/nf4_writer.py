"""Writes 4-bit weights as bitsandbytes stores them, from nothing but the format's description."""

from __future__ import annotations

import torch

from peft_fast.ops.nf4 import Nested, Packed

# QLoRA, appendix E: quantiles of a normal distribution, an exact zero, ends at ±1
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
# sign, two bits of exponent, one of mantissa
_magnitudes = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
FP4 = torch.tensor([sign * m / 12 for sign in (1, -1) for m in _magnitudes])
INNER = torch.linspace(-1, 1, 256)


def write(W: torch.Tensor, code: torch.Tensor = NF4, blocksize: int = 64, nested: bool = False) -> Packed:
    """W (N, K) float32 -> Packed: blocks along the rows, over their ends; the first value in the high half."""
    flat = W.detach().float().reshape(-1)
    blocks = flat.split(blocksize) if flat.numel() else ()
    absmax = torch.stack([block.abs().max() for block in blocks]) if blocks else flat.new_empty(0)
    inner = None
    if nested:
        offset = absmax.mean()
        parts = (absmax - offset).split(256)
        outer = torch.stack([part.abs().max() for part in parts])
        scaled = torch.cat([part / largest for part, largest in zip(parts, outer, strict=True)])
        absmax = (scaled[:, None] - INNER).abs().argmin(1).to(torch.uint8)
        inner = Nested(INNER, outer, offset, 256)
    scales = torch.stack([block.abs().max() for block in blocks]) if blocks else absmax
    normal = flat / scales.repeat_interleave(blocksize)[: flat.numel()]
    nibbles = (normal[:, None] - code).abs().argmin(1).to(torch.uint8)
    if nibbles.numel() % 2:
        nibbles = torch.cat((nibbles, nibbles.new_zeros(1)))
    data = (nibbles[::2] << 4 | nibbles[1::2]).unsqueeze(1)
    return Packed(data, absmax, code, blocksize, tuple(W.shape), inner)
