"""y = down(drop(act(gate(x))·up(x))), or down(drop(act(up(x)))) without a gate, the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from peft_fast.reference import lora_group, lora_linear

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
}


def forward(x, first, down, activation, halves, p, masks, keep=None):
    """x (..., K), first = (gate, up) or (up,), down: (W, bias, adapters, transposed) each -> y (..., N).

    ``masks`` are those of first's adapters and, of h's shape, those of down's; ``keep`` is the block's own mask of h.
    """
    n = sum(len(adapters) for _, _, adapters, _ in first)
    return finish(lora_group.forward(x, first, masks[:n]), down, activation, halves, p, masks[n:], keep)


def finish(outputs, down, activation, halves, p, masks, keep=None):
    """[gate (..., I), up (..., I)], or [up], and down as above -> y (..., N)."""
    h = activate(outputs, activation, halves)
    if p > 0:
        h = h * keep.to(h.dtype) * (1 / (1 - p) if p < 1 else 0.0)
    W, bias, adapters, transposed = down
    return lora_linear.forward(h, W, bias, adapters, masks, transposed)


def activate(outputs, activation, halves):
    """[gate (..., I), up (..., I)], or [up], of (..., 2·I) where one of its ``halves`` is the gate -> h (..., I)."""
    act = ACTIVATIONS[activation]
    if halves:
        first, second = outputs[0].chunk(2, -1)
        outputs = (first, second) if halves == "first" else (second, first)
    return act(outputs[0]) * outputs[1] if len(outputs) == 2 else act(outputs[0])
