"""Mixed batches: ``adapter_names`` gives each row of a batch an adapter of its own, or none ("__base__").

PEFT's mixin loops over the adapters of the batch; here all of them are one pass behind the base layer's own call, so
that rows without an adapter keep its bits, or few tokens one pass with it. Whatever PEFT refuses, it refuses by itself:
the call goes to it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peft_fast.ops import Adapter, prepare
from peft_fast.ops.checks import FLOATS
from peft_fast.ops.lora_decode import MOST, WIDE, kernel, most
from peft_fast.ops.lora_mixed import run
from peft_fast.patch import decode, embedding, ledger, plan

BASE = "__base__"


def given(kwargs: dict) -> bool:
    """Is the call one of a mixed batch?"""
    return kwargs.get("adapter_names") is not None


def linear(layer: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
    """x (b, ..., K) -> y (b, ..., N) of a wanted lora.Linear."""
    if not args and len(kwargs) == 1 and (y := _common(layer, x, kwargs["adapter_names"])) is not None:
        return y
    names, reason = names_of(layer, x, args, kwargs)
    found = reason or plan.plan_of(layer, bare=True, names=names)
    reason = found if type(found) is str else refuse_input(x, found)
    ledger.count(layer, reason or None)
    if reason:
        return plan.stock_linear(layer, x, *args, **kwargs)
    owners = owners_of(kwargs["adapter_names"], [name for name in names if name in layer.lora_A._modules])
    return run(x, layer._modules["base_layer"](x), found.adapters, owners)


def _common(layer: nn.Module, x: Tensor, names: Sequence[str]) -> Tensor | None:
    """The common case, on the CPU and without gradients, by as little thought as decode.py takes; else None.

    Few tokens go through W and the adapters in one pass, those of rows without an adapter too: rounded once, as any
    product is, but not the bits of the base layer's own. In a batch of more they are: it runs, the adapters behind it.
    """
    if torch.compiler.is_compiling() or (found := decode.base_of(layer, x)) is None:
        return None
    if (batch := batch_of(layer, x, names)) is None:
        return None
    b, K, size = x.shape[0], x.shape[-1], x.numel()
    W, bias, transposed = found
    if (low := decode.adapters(layer, batch.names, W.dtype)) is None:
        return None
    rank = max(A.shape[0] for A in low[0]) if size > WIDE[1] * K else 0
    if size <= min(MOST, most(x.dtype, transposed, rank)) * K:
        y = kernel()(x, W, bias, *low, transposed, batch.order, batch.counts)
    else:
        y = layer._modules["base_layer"](x)
        if not y.is_contiguous():
            y = y.contiguous()
        tokens = size // (b * K)
        add(y.view(b, tokens, -1), x.reshape(b, tokens, K), low, batch.order, batch.counts)
    prepare.count_call()
    ledger.count(layer, None)
    return y


def add(y: Tensor, x: Tensor, low: Sequence[list], order: list[int], counts: list[int]) -> None:
    """y (b, T, N) += what x (b, T, K) gives with ``low`` of decode.adapters(): counts[i] rows of the i-th adapter."""
    As, Bs, biases, scalings = low
    torch.ops.peft_fast.lora_mixed.default(y, x, As, Bs, biases, order, counts, scalings)


def batch_of(layer: nn.Module, x: Tensor, names: Sequence[str]) -> _Batch | None:
    """The batch that ``names`` makes of x (b, ..., K) in a layer; None where it is none, or no adapter is in it."""
    if type(names) not in (list, tuple) or x.dim() < 2 or len(names) != x.shape[0] or not x.numel():
        return None
    batch, has = _sorted(tuple(names)), layer._modules["lora_A"]._modules
    if not has.keys() >= batch.known:
        batch = _sorted(tuple(name if name in has else BASE for name in names))
    return batch if batch.names else None


class _Batch(NamedTuple):
    """A batch by adapter: ``order`` has the rows of the first of ``names``, counts[0] of them, …, others last."""

    names: tuple[str, ...]
    known: frozenset[str]  # the same
    order: list[int]
    counts: list[int]


@functools.lru_cache(maxsize=64)
def _sorted(names: tuple[str, ...]) -> _Batch:
    """The adapter of each row -> the batch, the same one for every layer and step."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    others = rows.pop(BASE, [])
    order = [row for own in (*rows.values(), others) for row in own]
    return _Batch(tuple(rows), frozenset(rows), order, [len(own) for own in rows.values()])


