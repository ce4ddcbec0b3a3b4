"""MLP blocks: a module whose forward is down(act(gate(x))·up(x)) or down(act(up(x))) runs lora_mlp.

tracing.py finds them. What it found lies in the module's __dict__ as a plain tuple; the guard sits on the class, and
passes every call on that is not for it. Whatever keeps a block from running leaves its layers fast by themselves.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_fast import settings
from peft_fast.ops import Sibling, lora_mlp, prepare
from peft_fast.ops.dropout import native_mask
from peft_fast.patch import ledger, plan, tracing
from peft_fast.patch.marks import wanted
from peft_fast.patch.steps import Watch

BLOCK = "_peft_fast_block"
REPLACED = "another library has replaced the forward of this module"
# classes of transformers.activations, all forms of one formula under one name
ACTIVATIONS = {
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "ReLUSquaredActivation": "relu2",
}

# activation class -> its name in ops
_activations: dict[type, str] = {nn.SiLU: "silu", nn.ReLU: "relu"}
# class -> (its forward, our guard in front of it)
_classes: dict[type, tuple[Callable, Callable]] = {}
# found while a forward may be under way: the block starts once these tensors were written to, see groups.py
_waiting: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, Watch]] = weakref.WeakKeyDictionary()
# module that looks like a block from outside -> why it is none
_none: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


class Plan(NamedTuple):
    """A block as lora_mlp takes it, and its layers that have adapters."""

    up: Sibling
    down: Sibling
    gate: Sibling | None
    activation: str
    halves: str
    p: float
    adapted: list[nn.Module]


def note(module: nn.Module, linear: Callable[[nn.Module], bool], watched: Sequence[Tensor]) -> None:
    """Looks whether a module is a block; given ``watched``, it waits until its adapters were written to, or these."""
    kind = type(module)
    if kind.__module__.partition(".")[0] == "torch" or not tracing.one_argument(module):
        return
    if BLOCK in module.__dict__ or module in _waiting:
        if watched:
            return
        _drop(module)
    block = tracing.find(module, linear)
    if type(block) is str:
        _none[module] = block
        return
    if activations := sys.modules.get("transformers.activations"):
        _activations.update({getattr(activations, k): v for k, v in ACTIVATIONS.items() if hasattr(activations, k)})
    _patch(next(c for c in kind.__mro__ if "forward" in c.__dict__))
    if watched:
        watched = [p for p in module.parameters() if p.requires_grad] or watched
        _waiting[module] = tuple(block), Watch(watched)
    else:
        module.__dict__[BLOCK] = tuple(block)


def install() -> None:
    """Puts the guards on the classes of all blocks found so far."""
    for kind, (stock, guard) in _classes.items():
        if kind.__dict__.get("forward") is stock:
            kind.forward = guard


def uninstall() -> None:
    """Gives these classes their own forwards back; one that another library has replaced since stays."""
    for kind, (stock, guard) in _classes.items():
        if kind.__dict__.get("forward") is guard:
            kind.forward = stock


def forget(model: nn.Module) -> None:
    """Drops what was noted in a model."""
    for module in model.modules():
        _drop(module)


def reasons(model: nn.Module) -> dict[str, str]:
    """Name -> why it does not run as a block, empty if it does, for the modules that may be one."""
    out = {}
    for name, module in model.named_modules():
        if (block := module.__dict__.get(BLOCK)) is not None:
            found = plan.refuse_call((), {}) or plan_of(module, block)
            if all(type(module).forward is not guard for _, guard in _classes.values()):
                found = REPLACED
            out[name] = found if type(found) is str else ""
        elif module in _waiting:
            out[name] = "it starts after the next optimizer step"
        elif module in _none:
            out[name] = _none[module]
    return out


def plan_of(module: nn.Module, block: tuple) -> Plan | str:
    """A block as lora_mlp takes it whatever its input, or why its layers run by themselves."""
    gate_name, up_name, down_name, act, halves, drops, tail, reads = block
    children = module._modules
    if "forward" in module.__dict__:
        return REPLACED
    if not settings.get().blocks:
        return "PEFT_FAST_BLOCKS is 0"
    for name, value in reads:
        if getattr(module, name) != value:
            return f"self.{name} has changed since the block was found"
    siblings, adapted = [], []
    for name in (gate_name, up_name, down_name):
        if not name:
            siblings.append(None)
            continue
        child = children[name]
        if not wanted(child):
            return "not asked for: call peft_fast.accelerate(model)"
        if plan.hooked(child):
            return f"hooks or a replaced forward on {name}"
        own = plan.plan_of(child, bare=True) if type(child) is plan.Linear else plan.frozen(child)
        if type(own) is str:
            return f"{name}: {own}"
        if own.adapters:
            adapted.append(child)
        siblings.append(own)
    gate, up, down = siblings
    if up.W.dtype is not down.W.dtype or (gate is not None and gate.W.dtype is not up.W.dtype):
        return "its layers have different dtypes"
    if not adapted and any(s is not None and s.W.requires_grad for s in siblings):
        return "it has no adapters, and its weights are trained"
    if not adapted and gate is None and not halves:
        return "it has no adapters and no gate: torch saves as little, and is faster"
    activation = act[1:] if act.startswith("=") else _activation(children[act])
    if not activation:
        return f"its activation is a {type(children[act]).__name__}, or one with hooks"
    ps = [_probability(module, drop) for drop in drops]
    for p in (*ps, *[_probability(module, drop) for drop in tail]):
        if type(p) is str:
            return p
    ps = [p for p in ps if p > 0]
    if len(ps) > 1:
        return "two dropouts before its last layer"
    return Plan(up, down, gate, activation, halves, ps[0] if ps else 0.0, adapted)


def refuse_input(module: nn.Module, block: tuple, x: Tensor, found: Plan) -> str:
    """Why this input of a block is for its layers one by one; empty if it is not."""
    up, down, gate = found.up, found.down, found.gate
    for name, own in zip(block[:2], (gate, up), strict=True):
        if own is not None and (reason := plan.refuse_input(module._modules[name], x, own)):
            return reason
    device = x.device.type
    h = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if reason := plan.refuse_dtypes(module._modules[block[2]], h, down):
        return reason
    widths = {own.W.shape[1 if own.transposed else 0] for own in (up, gate or up)}
    width = down.W.shape[0 if down.transposed else 1]
    if widths != {2 * width if found.halves else width} or down.W.device != x.device:
        return "its layers do not fit each other"
    if (found.p > 0 or any(a.p > 0 for a in down.adapters)) and not native_mask(x.device):
        return "dropout, and no compiled kernel to draw its mask on this device"
    if not found.adapted and not (torch.is_grad_enabled() and x.requires_grad):
        return "no adapters and no gradients: nothing to save"
    return ""


def _guard(stock: Callable) -> Callable:
    """A forward that runs blocks, in front of a class's own."""

    @functools.wraps(stock)
    def forward(self, *args, **kwargs):
        compiling = torch.compiler.is_compiling()
        block = self.__dict__.get(BLOCK)
        if block is None and not compiling and _waiting:
            block = _started(self)
        if block is None or kwargs or len(args) != 1 or type(self).forward is not forward or plan.refuse_call((), {}):
            return stock(self, *args, **kwargs)
        if _few(args[0]):
            return stock(self, *args, **kwargs)
        found = plan_of(self, block)
        if type(found) is str or refuse_input(self, block, args[0], found):
            return stock(self, *args, **kwargs)
        up, down, gate, activation, halves, p, adapted = found
        siblings = [s for s in (up, down, gate) if s is not None]
        if prepare.adds_nothing(args[0], [a for s in siblings for a in s.adapters]):
            return stock(self, *args, **kwargs)
        exact = settings.get().exact
        y = lora_mlp(args[0], up, down, gate, activation=activation, halves=halves, p=p, exact=exact)
        if not compiling:
            ledger.count_block(self)
            for layer in adapted:
                ledger.count(layer, None)
        for drop in block[6]:
            y = self._modules[drop](y) if type(drop) is str else F.dropout(y, drop, self.training)
        return y

    setattr(forward, tracing.STOCK, stock)
    return forward


