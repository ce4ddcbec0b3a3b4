"""nf4 by the compiled operators: a block's 16 products are made once, then looked up."""

from __future__ import annotations

import torch


def dequantize(W, dtype):
    """Packed -> (N, K) in ``dtype``, float32 or bfloat16."""
    data = W.data.reshape(-1).view(torch.uint8)
    return torch.ops.peft_fast.nf4(data, scales(W), W.code.contiguous(), W.blocksize, *W.shape, dtype == torch.bfloat16)


def scales(W):
    """The scales of W's blocks, float32."""
    absmax = W.absmax.reshape(-1).contiguous()
    if W.nested is None:
        return absmax
    code, outer, offset, size = W.nested
    return torch.ops.peft_fast.nf4_scales(absmax, code.contiguous(), outer.contiguous(), offset, size)