def embed(layer: nn.Module, ids: Tensor, args: tuple, kwargs: dict) -> Tensor:
    """ids (b, ...) -> y (b, ..., D) of a wanted lora.Embedding."""
    names, reason = names_of(layer, ids, args, kwargs)
    found = reason or embedding.plan_of(layer, names)
    reason = found if type(found) is str else embedding.refuse_input(ids, found, few=False)
    ledger.count(layer, reason or None)
    if reason:
        return plan.stock_embedding(layer, ids, *args, **kwargs)
    W, adapters, padding_idx, scale = found
    if scale is not None:
        adapters = [a._replace(scaling=_scaled(a, scale)) for a in adapters]
    owners = owners_of(kwargs["adapter_names"], [name for name in names if name in layer.lora_embedding_A])
    return run(ids, layer._modules["base_layer"](ids), adapters, owners, padding_idx)


def refuse_input(x: Tensor, found) -> str:
    """Why this input is PEFT's: PEFT would raise, or mix dtypes in its own way."""
    W, _, adapters, transposed = found
    if not plan.plain(x) or x.is_nested or x.dim() < 2:
        return "the input is not a plain dense tensor of rows"
    if x.device != W.device:
        return "input and base weight are on different devices"
    if x.shape[-1] != W.shape[0 if transposed else 1]:
        return "the input's last dimension does not fit the base weight"
    if transposed and not x.is_contiguous():
        return "Conv1D views its input, which is not contiguous"
    if any(a.p > 0 for a in adapters):
        return "dropout in a mixed batch"
    low = adapters[0].A.dtype if adapters else W.dtype
    if x.dtype not in FLOATS or W.dtype not in FLOATS or low not in FLOATS:
        return "a dtype other than float64, float32, bfloat16 and float16"
    if torch.is_autocast_enabled(x.device.type):
        cast = torch.get_autocast_dtype(x.device.type)
        if cast not in plan.NARROW or any(t not in (torch.float32, cast) for t in (x.dtype, W.dtype, low)):
            return "autocast with dtypes other than float32 and its own"
    elif x.dtype is not W.dtype:
        return "input and base weight have different dtypes"
    elif low is not x.dtype and (low is not torch.float32 or x.dtype not in plan.NARROW):
        return "adapters of lower precision than the base, or of float64 beside it"
    return ""


def names_of(layer: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> tuple[list[str], str]:
    """The adapters that the batch names, and why the call is PEFT's whatever they are."""
    names = kwargs["adapter_names"]
    if reason := plan.refuse_call(args, {k: v for k, v in kwargs.items() if k != "adapter_names"}):
        return [], reason
    if torch.compiler.is_compiling():
        return [], "a mixed batch under torch.compile"
    if type(names) not in (list, tuple) or not plan.plain(x) or not x.dim() or len(names) != x.shape[0]:
        return [], "adapter_names does not name an adapter for each row"
    names = list(dict.fromkeys(names))
    if any(layer.use_dora.get(name) for name in names):
        return [], "adapter_names has one with DoRA"
    return [name for name in names if name != BASE], ""


def owners_of(names: Sequence[str], adapters: list[str]) -> list[int]:
    """The number of each row's adapter; -1 for the base, and for one that this layer does not have."""
    number = {name: i for i, name in enumerate(adapters)}
    return [number.get(name, -1) for name in names]


def _scaled(adapter: Adapter, scale: float | Tensor) -> float | Tensor:
    """The adapter's scaling times the base's embed_scale, which PEFT rounds to the adapter's dtype."""
    if not isinstance(scale, Tensor):
        return adapter.scaling * scale
    return adapter.scaling * scale.reshape(()).to(adapter.A.dtype).to(
        torch.promote_types(adapter.A.dtype, torch.float32)
    )
