"""Counts of fast calls, and of calls handed back to PEFT by reason: per process and per layer."""

from __future__ import annotations

import collections
import functools
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from peft_fast.ops.lora_decode import decoded


class Tally:
    """Calls of one layer, or of the process: fast, and handed back by reason."""

    __slots__ = ("blocks", "fast", "groups", "handed_back")

    def __init__(self) -> None:
        self.fast = 0
        self.groups = 0  # runs of lora_group, each fast calls of its layers
        self.blocks = 0  # runs of lora_mlp
        self.handed_back: collections.Counter[str] = collections.Counter()

    def add(self, other: Tally) -> None:
        """Adds another tally's calls to this one."""
        self.fast += other.fast
        self.groups += other.groups
        self.blocks += other.blocks
        self.handed_back.update(other.handed_back)


_process = Tally()
# a layer's id -> a reference that takes the entry away with the layer, and its tally. Weak: the ledger keeps no model
# alive, and adds nothing to a layer that a checkpoint could pick up. By id, which costs a call the least: csrc/layer.h
# counts here too
layers: dict[int, tuple[weakref.ref, Tally]] = {}


def count(layer: nn.Module, reason: str | None) -> None:
    """Books one call of ``layer``: fast if there is no reason."""
    of = tally(layer)
    if reason is None:
        of.fast += 1
        _process.fast += 1
    else:
        of.handed_back[reason] += 1
        _process.handed_back[reason] += 1


def count_group(leader: nn.Module) -> None:
    """Books one run of a group for the layer that was called first."""
    tally(leader).groups += 1
    _process.groups += 1


def count_block(block: nn.Module) -> None:
    """Books one run of a block for its module."""
    tally(block).blocks += 1
    _process.blocks += 1


def tally(module: nn.Module) -> Tally:
    """The module's own, a new one if it has none."""
    if (found := layers.get(id(module))) is None:
        # bound, as a process that ends takes the names of modules before the layers
        drop = functools.partial(_drop, layers.pop, id(module))
        found = layers[id(module)] = weakref.ref(module, drop), Tally()
    return found[1]


def _drop(pop, key, _):
    pop(key, None)


def process() -> Tally:
    """The sum over all layers there ever were."""
    out = Tally()
    out.add(_process)
    out.fast += decoded()  # which csrc/layer.h books by itself
    return out


def total(modules: Iterable[nn.Module]) -> Tally:
    """The sum over some layers."""
    out = Tally()
    for module in modules:
        if (found := layers.get(id(module))) is not None:
            out.add(found[1])
    return out


def forget(modules: Iterable[nn.Module]) -> None:
    """Drops the counts of some layers; the process keeps its own."""
    for module in modules:
        layers.pop(id(module), None)


def state(names: Mapping[nn.Module, str]) -> dict[str, Any]:
    """The counts of the named modules, as JSON."""
    found = {name: layers[id(module)][1] for module, name in names.items() if id(module) in layers}
    return {name: [of.fast, of.groups, of.blocks, dict(of.handed_back)] for name, of in found.items()}


def restore(modules: Mapping[str, nn.Module], saved: Mapping[str, Any]) -> None:
    """Makes the counts of ``modules`` the saved ones; the process keeps its own."""
    forget(modules.values())
    for name, (fast, grouped, blocks, handed_back) in saved.items():
        if name in modules:
            of = tally(modules[name])
            of.fast, of.groups, of.blocks = fast, grouped, blocks
            of.handed_back.update(handed_back)
