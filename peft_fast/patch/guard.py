"""The guard before PEFT's lora.Linear.forward: vanilla layers run our operators, all others PEFT's own forward.

A refused call gets to the stock forward as it came, so its result is PEFT's bit for bit.
"""

from __future__ import annotations

import functools

import torch

from peft_fast import settings
from peft_fast.ops import lora_decode, lora_linear, prepare
from peft_fast.patch import decode, dora, groups, ledger, mixed, plan, quantized
from peft_fast.patch.marks import wanted


def load() -> None:
    """Imports PEFT; must have run before the guard is called."""
    plan.load()
    dora.load()
    functools.update_wrapper(forward, plan.stock_linear)


def forward(self, x, *args, **kwargs):
    """x (..., K) -> y (..., N): the forward that accelerate() puts on PEFT's lora.Linear."""
    compiling = torch.compiler.is_compiling()
    # the first, as it has the least time
    if not compiling and not args and not kwargs and (y := decode.run(self, x)) is not None:
        return y
    if not wanted(self):
        return plan.stock_linear(self, x, *args, **kwargs)
    if kwargs and mixed.given(kwargs):
        if not compiling and quantized.takes(self):
            return quantized.forward(self, x, *args, **kwargs)
        return mixed.linear(self, x, args, kwargs)
    # compiled code sees all layers at once: it needs nobody to remember what one of them computed for another
    grouped = not compiling and settings.get().groups
    layer = plan.refuse_call(args, kwargs) or dora.plan_of(self) or plan.plan_of(self)
    if type(layer) is str and not compiling and quantized.takes(self):
        return quantized.forward(self, x, *args, **kwargs)
    if type(layer) is dora.Plan:
        return dora.run(self, x, layer)
    if grouped and type(layer) is not str and (y := groups.take(self, x, layer)) is not None:
        ledger.count(self, None)
        return y
    reason = layer if type(layer) is str else plan.refuse_input(self, x, layer)
    if reason:
        ledger.count(self, reason)
        return plan.stock_linear(self, x, *args, **kwargs)
    if prepare.adds_nothing(x, layer.adapters):
        prepare.count_call()
        ledger.count(self, None)
        return self.base_layer(x)
    few = not compiling and decode.late(x, layer)
    y = groups.run(self, x, layer) if grouped and not few else None
    if y is None:
        W, bias, adapters, transposed = layer
        run = lora_decode if few else functools.partial(lora_linear, exact=settings.get().exact)
        y = run(x, W, bias, adapters, transposed=transposed)
    ledger.count(self, None)
    return y
