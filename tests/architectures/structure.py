"""What an architecture says must be found, next to what was found and what ran."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

import peft_fast
from tests.architectures.architecture import Architecture


def lora_layers(model: nn.Module) -> list[str]:
    """Names of PEFT's LoRA layers."""
    return [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def assert_found(architecture: Architecture, model: nn.Module) -> None:
    """Exactly the layers, groups and blocks of the architecture, by name."""
    report = peft_fast.report(model)
    slow = architecture.expected_slow(model)
    assert set(report.slow) == slow, report.slow
    assert set(report.fast) == set(lora_layers(model)) - slow
    assert {frozenset(group) for group in report.groups} == {
        frozenset(group) for group in architecture.expected_groups(model)
    }
    assert set(report.blocks) == architecture.expected_blocks(model)


def operations(architecture: Architecture, model: nn.Module, calls: dict[str, int]) -> int:
    """How many of our operators one forward runs: one for a group, one for a block, one for any other layer."""
    alone = {name: n for name, n in calls.items() if name not in architecture.expected_slow(model)}
    total = 0
    for block in architecture.expected_blocks(model):
        total += alone.pop(block)
        for name in [name for name in alone if name.startswith(block + ".")]:
            del alone[name]
    for group in architecture.expected_groups(model):
        total += {alone.pop(name) for name in group}.pop()
    return total + sum(alone.values())


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Looking for blocks calls forwards with stand-ins: config, attributes and random numbers must not show it."""
    config = model.base_model.model.config.to_dict()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    state, numbers = torch.get_rng_state(), random.getstate()
    yield
    assert torch.equal(state, torch.get_rng_state()) and numbers == random.getstate()
    assert model.base_model.model.config.to_dict() == config
    for name, module in model.named_modules():
        kept = {key: value for key, value in vars(module).items() if not key.startswith("_peft_fast")}
        assert kept.keys() == before[name].keys() and all(kept[k] is v for k, v in before[name].items()), name
