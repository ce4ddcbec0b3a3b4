"""Norms of DoRA layers that are not training, kept as long as a probe finds W + s·B·A as it was.

A norm costs many products with W, the probe one. Nothing else would tell: PEFT merges into ``weight.data``, which no
version counts.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peft_fast.ops import Adapter, dora_norm, prepare
from peft_fast.ops.dora_decode import keep, probe, probed
from peft_fast.ops.lora_decode import MOST, kernel, most

DTYPES = (torch.float32, torch.bfloat16)


class Kept(NamedTuple):
    """What was found beside so many tokens, 0 where the probe was alone."""

    tokens: int
    norm: Tensor  # (N,)
    check: Tensor  # (N,): what the probe gave
    dtype: torch.dtype | None  # as dora_norm takes it


_alone: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()
_beside: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()


def pays(layer: nn.Module, W: Tensor, adapter: Adapter) -> bool:
    """Is a norm to be kept? Where a layer trains, the next call has another one."""
    if layer.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or kernel() is None:
        return False
    A, B, scaling = adapter.A, adapter.B, adapter.scaling
    fits = W.is_cpu and W.dtype in DTYPES and A.dtype is B.dtype and A.dtype in DTYPES
    return fits and not isinstance(scaling, Tensor) and W.numel() > 0


def of(layer: nn.Module, W: Tensor, adapter: Adapter, transposed: bool, dtype: torch.dtype | None = None) -> Tensor:
    """dora_norm's (N,), for a layer where it pays."""
    given = probe(W.shape[0 if transposed else 1]).unsqueeze(0)
    low = [adapter.A], [adapter.B], [None], [float(adapter.scaling)]
    check = kernel()(given, W, None, *low, transposed).squeeze(0)
    kept = _alone.get(layer)
    if kept is None or kept.dtype is not dtype or not _same(kept.check, check):
        kept = _alone[layer] = Kept(0, dora_norm(W, adapter, transposed=transposed, dtype=dtype), check, dtype)
    return kept.norm


def few(layer: nn.Module, x: Tensor, W: Tensor, adapter: Adapter, m: Tensor, transposed: bool) -> bool:
    """Is x (..., K) for decode(), in a layer where it pays to keep the norm?"""
    if x.dtype is not W.dtype or adapter.p > 0 or adapter.bias is not None or m.dtype not in DTYPES:
        return False
    tokens, rank = x.shape[:-1].numel(), adapter.A.shape[0]
    fits = 0 < tokens <= min(MOST, most(x.dtype, transposed, rank)) and x.is_cpu
    return fits and not torch.is_autocast_enabled("cpu") and (not transposed or x.is_contiguous())


def decode(
    layer: nn.Module, x: Tensor, W: Tensor, bias: Tensor | None, adapter: Adapter, m: Tensor, transposed: bool
) -> Tensor:
    """x (..., K) of few tokens -> y (..., N); csrc/layer.h answers the next such call of a common layer."""
    prepare.count_call()
    tokens, kept = x.shape[:-1].numel(), _beside.get(layer)
    if kept is not None and kept.tokens == tokens:
        y, check = probed(x, W, bias, adapter, m, kept.norm, transposed)
        if _same(kept.check, check):
            return y
    norm = of(layer, W, adapter, transposed)
    y, check = probed(x, W, bias, adapter, m, norm, transposed)
    _beside[layer] = Kept(tokens, norm, check, None)
    if not transposed:
        keep(layer, tokens, norm, check, x.shape[-1])
    return y


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit."""
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))
