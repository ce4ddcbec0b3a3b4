"""y = down(drop_p(act(gate(x))·up(x))), or down(drop_p(act(up(x)))): a block that saves x, gate and up, not h."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from peft_fast import dispatch
from peft_fast.backends import modules
from peft_fast.errors import SettingsError, ShapeError, fail
from peft_fast.ops import prepare
from peft_fast.ops import siblings as group
from peft_fast.ops.checks import NUMBERS, check
from peft_fast.ops.dropout import draw_seed
from peft_fast.ops.function import Function
from peft_fast.ops.lora_group import LoraGroup
from peft_fast.ops.lora_group import define as define_group
from peft_fast.ops.spec import ACTIVATIONS, ActSpec, GroupSpec, Sibling
from peft_fast.reference import lora_mlp as reference

backends = modules("lora_mlp")


def lora_mlp(
    x: Tensor,
    up: Sibling,
    down: Sibling,
    gate: Sibling | None = None,
    *,
    activation: str,
    halves: str = "",
    p: float = 0.0,
    exact: bool = False,
    backend: str | None = None,
    plan: str | None = None,
) -> Tensor:
    """x (..., K), up (I, K), down (N, I), gate (I, K) -> y (..., N) in x's dtype (autocast's, if on).

    ``activation`` is one of ACTIVATIONS; ``halves`` "first" or "second": up is (2·I, K), and that half of what it gives
    is the gate. ``p`` is the dropout of the block itself on h. Adapters on any of the layers, each as in lora_linear.
    """
    first = [up] if gate is None else [gate, up]
    group.check_siblings(x, [*first, down])
    _check_options(activation, halves, p, gate)
    dtype, autocast = prepare.computed_dtype(x)
    for s in first:
        check(x, dtype, s.W, s.bias, s.adapters, s.transposed)
    h = x.new_empty(0, _width(first, down, halves), dtype=dtype)
    check(h, dtype, down.W, down.bias, down.adapters, down.transposed)
    n, m = sum(len(s.adapters) for s in first), len(down.adapters)
    exact = exact or (not autocast and dispatch.must_be_exact(dtype, [a.A for s in (*first, down) for a in s.adapters]))
    first, others, dropout = group.alike(first, dtype)
    (down,), others_down, dropout_down = group.alike([down], dtype)
    dropout = dropout or dropout_down or p > 0
    others += others_down
    name, plan, _ = dispatch.pick(x, dtype, first[0].W, others, exact, backend, plan, dropout, "lora_mlp")
    # the seeds of gate's adapters, of up's, of down's, and that of h
    seed = draw_seed(n + m + (p > 0), x.device) if dropout else None
    seed, after = (None, None) if seed is None else (seed[:n], seed[n:])
    act = ActSpec(activation, halves, p)
    if name == "reference":
        y = define(define_group(x.to(dtype), first, seed), down, after, act)
    else:
        spec = group.spec_of(first, x.dtype, exact, name, plan)
        outputs = LoraGroup.apply(*prepare.narrowed(x, dtype), seed, spec, *group.flat(first))
        spec = Specs(act, group.spec_of([down], dtype, exact, name, plan))
        y = LoraMlp.apply(outputs[0] if gate is not None else None, outputs[-1], after, spec, *group.flat([down]))
    prepare.count_call()
    return y


class Specs(NamedTuple):
    """What backends need beside tensors: of h, and of down."""

    act: ActSpec
    down: GroupSpec


class LoraMlp(Function):
    """y = down(drop_p(act(gate)·up)) with gate and up from LoraGroup, which saves x.

    Saves gate, up, H (M, R) and the seeds; h is computed again in backward, if anything reads it there.
    """

    @staticmethod
    def forward(ctx, gate, up, seed, specs, *tensors):
        seed_h, seed_down = _seeds(seed, specs)
        h = backends[specs.down.backend].activate(*_rows(gate, up), seed_h, specs.act)
        (y,), H = group.run(h.view(*up.shape[:-1], h.shape[1]), tensors, seed_down, specs.down)
        ctx.save_for_backward(gate, up, H, seed, *tensors)
        ctx.specs = specs
        return y

    @staticmethod
    def backward(ctx, g):
        gate, up, H, seed, *tensors = ctx.saved_tensors
        needs, specs = ctx.needs_input_grad, ctx.specs
        below = needs[0] or needs[1]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_backward(g, gate, up, seed, specs, tensors, needs)
        backend, rows, (seed_h, seed_down) = backends[specs.down.backend], _rows(gate, up), _seeds(seed, specs)
        g = g.reshape(rows[1].shape[0], g.shape[-1])
        dgate = dup = None
        if below and specs.down.ranks and not needs[4] and hasattr(backend, "down_backward"):
            # h is computed again in the pass that takes its gradient further
            run = functools.partial(backend.down_backward, *rows, seed_h, specs.act)
            found, grads = group.run_backward(
                [g], rows[1], tensors, H, seed_down, specs.down, needs[4:], below, run=run
            )
            dgate, dup = found
        else:
            if specs.down.ranks or needs[4]:
                h = backend.activate(*rows, seed_h, specs.act)
            else:  # of which only the shape is needed
                h = up.new_empty(()).expand(rows[1].shape[0], rows[1].shape[1] // (2 if specs.act.halves else 1))
            dh, grads = group.run_backward([g], h, tensors, H, seed_down, specs.down, needs[4:], below)
            if below:
                dgate, dup = backend.activate_backward(dh, *rows, seed_h, specs.act)
        if below:
            dgate, dup = (d.view(up.shape) if need else None for d, need in zip((dgate, dup), needs, strict=False))
        return dgate, dup, None, None, *grads


def define(outputs: list[Tensor], down: Sibling, seed: Tensor | None, act: ActSpec) -> Tensor:
    """The definition from gate and up, or up, (..., I) on, differentiable."""
    dtype, device_type = outputs[0].dtype, outputs[0].device.type
    with torch.autocast(device_type, enabled=False):
        h = outputs[0].new_empty(()).expand(*outputs[0].shape[:-1], down.W.shape[0 if down.transposed else 1])
        *masks, keep = prepare.masks(h, seed, [*(a.p for a in down.adapters), act.p])
        outputs = [t.to(prepare.at_least_float32(dtype)) for t in outputs]
        return reference.finish(outputs, prepare.widened(down, dtype), *act, masks, keep).to(dtype)


def _check_options(activation, halves, p, gate):
    if activation not in ACTIVATIONS:
        need = "one of " + ", ".join(ACTIVATIONS)
        fail(SettingsError, f"activation={activation!r}", need, "run the layers one by one")
    if halves not in ("", "first", "second"):
        need = '"first" or "second", the activated half of up, or ""'
        fail(SettingsError, f"halves={halves!r}", need, "leave halves out where gate is a layer of its own")
    if halves and gate is not None:
        fail(SettingsError, f"halves={halves!r} and a gate", "one of both", "leave gate out: it is a half of up")
    if not isinstance(p, NUMBERS) or not 0 <= p <= 1:
        fail(SettingsError, f"p={p!r}", "a dropout probability from 0 to 1", "pass the p of the dropout module")


def _width(first, down, halves):
    """I, on which all layers agree."""
    widths = {s.W.shape[1 if s.transposed else 0] for s in first}
    K = down.W.shape[0 if down.transposed else 1] if down.W.dim() == 2 else -1
    if widths != {2 * K if halves else K}:
        given = f"outputs of {sorted(widths)} columns before a down of W {tuple(down.W.shape)}"
        need = "twice as many columns as down takes" if halves else "as many columns as down takes"
        fail(ShapeError, given, need, "check that the layers belong to one block, and halves")
    return K


def _rows(gate, up):
    """gate (..., I) | None, up (..., I) -> (M, I) of each."""
    shape = up.shape[:-1].numel(), up.shape[-1]
    return None if gate is None else gate.view(shape), up.view(shape)


def _seeds(seed, specs):
    """The seed of h, and those of down's adapters."""
    if seed is None:
        return None, None
    return (seed[-1:], seed[:-1]) if specs.act.p > 0 else (None, seed)


def _differentiable_backward(g, gate, up, seed, specs, tensors, needs):
    """Gradients that can be differentiated again (create_graph=True): autograd through the definition."""
    (down,) = group.siblings_of(tensors, specs.down)
    outputs = [up] if gate is None else [gate, up]
    others, needed = [*outputs[:-1], *tensors], [*needs[:2][2 - len(outputs) : 1], *needs[4:]]
    run = lambda up: [define([*outputs[:-1], up], down, seed, specs.act)]  # noqa: E731
    dup, grads = group.differentiate(run, [g], up, others, needed, needs[1])
    dgate = None if gate is None else grads.pop(0)
    return dgate, dup, None, None, *grads
