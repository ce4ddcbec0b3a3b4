"""An MLP block, gated, halved or plain, with adapters on every layer or frozen: PEFT's layers against one op."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import blocks, gate
from .harness import Case, Options
from .shapes import GPU_MLPS, MLPS, TINY_MLP

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def names(device: str) -> tuple[str, ...]:
    """What --model takes on this device."""
    return tuple(MLPS if device == "cpu" else GPU_MLPS)


def cases(options: Options) -> list[Case]:
    """The cases for this device and scale; a frozen block, which drops nothing, once."""
    shapes = MLPS if options.device == "cpu" else GPU_MLPS
    rows = blocks.cases(options, shapes, TINY_MLP, build, title)
    first = rows[0].settings["p"]
    return [row for row in rows if row.settings["p"] == first or not row.settings["shape"].endswith("frozen")]


def title(shape: tuple) -> str:
    """512 × 1024 → 2 × 2816 → 1024, silu, gated."""
    m, k, inner, activation, kind, adapters = shape
    double = "" if kind == "plain" else "2 × "
    return f"{m} × {k} → {double}{inner} → {k}, {activation}, {kind}" + ("" if adapters else ", frozen")


class Mlp(nn.Module):
    """down(act(gate(x))·up(x)); halved: gate and up are halves of one layer; plain: down(act(up(x)))."""

    def __init__(self, k: int, inner: int, activation: str, kind: str) -> None:
        super().__init__()
        self.act, self.kind = ACTIVATIONS[activation], kind
        # in the order in which they are called
        if kind == "gated":
            self.gate = nn.Linear(k, inner, bias=False)
        self.up = nn.Linear(k, 2 * inner if kind == "halved" else inner, bias=False)
        self.down = nn.Linear(inner, k, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "plain":
            return self.down(self.act(self.up(x)))
        first, second = (self.gate(x), self.up(x)) if self.kind == "gated" else self.up(x).chunk(2, dim=-1)
        return self.down(self.act(first) * second)


def build(
    dtype: torch.dtype, device: torch.device, m: int, k: int, inner: int, activation: str, kind: str, adapters: bool
) -> blocks.Block:
    net = Mlp(k, inner, activation, kind)
    for w in net.parameters():
        nn.init.normal_(w, std=w.shape[1] ** -0.5)
    x, g = (torch.randn(m, k, device=device).to(dtype) for _ in range(2))
    layers = [name for name, _ in net.named_children()] if adapters else []
    op = partial(_op, activation, kind)
    return blocks.Block(x, [g], net.to(device, dtype), layers, partial(formula, activation, kind), op, "lora_mlp")


def formula(activation: str, kind: str, x: Tensor, ws: list[gate.Weights], keeps: list[Tensor | None]) -> list[Tensor]:
    """The layers of PEFT and the activation between them, each rounded by itself."""
    *first, down = zip(ws, keeps, strict=True)
    outputs = [gate.lora(x, *layer) for layer in first]
    outputs = outputs[0].chunk(2, dim=-1) if kind == "halved" else outputs
    h = ACTIVATIONS[activation](outputs[0])
    return [gate.lora(h * outputs[1] if len(outputs) == 2 else h, *down)]


def _op(activation: str, kind: str, x: Tensor, siblings: list, **how) -> tuple[Tensor]:
    from peft_fast.ops import lora_mlp

    *first, up, down = siblings
    halves = "first" if kind == "halved" else ""
    return (lora_mlp(x, up, down, *first, activation=activation, halves=halves, **how),)
