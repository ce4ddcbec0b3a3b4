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


def lora_add(base: torch.Tensor, x: torch.Tensor, adapters: list[Adapter], masks: list) -> torch.Tensor:
    """What lora.bnb.Linear4bit.forward of PEFT 0.21 adds to its base's result."""
    for a, keep in zip(adapters, masks, strict=True):
        x = x.to(a.A.dtype)
        dropped = x if keep is None else dropout(x, keep, a.p)
        base = base + (F.linear(F.linear(dropped, a.A), a.B, a.bias) * a.scaling).to(base.dtype)
    return base


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


def lora_mixed(
    x: torch.Tensor, base: torch.Tensor, adapters: list[Adapter], owners: tuple[int, ...], padding_idx: int | None
) -> torch.Tensor:
    """_mixed_batch_forward of PEFT 0.21, of lora.Linear or, for tokens, lora.Embedding."""
    result = base.clone()  # PEFT writes into it
    for i, (A, B, scaling, _, bias) in enumerate(adapters):
        rows = [row for row, owner in enumerate(owners) if owner == i]
        if not rows:
            continue
        if x.is_floating_point():
            low = F.linear(F.linear(x[rows].to(A.dtype), A), B, bias) * scaling
            result[rows] += low.to(base.dtype)
        else:
            result[rows] += (F.embedding(x[rows], A.T, padding_idx) @ B.T) * scaling
    return result


def dora_linear(x: torch.Tensor, layer: Sibling, m: torch.Tensor, masks: list) -> torch.Tensor:
    """lora.Linear.forward of PEFT 0.21 with DoraLinearVariant's."""
    W, bias, (a,), transposed = layer
    result = F.linear(x, W.t() if transposed else W, bias)
    dtype = result.dtype
    x = x.to(a.A.dtype)
    base, (keep,) = result, masks
    if keep is not None:
        x, base = dropout(x, keep, a.p), None
    eye = torch.eye(a.A.shape[1], dtype=a.A.dtype, device=x.device)
    delta = F.linear(F.linear(eye, a.A), a.B).T.to(x.dtype)
    W = (W.t() if transposed else W).to(x.dtype)
    scale = (m / _norm(W, delta, a.scaling)).view(1, -1)
    low = F.linear(F.linear(x, a.A), a.B)
    if base is None:
        base = F.linear(x, W)
    elif bias is not None:
        base = base - bias
    return (result + ((scale - 1) * base + scale * low * a.scaling)).to(dtype)


def dora_embedding(
    ids: torch.Tensor, W: torch.Tensor, a: Adapter, m: torch.Tensor, padding_idx: int | None, scale: torch.Tensor | None
) -> torch.Tensor:
    """lora.Embedding.forward of PEFT 0.21 with DoraEmbeddingVariant's, around a base that may be Gemma's."""
    result = F.embedding(ids, W, padding_idx)
    if scale is not None:
        result = result * scale.to(W.dtype)
    dtype = result.dtype
    c = m / _norm(W.T, (a.A.T @ a.B.T).T, a.scaling)
    low = c * (F.embedding(ids, a.A.T, padding_idx) @ a.B.T) * a.scaling
    if scale is not None:
        low = low * scale.to(low.dtype)
    return (c * result + low).to(dtype)


def _norm(W, delta, scaling):
    weight = W + scaling * delta.detach()
    return torch.linalg.norm(weight, dim=1).to(weight.dtype).detach()


def lora_experts(
    x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None, adapters: list[Adapter], counts: list, transposed: bool
) -> torch.Tensor:
    """lora.ParamWrapper of PEFT 0.21 around transformers' grouped_mm: W + s·B·A of all experts in W's dtype."""
    (E, K, N) = W.shape if transposed else (W.shape[0], W.shape[2], W.shape[1])
    factors = [(A.reshape(E, -1, K), B.reshape(N, -1, E).permute(2, 0, 1), s) for A, B, s, *_ in adapters]
    if len(factors) == 1:
        ((A, B, s),) = factors
        left, right = (A.mT, B.mT) if transposed else (B, A)
        W = torch.baddbmm(W, left.to(W.dtype), right.to(W.dtype), alpha=float(s))
    elif factors:
        deltas = [(torch.bmm(A.mT, B.mT) if transposed else torch.bmm(B, A)) * s for A, B, s in factors]
        W = W + sum(delta.to(W.dtype) for delta in deltas)
    y = [xe.to(W.dtype) @ (We if transposed else We.mT) for xe, We in zip(x.split(counts), W, strict=True)]
    if bias is not None:
        y = [ye + be for ye, be in zip(y, bias, strict=True)]
    return torch.cat(y)


def dropout(x: torch.Tensor, keep: torch.Tensor, p: float) -> torch.Tensor:
    """nn.Dropout with a given mask."""
    if p >= 1:
        return x * 0
    if x.is_cuda:
        # one kernel, which scales in float32 and rounds once
        return torch.where(keep, x.to(torch.promote_types(x.dtype, torch.float32)) * (1 / (1 - p)), 0).to(x.dtype)
    # on the CPU: noise in x's dtype, divided by 1 - p, times x
    return x * keep.to(x.dtype).div_(1 - p)
