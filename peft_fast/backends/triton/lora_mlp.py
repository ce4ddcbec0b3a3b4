"""lora_mlp's activation by Triton kernels: one pass over gate and up forward, one backward, the mask regenerated."""

from __future__ import annotations

import torch

from peft_fast.backends.operators import define, traced
from peft_fast.backends.torch import lora_mlp as otherwise
from peft_fast.backends.torch.lora_linear import dense_rows
from peft_fast.backends.triton.guard import guarded
from peft_fast.ops.spec import ActSpec

_SPEC = "Tensor? gate, Tensor up, Tensor? seed, str activation, str halves, float p"


def activate(gate, up, seed, spec):
    """gate, up (M, I), or gate None, with halves up (M, 2·I) -> h (M, I) = drop(act(gate)·up), or drop(act(up))."""
    run = torch.ops.peft_fast.triton_activate if traced(up) else _activate_op
    return run(gate, up, seed, *spec)


def activate_backward(dh, gate, up, seed, spec):
    """dh (M, I) -> dgate (M, I) | None, dup (M, I), or (M, 2·I) with halves."""
    run = torch.ops.peft_fast.triton_activate_backward if traced(up) else _activate_backward_op
    dgate, dup = run(dh, gate, up, seed, *spec)
    return (None if gate is None else dgate), dup


def run_activate(gate, up, seed, spec):
    """What the operator does, on real or meta tensors."""
    z, u = _split(gate, up, spec.halves)
    return kernels().activate(z, u, seed, spec.activation, spec.p)


def run_activate_backward(dh, gate, up, seed, spec):
    """What the operator does, on real or meta tensors."""
    z, u = _split(gate, up, spec.halves)
    dgate, dup = (None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (gate, up))
    dz, du = _split(dgate, dup, spec.halves)
    kernels().activate_backward(dense_rows(dh), z, u, dz, du, seed, spec.activation, spec.p)
    return dgate, dup


def kernels():
    """The kernels, imported at the first call."""
    from peft_fast.kernels import lora_mlp

    return lora_mlp


def _split(gate, up, halves):
    """What is activated, and what that is multiplied with, or None: rows with neighbouring columns."""
    if gate is not None:
        return dense_rows(gate), dense_rows(up)
    if not halves:
        return dense_rows(up), None
    first, second = dense_rows(up).chunk(2, 1)
    return (first, second) if halves == "first" else (second, first)


def _signature(what, up, spec):
    return what, up.device, up.dtype, up.shape[1], spec


def _activate_op(gate, up, seed, activation, halves, p):
    spec = ActSpec(activation, halves, p)
    return guarded(
        _signature("lora_mlp's activation", up, spec),
        lambda: run_activate(gate, up, seed, spec),
        lambda: otherwise.activate(gate, up, seed, spec),
    )


def _activate_backward_op(dh, gate, up, seed, activation, halves, p):
    spec = ActSpec(activation, halves, p)
    dgate, dup = guarded(
        _signature("lora_mlp's activation, backward", up, spec),
        lambda: run_activate_backward(dh, gate, up, seed, spec),
        lambda: otherwise.activate_backward(dh, gate, up, seed, spec),
    )
    # an operator returns tensors only
    return up.new_empty(0) if dgate is None else dgate.contiguous(), dup.contiguous()


def _activate_fake(gate, up, seed, activation, halves, p):
    return up.new_empty(up.shape[0], up.shape[1] // 2 if halves else up.shape[1])


def _activate_backward_fake(dh, gate, up, seed, activation, halves, p):
    return up.new_empty(0 if gate is None else gate.shape), up.new_empty(up.shape)


define("triton_activate", f"({_SPEC}) -> Tensor", _activate_op, _activate_fake)
define(
    "triton_activate_backward",
    f"(Tensor dh, {_SPEC}) -> (Tensor, Tensor)",
    _activate_backward_op,
    _activate_backward_fake,
)
