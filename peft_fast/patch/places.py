"""Which module a layer belongs to: noted when a model is accelerated, looked up among all modules otherwise."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from peft_fast.patch import blocks, plan
from peft_fast.patch.marks import innermost

# base layer -> its parent; None for a layer that no module holds
_parents: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module] | None] = weakref.WeakKeyDictionary()


def parent_of(layer: nn.Module, watched: Sequence[Tensor]) -> nn.Module | None:
    """The module that holds a layer, or the tuner layers around it; ``watched`` as in blocks.note."""
    base = innermost(layer)
    if base not in _parents:  # a copy, a loaded file, or a model nobody named: under enable() there are only these
        # by type(): isinstance asks an object for its __class__, at which deprecated ones warn
        for module in [o for o in gc.get_objects() if issubclass(type(o), nn.Module)]:
            _note(module, watched)
        _parents.setdefault(base, None)
    return known_parent(base)


def known_parent(layer: nn.Module) -> nn.Module | None:
    """The same as far as it was noted."""
    parent = _parents.get(innermost(layer))
    return None if parent is None else parent()


def walk(model: nn.Module) -> None:
    """Notes the parents of all linear layers of a model, and its blocks."""
    for module in model.modules():
        _note(module, ())


def forget(model: nn.Module) -> None:
    """Drops what was noted in a model."""
    for module in model.modules():
        _parents.pop(module, None)
    blocks.forget(model)


def linears(module: nn.Module) -> Iterator[nn.Module]:
    """The linear layers that a module calls itself, as they are inside the tuner layers around them."""
    if "base_layer" not in module._modules:
        for child in module._modules.values():
            if child is not None and is_linear(child):
                yield innermost(child)


def is_linear(child: nn.Module) -> bool:
    """An nn.Linear or Conv1D, or tuner layers around one?"""
    return isinstance(innermost(child), (nn.Linear, plan.Conv1D))


def _note(module: nn.Module, watched: Sequence[Tensor]) -> None:
    layers = list(linears(module))
    for base in layers:
        _parents[base] = weakref.ref(module)
    if len(layers) > 1:
        blocks.note(module, is_linear, watched)
