"""nf4 by one gather of pairs and one product."""

from __future__ import annotations

import torch


def dequantize(W, dtype):
    """Packed -> (N, K) in ``dtype``."""
    data = W.data.reshape(-1).view(torch.uint8)
    n = W.shape[0] * W.shape[1]
    wide = torch.promote_types(dtype, torch.float32)
    scales = absmax(W, wide)
    code = W.code.to(wide)
    # what a byte means: its two values
    pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), 1)  # (256, 2)
    values = pairs.index_select(0, data[: (n + 1) // 2].int()).view(-1)
    whole = n // W.blocksize * W.blocksize
    values[:whole].view(-1, W.blocksize).mul_(scales[: whole // W.blocksize].unsqueeze(1))
    if whole < n:
        values[whole:].mul_(scales[-1])
    return values[:n].view(W.shape).to(dtype)


def absmax(W, wide):
    """The scales of W's blocks in ``wide``."""
    if W.nested is None:
        return W.absmax.view(-1).to(wide)
    code, outer, offset, size = W.nested
    code, outer, offset = code.to(wide), outer.to(wide), offset.to(wide)
    values = code.index_select(0, W.absmax.view(-1).int())
    blocks = values.numel()
    padded = torch.nn.functional.pad(values, (0, -blocks % size)).view(-1, size)
    return (padded * outer.view(-1, 1)).view(-1)[:blocks] + offset
