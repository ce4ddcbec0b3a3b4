"""Whom the guards serve: every layer of the process, or those whose base layer carries a mark."""

from __future__ import annotations

from torch import nn

# True in the __dict__ of every base layer of an accelerated model: a plain value, so it pickles anywhere
MARK = "_peft_fast"


class State:
    """The switches. Not context variables: torch.compile guards on these attributes, and a
    checkpoint that is recomputed in an autograd thread must see what its forward saw."""

    def __init__(self) -> None:
        self.off = False  # disable(): nobody, even if another library's wrapper keeps calling the guard
        self.everywhere = False  # enable(): every layer; else only those whose base layer is marked
        self.paused = 0  # depth of `with disabled()`


state = State()


def wanted(layer: nn.Module) -> bool:
    """Did anybody ask for this layer to be fast?"""
    if state.everywhere or state.off:
        return not state.off
    return marked(layer)


def marked(layer: nn.Module) -> bool:
    """Does the innermost layer that this one adapts carry the mark of an accelerated model?"""
    return MARK in innermost(layer).__dict__


def innermost(layer: nn.Module) -> nn.Module:
    """The layer inside all tuner layers around it; a layer without one is its own."""
    while (base := layer._modules.get("base_layer")) is not None:
        layer = base
    return layer
