"""bitsandbytes' 4-bit layers on the CPU, which pack themselves for inference: unpacked before a gradient is needed.

In evaluation Linear4bit packs its weight for processors with AVX512BF16, for good, and the packed product has no
backward: what lies below trains no more, silently. bitsandbytes' own inverse, applied where a state dict is asked for,
leaves the scales as the packing rounded them, and in another order if they are not quantized themselves. So those of
before are kept beside the packed ones, and put back with the weight.
"""

from __future__ import annotations

import copy
import functools
import sys
import threading
import warnings
import weakref

import torch
from torch import Tensor, nn

from peft_fast.patch.marks import MARK, state

# of a QuantState: what packing overwrites, kept in its __dict__ under KEPT so that copies and pickles have it
SCALES = ("absmax", "nested", "state2", "offset", "dtype")
KEPT = "_peft_fast_scales"

# bitsandbytes' Linear4bit -> the forward that it had before ours, and whether ours is on
_stock: dict[type, object] = {}
_on: set[type] = set()
# id of a weight -> the lock of who packs, unpacks or multiplies by it in evaluation, as bitsandbytes reads the weight
# and its QuantState one after the other; and what takes it away with the weight
_locks: dict[int, tuple[threading.RLock, weakref.ref]] = {}
_new = threading.Lock()


def install() -> None:
    """Puts the guard on bitsandbytes' class, if that is loaded and has none: who patched it since then stays on top."""
    kind = getattr(getattr(sys.modules.get("bitsandbytes"), "nn", None), "Linear4bit", None)
    if isinstance(kind, type) and "forward" in kind.__dict__ and kind not in _on:
        _on.add(kind)
        _stock[kind] = kind.forward
        kind.forward = forward


def uninstall() -> None:
    """Gives the class its forward back, if nobody has replaced the guard since."""
    for kind, stock in _stock.items():
        if kind.__dict__.get("forward") is forward:
            kind.forward = stock
            _on.discard(kind)


def forward(self, x, *args, **kwargs):
    """The forward that accelerate() puts on Linear4bit: also layers without an adapter pass gradients on."""
    stock = _stock.get(type(self)) or next(_stock[kind] for kind in type(self).__mro__ if kind in _stock)
    asked, W = MARK in self.__dict__ or state.everywhere, self._parameters.get("weight")
    if not asked or state.off or torch.compiler.is_compiling() or not isinstance(x, Tensor) or W is None:
        return stock(self, x, *args, **kwargs)
    if self.training:  # nothing is packed
        ready(self, x)
        return stock(self, x, *args, **kwargs)
    with _lock_of(W):
        if packed(self) and not x.requires_grad:
            return stock(self, x, *args, **kwargs)
        ready(self, x)
        before, packs = getattr(W, "quant_state", None), x.is_cpu and getattr(self, "support_avx512bf16_for_cpu", False)
        if before is None or packed(self) or x.requires_grad or not packs:
            return stock(self, x, *args, **kwargs)
        # packing changes the QuantState that it finds, also under calls whose backward is yet to come
        now = copy.copy(before)
        now.__dict__[KEPT] = {name: value for name, value in before.__dict__.items() if name in SCALES}
        _set_state(self, before, now)
        try:
            return stock(self, x, *args, **kwargs)
        finally:
            if not packed(self):
                _set_state(self, now, before)


def _lock_of(W):
    key = id(W)
    found = _locks.get(key)
    if found is None:
        with _new:
            if (found := _locks.get(key)) is None:
                found = _locks[key] = threading.RLock(), weakref.ref(W, lambda _: _locks.pop(key, None))
    return found[0]


def _set_state(base, old, new):
    """Gives a layer another QuantState, where it has the old one."""
    if base.weight.quant_state is old:
        base.weight.quant_state = new
    if base.__dict__.get("quant_state") is old:
        base.quant_state = new


def ready(base: nn.Module, x: Tensor) -> str:
    """Has Linear4bit differentiate its call with x if that needs a gradient; why it cannot, if so."""
    if getattr(base._parameters.get("weight"), "quant_state", None) is None:
        return ""
    needed = (base.training or (x.requires_grad and torch.is_grad_enabled())) and not state.paused
    # scales beside a weight that is not packed: bitsandbytes unpacked it, for a state dict, or another thread packs it
    if not (needed if packed(base) else kept(base.weight.quant_state)):
        return ""
    with _lock_of(base.weight):  # another thread may have done something by now
        if packed(base):
            return unpack(base) if needed else ""
        if kept(before := base.weight.quant_state):
            now = copy.copy(before)
            _put_back(now, base.weight.device)
            _set_state(base, before, now)
    return ""


def kept(found: object) -> bool:
    """Has a QuantState the scales from before the weight was packed?"""
    return KEPT in found.__dict__


def packed(base: nn.Module) -> bool:
    """Is the weight of a Linear4bit packed for inference?"""
    found = getattr(base._parameters.get("weight"), "quant_state", None)
    return found is not None and bool(found.__dict__.get("packing_format_for_cpu"))


def unpack(base: nn.Module) -> str:
    """Makes the packed weight of a Linear4bit what it was; why not, if that cannot be."""
    inverse = getattr(sys.modules["bitsandbytes"].functional, "_convert_weight_packed_for_cpu_inverse", None)
    if inverse is None:
        return _warn()
    W, before = base.weight, base.weight.quant_state
    data, now = inverse(W.data, copy.copy(before))
    if kept(now):
        _put_back(now, W.device)
    elif not now.nested and now.absmax is before.absmax:
        # nobody saw it being packed: at least the same scales in the weight's order
        now.absmax = before.absmax.t().reshape(-1).float()
    W.data = data
    _set_state(base, before, now)
    return ""


def _put_back(found, device):
    found.__dict__.update(found.__dict__.pop(KEPT))
    if found.absmax.device != device:
        found.to(device)


@functools.cache
def _warn() -> str:
    why = "bitsandbytes has packed the weight for inference, and cannot unpack it for a gradient"
    warnings.warn(f"peft_fast: {why}; load the model again to train it", stacklevel=2)
    return why
