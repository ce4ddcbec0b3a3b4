"""The guard before the forward of PEFT's lora.Conv1d, Conv2d and Conv3d: a kernel of size 1 is a linear layer.

It reads the channels of a pixel as lora_linear reads a token. An input in channels-last order is one as it lies; one in
channels-first order is copied into it, and the result back, which pays where the stock layer casts or drops.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peft_fast import settings
from peft_fast.ops import Adapter, Sibling, lora_linear, packing
from peft_fast.patch import ledger, plan
from peft_fast.patch.marks import wanted

BASES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

# PEFT's class of all three, the three, and the forward PEFT gave them
ConvNd = stock = None
kinds: tuple[type, ...] = ()
# frozen base -> its weight, weakly, and that weight's (N, C) view, one object for as long as the weight is one
_flat: weakref.WeakKeyDictionary[nn.Module, tuple] = weakref.WeakKeyDictionary()


class Plan(NamedTuple):
    """A convolution as lora_linear takes it."""

    linear: Sibling
    stride: tuple[int, ...]
    channels_last: bool  # the weight's own order, which makes the result's


def load() -> None:
    """Imports PEFT and remembers its forward, once."""
    global ConvNd, stock, kinds
    plan.load()
    if ConvNd is None:
        from peft.tuners.lora import layer

        stock, kinds = layer._ConvNd.forward, (layer.Conv1d, layer.Conv2d, layer.Conv3d)
        ConvNd = layer._ConvNd
        functools.update_wrapper(forward, stock)


def forward(self, x, *args, **kwargs):
    """x (B, C, ...) -> y (B, N, ...): the forward that accelerate() puts on PEFT's convolutions."""
    if not wanted(self):
        return stock(self, x, *args, **kwargs)
    found = plan.refuse_call(args, kwargs) or plan_of(self)
    reason = found if type(found) is str else refuse_input(self, x, found)
    ledger.count(self, reason or None)
    return stock(self, x, *args, **kwargs) if reason else _run(x, found)


def _run(x: Tensor, found: Plan) -> Tensor:
    (W, bias, adapters, _), stride, channels_last = found
    channels_last = channels_last or _is_channels_last(x)
    if any(s > 1 for s in stride):
        x = x[(..., *(slice(None, None, s) for s in stride))]
    y = lora_linear(x.movedim(1, -1).contiguous(), W, bias, adapters, exact=settings.get().exact).movedim(-1, 1)
    return y if channels_last else y.contiguous()


def plan_of(layer: nn.Module) -> Plan | str:
    """A PEFT convolution -> what lora_linear needs to run it, or why PEFT keeps it."""
    if type(layer) not in kinds:
        return f"{type(layer).__name__} is not one of PEFT's plain convolutions"
    if reason := plan.out_of_use(layer):
        return reason
    base = layer._modules["base_layer"]
    if type(base) not in BASES:
        return f"the base layer is a {type(base).__name__}, not nn.Conv1d, nn.Conv2d or nn.Conv3d"
    if base.groups != 1 or any(size != 1 for size in base.kernel_size):
        return "a convolution whose kernel is not of size 1, or with groups"
    if any(base.padding) if type(base.padding) is tuple else base.padding not in ("valid", "same"):
        return "a convolution that pads"
    if plan.hooked(base):
        return "hooks or a replaced forward on the base layer"
    if plan.hooks_everywhere():
        return "hooks registered for all modules"
    W, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if not plan.plain(W) or not (bias is None or plan.plain(bias)):
        return "the base weight is not a plain dense tensor (quantized, sharded, parametrized)"
    if bias is not None and bias.dtype is not W.dtype:
        return "the base weight and its bias have different dtypes"
    if W.device.type not in plan.DEVICES:
        return f"the base weight is on {W.device.type}"
    adapters = _adapters(layer, base, W)
    if type(adapters) is str:
        return adapters
    return Plan(Sibling(_flattened(base, W), bias, adapters), base.stride, _is_channels_last(W))


def _adapters(layer: nn.Module, base: nn.Module, W: Tensor) -> list[Adapter] | str:
    """The active adapters as those of a linear layer, or why PEFT keeps them."""
    adapters = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if name in layer.lora_variant:
            return f"{type(layer.lora_variant[name]).__name__} keeps PEFT's forward"
        lora_A, lora_B, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        adapter = plan.adapter_of(lora_A, lora_B, dropout, layer.scaling[name], type(base))
        if type(adapter) is str:
            return adapter
        if any(s != 1 for conv in (lora_A, lora_B) for s in (*conv.kernel_size, conv.groups)):
            return "lora_A or lora_B is not a convolution with a kernel of size 1"
        if lora_A.stride != base.stride or lora_A.padding != base.padding or any(s != 1 for s in lora_B.stride):
            return "lora_A and the base layer move differently"
        if adapter.A.device != W.device or adapter.B.device != W.device:
            return "adapter and base weight are on different devices"
        if adapters and adapter.A.dtype is not adapters[0].A.dtype:
            return "active adapters have different dtypes"
        adapters.append(adapter._replace(A=adapter.A.flatten(1), B=adapter.B.flatten(1)))
    return adapters or "no active adapter in this layer"


def refuse_input(layer: nn.Module, x: Tensor, found: Plan) -> str:
    """Why this input of a plannable layer is PEFT's."""
    if not plan.plain(x) or x.is_nested or x.dim() != len(found.stride) + 2:
        return "the input is not a plain dense batch"
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if x.dim() == 5 and dtype is torch.float16:
        return "a three-dimensional convolution in float16, whose results torch orders in another way"
    if not _is_channels_last(x):
        if not x.is_contiguous():
            return "the input lies neither in channels-first nor in channels-last order"
        if x.is_cuda:
            return "an input in channels-first order, on a GPU"
        adapters = found.linear.adapters
        if not any(a.p > 0 for a in adapters) and (dtype not in plan.NARROW or adapters[0].A.dtype is dtype):
            return "an input in channels-first order, which PEFT neither drops nor casts: there is nothing to gain"
    return plan.refuse_input(layer, x.movedim(1, -1), found.linear)


def _is_channels_last(t: Tensor) -> bool:
    """Is it, and not channels-first as well? As torch decides it for a result."""
    order = CHANNELS_LAST.get(t.dim())
    return order is not None and t.is_contiguous(memory_format=order) and t.stride(-1) == t.shape[1] > 1


def _flattened(base: nn.Module, W: Tensor) -> Tensor:
    """W (N, C, 1, ...) -> its view (N, C): always the same one where packed copies are kept, which know it by that."""
    if W.requires_grad or torch.compiler.is_compiling() or W.is_inference():
        return W.flatten(1)
    if not W.is_cpu or not packing.budget():
        # a view that is kept keeps the memory of a weight that was moved or replaced since
        _flat.pop(base, None)
        return W.detach().flatten(1)
    known = _flat.get(base)
    if known is None or known[0]() is not W or known[1].data_ptr() != W.data_ptr() or known[1].dtype is not W.dtype:
        # without its parameter's graph, of which a frozen one has none
        known = _flat[base] = weakref.ref(W), W.detach().flatten(1)
    return known[1]


def forget(modules: Iterable[nn.Module] | None = None) -> None:
    """Drops the views of these bases, or all, and with them the memory of weights that have moved away."""
    for base in list(_flat) if modules is None else [m for m in modules if isinstance(m, BASES)]:
        _flat.pop(base, None)
