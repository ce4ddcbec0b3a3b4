"""The guards before the forwards of PEFT's LoRA layers over quantized bases: bitsandbytes, torchao and HQQ.

y = base(x) + s·drop(x)·Aᵀ·Bᵀ either as one product with the weight made dense for it (lora_quantized), where the base's
library would do the same, or with the base called as it is and the adapters added (lora_add; few tokens without
gradients and mixed batches in place, by lora_mixed).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peft_fast import dispatch, settings
from peft_fast.ops import Adapter, lora_add, lora_quantized, prepare
from peft_fast.ops.checks import FLOATS
from peft_fast.ops.dropout import native_mask
from peft_fast.ops.lora_decode import kernel
from peft_fast.ops.lora_mixed import run
from peft_fast.patch import decode, ledger, mixed, packed, plan, unpacking
from peft_fast.patch.marks import wanted

FEW = 127  # tokens up to which a library's own product may be the fastest

# the library that makes the base, PEFT's module and class for it
CLASSES = (
    ("bitsandbytes", "peft.tuners.lora.bnb", "Linear4bit"),
    ("bitsandbytes", "peft.tuners.lora.bnb", "Linear8bitLt"),
    ("hqq", "peft.tuners.lora.hqq", "HqqLoraLinear"),
    ("torchao", "peft.tuners.lora.torchao", "TorchaoLoraLinear"),
)
# fingerprints of forwards that were read: those of PEFT 0.19.0 to 0.21.2
KNOWN = {
    "Linear4bit": ("334a63c2320f1a63",),
    "Linear8bitLt": ("0250f322e48b8137",),
    "HqqLoraLinear": ("862737945a4b472e",),
}

# PEFT's class -> its own forward
_stock: dict[type, object] = {}


class Plan(NamedTuple):
    """A layer as it is now."""

    base: packed.Base
    adapters: list[Adapter]
    device: torch.device


@functools.cache
def load() -> None:
    """Finds PEFT's classes for the libraries that are installed; must have run before the guard is called."""
    plan.load()
    for library, module, name in CLASSES:
        if (kind := _class(library, module, name)) is not None and known(kind):
            # a class without a forward of its own inherits lora.Linear's, which may have its guard by now
            _stock[kind] = kind.__dict__.get("forward", plan.stock_linear)


def _class(library, module, name):
    try:
        if importlib.util.find_spec(library) is None:
            return None
        return getattr(importlib.import_module(module), name, None)
    except (
        ImportError,
        ValueError,
        RuntimeError,
        OSError,
    ):  # installed, and broken
        return None


def known(kind: type) -> bool:
    """Is the class's forward one that was read?"""
    from peft_fast.patch.known import fingerprint

    if "forward" not in kind.__dict__:
        return kind.__mro__[1] is plan.Linear
    try:
        return fingerprint((kind.forward,)) in KNOWN.get(kind.__name__, ())
    except (OSError, TypeError):
        return False


def kinds() -> tuple[type, ...]:
    """PEFT's classes that have a guard."""
    return tuple(_stock)


def install() -> None:
    """Puts the guard on PEFT's classes for quantized bases."""
    load()
    for kind in _stock:
        kind.forward = forward
    unpacking.install()


def uninstall() -> None:
    """Gives the classes their own forward back, if nobody has replaced the guard since."""
    unpacking.uninstall()
    for kind, stock in _stock.items():
        if kind.__dict__.get("forward") is forward:
            if stock is plan.stock_linear:
                del kind.forward
            else:
                kind.forward = stock


def stock_forward(layer: nn.Module):
    """PEFT's own forward of a layer's class."""
    if takes(layer):
        return plan.stock_linear
    return next(_stock[kind] for kind in type(layer).__mro__ if kind in _stock)


def takes(layer: nn.Module) -> bool:
    """Is it PEFT's plain layer on bitsandbytes' one, as in a model that does not say it is loaded in few bits?"""
    return type(layer) is plan.Linear and packed.bitsandbytes_makes(layer._modules["base_layer"])


def forward(self, x, *args, **kwargs):
    """x (..., K) -> y (..., N): the forward that accelerate() puts on PEFT's classes for quantized bases.

    The guard of lora.Linear calls it for what takes() finds.
    """
    if not wanted(self):
        return stock_forward(self)(self, x, *args, **kwargs)
    if torch.compiler.is_compiling():
        ledger.count(self, "a quantized base under torch.compile")
        return stock_forward(self)(self, x, *args, **kwargs)
    if kwargs and mixed.given(kwargs):
        return _mixed(self, x, args, kwargs)
    if not args and not kwargs and (y := _few(self, x)) is not None:
        return y
    found = plan.refuse_call(args, kwargs) or _unpacked(self, x) or plan_of(self)
    reason = found if type(found) is str else refuse_input(self, x, found)
    ledger.count(self, reason or None)
    if reason:
        return stock_forward(self)(self, x, *args, **kwargs)
    if packed.settle(self.base_layer, x):
        found = plan_of(self)
    exact = settings.get().exact
    if multiplies(self, x, found) and not _called(self, x):
        y = lora_quantized(x, found.base.W, found.base.bias, found.adapters, exact=exact)
        return y.to(x.dtype) if found.base.widens else y
    return lora_add(self.base_layer(x), x, found.adapters, exact=exact)


