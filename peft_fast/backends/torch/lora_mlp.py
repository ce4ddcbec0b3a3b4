"""lora_mlp's activation by torch's own kernels, which compute in float32 and round once each."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from peft_fast.ops.dropout import dropped

_backward = torch.ops.aten


def activate(gate, up, seed, spec):
    """gate, up (M, I), or gate None, with halves up (M, 2·I) -> h (M, I) = drop(act(gate)·up), or drop(act(up))."""
    z, factor = _split(gate, up, spec)
    h = FORWARD[spec.activation](z)
    if factor is not None:
        h = h.mul_(factor)
    return dropped(h, seed[0], spec.p) if spec.p > 0 else h


def activate_backward(dh, gate, up, seed, spec):
    """dh (M, I) -> dgate (M, I) | None, dup (M, I), or (M, 2·I) with halves."""
    dh = dh.to(up.dtype)
    if spec.p > 0:
        dh = dropped(dh, seed[0], spec.p)
    z, factor = _split(gate, up, spec)
    if factor is None:
        return None, BACKWARD[spec.activation](dh, z)
    dz, dfactor = BACKWARD[spec.activation](dh * factor, z), FORWARD[spec.activation](z).mul_(dh)
    if not spec.halves:
        return dz, dfactor
    return None, torch.cat((dz, dfactor) if spec.halves == "first" else (dfactor, dz), 1)


def _split(gate, up, spec):
    """What is activated, and what that is multiplied with, or None."""
    if gate is not None:
        return gate, up
    if not spec.halves:
        return up, None
    first, second = up.chunk(2, 1)
    return (first, second) if spec.halves == "first" else (second, first)


def _quick_gelu(z):
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    return (wide * torch.sigmoid(1.702 * wide)).to(z.dtype)


def _quick_gelu_backward(g, z):
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    s = torch.sigmoid(1.702 * wide)
    return (g * (s + 1.702 * wide * s * (1 - s))).to(z.dtype)


def _relu2(z):
    z = F.relu(z)
    return z.mul_(z)


FORWARD = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _relu2,
}
BACKWARD = {
    "silu": _backward.silu_backward,
    "gelu": _backward.gelu_backward,
    "gelu_tanh": lambda g, z: _backward.gelu_backward(g, z, approximate="tanh"),
    "quick_gelu": _quick_gelu_backward,
    "relu": lambda g, z: _backward.threshold_backward(g, z, 0),
    "relu2": lambda g, z: g * F.relu(z).mul_(2),
}
