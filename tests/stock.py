"""PEFT's and transformers' own sequences of torch calls: casts, dropout, products and sums in their order."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from peft_fast.ops import Adapter, Sibling
from peft_fast.reference.lora_mlp import activate


def lora_linear(x: torch.Tensor, layer: Sibling, masks: list) -> torch.Tensor:
    """lora.Linear.forward of PEFT 0.21."""
    W, bias, adapters, transposed = layer
    result = F.linear(x, W.t() if transposed else W, bias)
    dtype = result.dtype
    for a, keep in zip(adapters, masks, strict=True):
        x = x.to(a.A.dtype)
        dropped = x if keep is None else dropout(x, keep, a.p)
        result = result + F.linear(F.linear(dropped, a.A), a.B, a.bias) * a.scaling
    return result.to(dtype)


def lora_mlp(
    x: torch.Tensor, first: list[Sibling], down: Sibling, activation: str, halves: str, p: float, masks: list
) -> torch.Tensor:
    """A model's block, each layer PEFT's; the last of ``masks`` is that of the block's own dropout."""
    masks, outputs = list(masks), []
    for layer in first:
        outputs.append(lora_linear(x, layer, masks[: len(layer.adapters)]))
        del masks[: len(layer.adapters)]
    h = activate(outputs, activation, halves)
    if p > 0:
        h = dropout(h, masks[-1], p)
    return lora_linear(h, down, masks[: len(down.adapters)])


def lora_embedding(
    ids: torch.Tensor, W: torch.Tensor, adapters: list[Adapter], padding_idx: int | None, scale: torch.Tensor | None
) -> torch.Tensor:
    """lora.Embedding.forward of PEFT 0.21 around a base that may be Gemma's."""
    result = F.embedding(ids, W, padding_idx)
    if scale is not None:
        result = result * scale.to(W.dtype)
    dtype = result.dtype
    for A, B, scaling, *_ in adapters:
        low = (F.embedding(ids, A.T, padding_idx) @ B.T) * scaling
        if scale is not None:
            low = low * scale.to(low.dtype)
        result = result + low
    return result.to(dtype)


def dropout(x: torch.Tensor, keep: torch.Tensor, p: float) -> torch.Tensor:
    """nn.Dropout with a given mask."""
    if p >= 1:
        return x * 0
    if x.is_cuda:
        # one kernel, which scales in float32 and rounds once
        return torch.where(keep, x.to(torch.promote_types(x.dtype, torch.float32)) * (1 / (1 - p)), 0).to(x.dtype)
    # on the CPU: noise in x's dtype, divided by 1 - p, times x
    return x * keep.to(x.dtype).div_(1 - p)