def _tokens(x: Tensor) -> int:
    return x.shape[:-1].numel()


def _called(layer: nn.Module, x: Tensor) -> bool:
    """Is the base's own call faster than our product with the same weight?"""
    if layer.training or torch.is_grad_enabled() or not x.is_cpu or (tokens := _tokens(x)) > FEW:
        return False
    return packed.calls(layer._modules["base_layer"], tokens, x.dtype)


def _unpacked(layer: nn.Module, x: Tensor) -> str:
    """Why the base cannot be differentiated, after what can be done about it."""
    return unpacking.ready(layer._modules["base_layer"], x) if isinstance(x, Tensor) else ""


def _mixed(layer: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
    """x (b, ..., K) -> y (b, ..., N) of a batch whose rows have adapters of their own."""
    if not args and len(kwargs) == 1 and (y := _each(layer, x, kwargs["adapter_names"])) is not None:
        return y
    names, reason = mixed.names_of(layer, x, args, kwargs)
    found = reason or _unpacked(layer, x) or plan_of(layer, names)
    reason = found if type(found) is str else _refuse_mixed(layer, x, found)
    ledger.count(layer, reason or None)
    if reason:
        return stock_forward(layer)(layer, x, *args, **kwargs)
    owners = mixed.owners_of(kwargs["adapter_names"], [name for name in names if name in layer.lora_A._modules])
    return run(x, layer.base_layer(x), found.adapters, owners)


def _few(layer: nn.Module, x: Tensor) -> Tensor | None:
    """Few tokens in evaluation without gradients, where the base is called; None: the call goes the long way."""
    if type(x) is not Tensor or not x.dim() or not _called(layer, x) or not (tokens := _tokens(x)):
        return None
    names = layer._active_adapter
    if (low := _adapters(layer, x, (names,) if type(names) is str else names)) is None:
        return None
    if (y := _result(layer, x)) is None:
        return None
    rows = y.view(1, tokens, -1), x.reshape(1, tokens, -1)
    if len(low[0]) == 1:
        mixed.add(*rows, low, [0], [1])
    else:  # one after the other, as they add to the same rows
        for each in zip(*low, strict=True):
            mixed.add(*rows, [[part] for part in each], [0], [1])
    prepare.count_call()
    ledger.count(layer, None)
    return y


def _each(layer: nn.Module, x: Tensor, given: Sequence[str]) -> Tensor | None:
    """The same of a mixed batch of any size."""
    if torch.is_grad_enabled() or type(x) is not Tensor or (batch := mixed.batch_of(layer, x, given)) is None:
        return None
    if (low := _adapters(layer, x, batch.names)) is None or (y := _result(layer, x)) is None:
        return None
    b = x.shape[0]
    mixed.add(y.view(b, -1, y.shape[-1]), x.reshape(b, -1, x.shape[-1]), low, batch.order, batch.counts)
    prepare.count_call()
    ledger.count(layer, None)
    return y


def _adapters(layer: nn.Module, x: Tensor, names: Sequence[str]) -> tuple[list, list, list, list] | None:
    """As decode.adapters() of a layer whose base gives a result that nothing else has, and can be added to."""
    if x.dtype not in decode.DTYPES or not x.is_cpu or x.layout is not torch.strided or x.is_nested:
        return None
    if type(layer) not in _stock and not takes(layer) or not packed.plain(layer._modules["base_layer"]):
        return None
    if layer._disable_adapters or layer.merged_adapters or torch.is_autocast_enabled("cpu"):
        return None
    if plan.hooked(layer._modules["base_layer"]) or plan.hooks_everywhere() or plan.refuse_call((), {}):
        return None
    if kernel() is None or settings.get().exact:
        return None
    low = decode.adapters(layer, names, x.dtype)
    fits = low is not None and low[0] and all(A.shape[1] == x.shape[-1] and A.shape[0] <= plan.MAX_RANK for A in low[0])
    return low if fits else None


def _result(layer, x):
    y = layer._modules["base_layer"].forward(x)  # it has no hooks
    fits = type(y) is Tensor and y.dtype in decode.DTYPES and y.dim() == x.dim() and y.is_contiguous()
    return y if fits else None


def plan_of(layer: nn.Module, names: Sequence[str] | None = None) -> Plan | str:
    """A PEFT layer over a quantized base -> how to run it, with the adapters ``names``, or why PEFT keeps it."""
    if type(layer) not in _stock and not takes(layer):
        return f"{type(layer).__name__} is not PEFT's own layer for a quantized base"
    if reason := plan.out_of_use(layer):
        return reason
    if plan.hooks_everywhere():
        return "hooks registered for all modules"
    inner = layer._modules["base_layer"]
    device = packed.device_of(inner)
    if device is None or device.type not in plan.DEVICES:
        return f"the base weight is on {device.type if device else 'no device'}"
    adapters = plan.adapters_of(layer, device, names)
    if type(adapters) is str:
        return adapters
    if not adapters and names is None:
        return "no active adapter in this layer"
    return Plan(packed.base_of(inner), adapters, device)


def refuse_input(layer: nn.Module, x: Tensor, found: Plan) -> str:
    """Why this input of a plannable layer is PEFT's: PEFT would raise, or mix dtypes in its own way."""
    if reason := _refuse_shape(x, found):
        return reason
    # a checkpoint's forward has no gradients, its recomputation has, and goes the same way
    if x.is_cpu and (layer.training or torch.is_grad_enabled()) and _tokens(x) < settings.get().min_tokens:
        return "few tokens (PEFT_FAST_MIN_TOKENS): reading the weight is all the time there is"
    if any(a.p > 0 for a in found.adapters) and not native_mask(x.device):
        return "dropout, and no compiled kernel to draw its mask on this device"
    return refuse_dtypes(layer, x.dtype, found)


def _refuse_mixed(layer: nn.Module, x: Tensor, found: Plan) -> str:
    """The same of a mixed batch."""
    if reason := _refuse_shape(x, found):
        return reason
    if any(a.p > 0 for a in found.adapters):
        return "dropout in a mixed batch"
    return refuse_dtypes(layer, x.dtype, found) if found.adapters else ""


def _refuse_shape(x: Tensor, found: Plan) -> str:
    if not plan.plain(x) or x.is_nested or x.dim() == 0:
        return "the input is not a plain dense tensor"
    if x.device != found.device:
        return "input and base weight are on different devices"
    if found.adapters and x.shape[-1] != found.adapters[0].A.shape[1]:
        return "the input's last dimension does not fit the base weight"
    return ""


def refuse_dtypes(layer: nn.Module, given: torch.dtype, found: Plan) -> str:
    """Why PEFT mixes the dtypes of an input and this layer in its own way; empty where ours is the same."""
    low, device_type = found.adapters[0].A.dtype, found.device.type
    if given not in FLOATS[1:] or low not in FLOATS[1:]:
        return "a dtype other than float32, bfloat16 and float16 beside a quantized base"
    if torch.is_autocast_enabled(device_type):
        cast = torch.get_autocast_dtype(device_type)
        if cast not in plan.NARROW or given not in (torch.float32, cast) or low not in (torch.float32, cast):
            return "autocast with dtypes other than float32 and its own"
    elif low is not given and torch.float32 not in (low, given):
        return "input and adapters have different narrow dtypes"
    if low is not given and not layer.cast_input_dtype_enabled:
        return "PEFT's input cast is switched off"
    return ""


def multiplies(layer: nn.Module, x: Tensor, found: Plan) -> bool:
    """Do we run the base's product too?"""
    base, device_type = found.base, x.device.type
    if base.W is None or x.shape[-1] != base.W.shape[1]:
        return False
    dtype, low = x.dtype, found.adapters[0].A.dtype
    autocast = torch.is_autocast_enabled(device_type)
    if autocast:
        dtype = torch.get_autocast_dtype(device_type)
    elif low is not dtype and low is not torch.float32:
        return False  # adapters of less precision than x: they run in theirs, the base in its own
    if base.computes not in (None, dtype) or (base.bias is not None and base.bias.dtype not in (dtype, torch.float32)):
        return False
    return packed.trusted(layer.base_layer, base, dtype)


def kind_of(layer: nn.Module) -> str:
    """What the base of a layer of ours is; empty for other layers."""
    found = plan_of(layer) if type(layer) in _stock or takes(layer) else ""
    return found.base.kind if isinstance(found, Plan) else ""


def why_plain(layer: nn.Module) -> str:
    """Why no compiled kernel would run the adapters in the dtype that the base computes in; empty where one does."""
    base, adapters, device = plan_of(layer)
    dtype = base.computes or torch.bfloat16
    like = torch.empty(0, dtype=dtype, device=device)
    op = "lora_linear" if base.W is not None else "lora_add"
    others = [t for a in adapters for t in (a.A, a.bias) if t is not None]
    choice = dispatch.pick(like, dtype, like, others, settings.get().exact, op=op)
    return choice.reason if choice.backend == "torch" else ""
