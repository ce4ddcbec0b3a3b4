"""Norms of DoRA layers that are not training, kept as long as a probe finds W + s·B·A as it was.

A norm costs many products with W, the probe one. Nothing else would tell: PEFT merges into ``weight.data``, which no
version counts.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peft_fast.dispatch import CPU_DTYPES
from peft_fast.ops import Adapter, dora_norm, prepare
from peft_fast.ops.dora_decode import alone, keep, probed
from peft_fast.ops.lora_decode import MOST, TURNED, kernel, most


class Kept(NamedTuple):
    """What was found beside so many tokens, 0 where the probe was alone."""

    tokens: int
    norm: Tensor  # (N,)
    check: Tensor  # (N,): what the probe gave
    rounds: tuple  # what the norm is rounded to: what dora_norm was asked for, and the adapter's dtype


_alone: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()
_beside: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()


def pays(layer: nn.Module, W: Tensor, adapter: Adapter) -> bool:
    """Is a norm to be kept? Where a layer trains, the next call has another one."""
    if layer.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or kernel() is None:
        return False
    # what is traced has no bits to compare
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    A, B, scaling = adapter.A, adapter.B, adapter.scaling
    fits = W.is_cpu and W.dtype in CPU_DTYPES and A.dtype is B.dtype and A.dtype in CPU_DTYPES
    return fits and not isinstance(scaling, Tensor) and W.numel() > 0


def of(layer: nn.Module, W: Tensor, adapter: Adapter, transposed: bool, dtype: torch.dtype | None = None) -> Tensor:
    """dora_norm's (N,), for a layer where it pays."""
    check, rounds = _alone_of(W, adapter, transposed), (dtype, adapter.A.dtype)
    kept = _alone.get(layer)
    if kept is None or kept.rounds != rounds or not _same(kept.check, check):
        norm, steady = computed(W, adapter, transposed, dtype)
        if not steady or not _same(check, _alone_of(W, adapter, transposed)):
            return norm
        kept = _alone[layer] = Kept(0, norm, check, rounds)
    return kept.norm


def computed(W: Tensor, adapter: Adapter, transposed: bool, dtype: torch.dtype | None) -> tuple[Tensor, bool]:
    """The norm, and whether a second look finds it too: a thread may write a weight meanwhile, and take it back."""
    norm, again = (dora_norm(W, adapter, transposed=transposed, dtype=dtype) for _ in range(2))
    return norm, _same(norm, again)


def few(layer: nn.Module, x: Tensor, W: Tensor, adapter: Adapter, m: Tensor, transposed: bool) -> bool:
    """Is x (..., K) for decode(), in a layer where it pays to keep the norm?"""
    if x.dtype is not W.dtype or adapter.p > 0 or adapter.bias is not None or m.dtype not in CPU_DTYPES:
        return False
    tokens, rank = x.shape[:-1].numel(), adapter.A.shape[0]
    fits = 0 < tokens <= min(MOST, most(x.dtype, transposed, rank)) and x.is_cpu
    return fits and not torch.is_autocast_enabled("cpu") and (not transposed or x.is_contiguous())


def decode(
    layer: nn.Module, x: Tensor, W: Tensor, bias: Tensor | None, adapter: Adapter, m: Tensor, transposed: bool
) -> Tensor:
    """x (..., K) of few tokens -> y (..., N); csrc/call.h answers the next such call of a common layer."""
    prepare.count_call()
    tokens, kept, rounds = x.shape[:-1].numel(), _beside.get(layer), (None, adapter.A.dtype)
    if kept is not None and kept.tokens == tokens and kept.rounds == rounds:
        y, check = probed(x, W, bias, adapter, m, kept.norm, transposed)
        if _same(kept.check, check):
            return y
    norm = of(layer, W, adapter, transposed)
    y, check = probed(x, W, bias, adapter, m, norm, transposed)
    # was it this norm's weight all along, from before the norm to after the check? Other threads may have written
    before = _alone.get(layer)
    if before is None or before.norm is not norm or not _same(before.check, _alone_of(W, adapter, transposed)):
        return y
    _beside[layer] = Kept(tokens, norm, check, rounds)
    if not transposed and tokens <= TURNED:
        keep(layer, tokens, adapter.A.dtype, norm, check, x.shape[-1])
    return y


def _alone_of(W: Tensor, adapter: Adapter, transposed: bool) -> Tensor:
    return alone(W, adapter.A, adapter.B, float(adapter.scaling), transposed)


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit."""
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))
