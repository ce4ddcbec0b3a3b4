"""Counts of fast calls, and of calls handed back to PEFT by reason: per process and per layer.

Compiled code counts nothing. What it leaves to PEFT is noted when it is traced: the reason, once for the process.
"""

from __future__ import annotations

import collections
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
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
_traced: dict[str, None] = {}
# weak: the ledger keeps no model alive, and adds nothing to a layer that a checkpoint could pick up. Calls that
# csrc/call.h answers are counted there, where it costs them least, and are added here when somebody asks
_layers: weakref.WeakKeyDictionary[nn.Module, Tally] = weakref.WeakKeyDictionary()


def count(layer: nn.Module, reason: str | None) -> None:
    """Books one call of ``layer``: fast if there is no reason."""
    if torch.compiler.is_compiling():
        if reason is not None:
            note(reason)
        return
    tally = _tally(layer)
    if reason is None:
        tally.fast += 1
        _process.fast += 1
    else:
        tally.handed_back[reason] += 1
        _process.handed_back[reason] += 1


def note(reason: str) -> bool:
    """Books why a call that is being traced is PEFT's."""
    _traced[reason] = None
    return True


# Dynamo runs it while it traces, and nothing of it is compiled
note._dynamo_marked_constant = True


def traced() -> tuple[str, ...]:
    """The reasons for which torch.compile took PEFT's own forward, in the order that they were met."""
    return tuple(_traced)


def count_group(leader: nn.Module) -> None:
    """Books one run of a group for the layer that was called first."""
    _tally(leader).groups += 1
    _process.groups += 1


def count_block(block: nn.Module) -> None:
    """Books one run of a block for its module."""
    _tally(block).blocks += 1
    _process.blocks += 1


def _tally(module: nn.Module) -> Tally:
    tally = _layers.get(module)
    if tally is None:
        tally = _layers[module] = Tally()
    return tally


def process() -> Tally:
    """The sum over all layers there ever were."""
    out = Tally()
    out.add(_process)
    out.fast += decoded()
    return out


def total(modules: Iterable[nn.Module]) -> Tally:
    """The sum over some layers."""
    out = Tally()
    for module in modules:
        if (tally := _layers.get(module)) is not None:
            out.add(tally)
        out.fast += decoded(module)
    return out


def forget(modules: Iterable[nn.Module]) -> None:
    """Drops the counts of some layers; the process keeps its own."""
    for module in modules:
        _layers.pop(module, None)
        decoded(module, forget=True)


def state(names: Mapping[nn.Module, str]) -> dict[str, Any]:
    """The counts of the named modules, as JSON."""
    found = {name: total([module]) for module, name in names.items() if module in _layers or decoded(module)}
    return {name: [of.fast, of.groups, of.blocks, dict(of.handed_back)] for name, of in found.items()}


def restore(modules: Mapping[str, nn.Module], saved: Mapping[str, Any]) -> None:
    """Makes the counts of ``modules`` the saved ones; the process keeps its own."""
    forget(modules.values())
    for name, (fast, grouped, blocks, handed_back) in saved.items():
        if name in modules:
            tally = _tally(modules[name])
            tally.fast, tally.groups, tally.blocks = fast, grouped, blocks
            tally.handed_back.update(handed_back)
