"""The activation of lora_mlp by the compiled operators, and the way back through down and it in one call."""

from __future__ import annotations

import torch

from peft_fast.ops.packing import packed


def activate(gate, up, seed, spec):
    """gate, up (M, I) -> h (M, I) = drop(act(gate)·up), or drop(act(up)) without gate; halves: up is (M, 2I)."""
    return torch.ops.peft_fast.lora_mlp_activate(gate, up, seed, *_plain(spec))


def activate_backward(dh, gate, up, seed, spec):
    """dh (M, I) -> dgate or None, dup in up's shape."""
    dgate, dup = torch.ops.peft_fast.lora_mlp_activate_backward(dh.to(up.dtype), gate, up, seed, *_plain(spec))
    return None if gate is None else dgate, dup


def down_backward(gate, up, seed_h, act, g, x, W, bias, A, B, H, seed, spec, needs):
    """lora_linear.backward of down and activate_backward of its dx, with h for dA from the same pass.

    g (M, N), W, bias, A, B, H = down's -> (dgate | None, dup), None for dW, dbias, dA, dB. ``x`` is not read.
    """
    _, _, *wanted = needs
    weight = packed(W, up, spec.transposed, True)
    dgate, dup, dA, dB, dbias = torch.ops.peft_fast.lora_mlp_down_backward(
        g.to(up.dtype), W, A, B, H, seed, spec.ranks, spec.scalings, spec.ps, spec.transposed, wanted, weight,
        gate, up, seed_h, *_plain(act),
    )  # fmt: skip
    need_bias, need_A, need_B = wanted
    return (
        (None if gate is None else dgate, dup),
        None,
        dbias.to(bias.dtype) if need_bias else None,
        dA if need_A else None,
        dB if need_B else None,
    )


def _plain(spec):
    return spec.activation, spec.halves, spec.p