def _few(x: Tensor) -> bool:
    """Is the input one that refuse_input() would refuse for its few tokens? Generating, nobody waits for the reason."""
    return type(x) is Tensor and x.is_cpu and x.dim() > 0 and x.numel() < settings.get().min_tokens * x.shape[-1]


def _patch(kind: type) -> None:
    if kind not in _classes:
        stock = kind.__dict__["forward"]
        _classes[kind] = stock, _guard(stock)
    install()


def _started(module: nn.Module) -> tuple | None:
    """The block of a module that waits, if it may run now."""
    if module not in _waiting:
        return None
    block, watch = _waiting[module]
    if watch.written():
        del _waiting[module]
        module.__dict__[BLOCK] = block
    elif torch.is_grad_enabled() or module.training:
        return None
    return block


def _drop(module: nn.Module) -> None:
    module.__dict__.pop(BLOCK, None)
    _waiting.pop(module, None)
    _none.pop(module, None)


def _activation(act: nn.Module) -> str:
    """The name of an activation module in ops; empty if it is another one."""
    if plan.hooked(act):
        return ""
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return _activations.get(type(act), "")


def _probability(module: nn.Module, drop: str | float) -> float | str:
    """The p in effect of one of the block's own dropouts, or why it is not ours."""
    if type(drop) is not str:
        return drop if module.training else 0.0
    child = module._modules[drop]
    if plan.hooked(child):
        return f"hooks or a replaced forward on {drop}"
    return plan.probability(child)
