"""Several layers with one input, q/k/v and gate/up: PEFT's lora.Linear one by one against one op."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import blocks, gate
from .harness import Case, Options
from .shapes import GPU_GROUPS, GROUPS, TINY_GROUP


def names(device: str) -> tuple[str, ...]:
    """What --model takes on this device."""
    return tuple(GROUPS if device == "cpu" else GPU_GROUPS)


def cases(options: Options) -> list[Case]:
    """The cases for this device and scale."""
    shapes = GROUPS if options.device == "cpu" else GPU_GROUPS
    return blocks.cases(options, shapes, TINY_GROUP, build, title)


def title(shape: tuple) -> str:
    """512 × 768 → 768 + 768 + 768."""
    m, k, ns = shape
    return f"{m} × {k} → {' + '.join(map(str, ns))}"


class Siblings(nn.Module):
    """x -> one result for each layer."""

    def __init__(self, k: int, ns: tuple[int, ...]) -> None:
        super().__init__()
        for i, n in enumerate(ns):
            self.add_module(f"proj{i}", nn.Linear(k, n, bias=False))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.children())


def build(dtype: torch.dtype, device: torch.device, m: int, k: int, ns: tuple[int, ...]) -> blocks.Block:
    from peft_fast.ops import lora_group

    net = Siblings(k, ns)
    for w in net.parameters():
        nn.init.normal_(w, std=k**-0.5)
    x = torch.randn(m, k, device=device).to(dtype)
    gs = [torch.randn(m, n, device=device).to(dtype) for n in ns]
    layers = [name for name, _ in net.named_children()]
    return blocks.Block(x, gs, net.to(device, dtype), layers, formula, lora_group, "lora_group")


def formula(x: Tensor, ws: list[gate.Weights], keeps: list[Tensor | None]) -> list[Tensor]:
    """One PEFT layer after another."""
    return [gate.lora(x, w, keep) for w, keep in zip(ws, keeps, strict=True)]
