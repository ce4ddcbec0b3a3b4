"""yᵢ = x·Wᵢᵀ + biasᵢ + Σ s·drop(x)·Aᵀ·Bᵀ for siblings that read one x, with one dx; x is saved once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_fast import dispatch
from peft_fast.ops import prepare
from peft_fast.ops import siblings as group
from peft_fast.ops.checks import check
from peft_fast.ops.dropout import draw_seed
from peft_fast.ops.function import Function, Once
from peft_fast.ops.spec import Sibling
from peft_fast.reference import lora_group as reference


def lora_group(
    x: Tensor,
    siblings: Sequence[Sibling],
    *,
    exact: bool = False,
    backend: str | None = None,
    plan: str | None = None,
) -> tuple[Tensor, ...]:
    """x (..., K), siblings of W (N, K) or (K, N) -> y (..., N) of each, in x's dtype (autocast's, if on).

    Each sibling is as in lora_linear, with its own adapters and dropout masks, or none. Every result owns its storage.
    Raises ShapeError, DtypeError, DeviceError or SettingsError (all PeftFastError).
    """
    group.check_siblings(x, siblings)
    dtype, autocast = prepare.computed_dtype(x)
    for s in siblings:
        check(x, dtype, s.W, s.bias, s.adapters, s.transposed)
    exact = exact or (not autocast and dispatch.must_be_exact(dtype, [a.A for s in siblings for a in s.adapters]))
    siblings, others, dropout = group.alike(siblings, dtype)
    name, plan, _ = dispatch.pick(x, dtype, siblings[0].W, others, exact, backend, plan, dropout, "lora_group")
    seed = draw_seed(sum(len(s.adapters) for s in siblings), x.device) if dropout else None
    if name == "reference":
        ys = define(x.to(dtype), siblings, seed)
    else:
        spec = group.spec_of(siblings, x.dtype, exact, name, plan)
        ys = LoraGroup.apply(*prepare.narrowed(x, dtype), seed, spec, *group.flat(siblings))
    prepare.count_call()
    return tuple(ys)


class LoraGroup(Function):
    """Saves x, H (M, R) and the seeds; the tensors of the siblings are the caller's parameters, see siblings.py.

    x and ``uncast`` are what prepare.narrowed() gives.
    """

    @staticmethod
    def forward(ctx, x, uncast, seed, spec, *tensors):
        ys, H = group.run(x, tensors, seed, spec)
        ctx.save_for_backward(group.values_of(x, spec, tensors), H, seed, *tensors)
        ctx.set_materialize_grads(False)
        ctx.spec, ctx.kept = spec, None
        return tuple(ys)

    @staticmethod
    def saved(ctx, gs):
        whole = all(g is not None for g in gs) or isinstance(ctx, Once)
        return ctx.saved_tensors if whole else _saved(ctx, gs)

    @staticmethod
    def backward(ctx, *gs):
        x, H, seed, *tensors = LoraGroup.saved(ctx, gs)
        needs, spec = ctx.needs_input_grad, ctx.spec
        needs_x = needs[0] or needs[1]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            siblings = group.siblings_of(tensors, spec)
            dx, grads = group.differentiate(lambda x: define(x, siblings, seed), gs, x, tensors, needs[4:], needs_x)
            return dx, None, None, None, *grads
        dx, grads = group.run_backward(gs, x, tensors, H, seed, spec, needs[4:], needs_x)
        dx, uncast = prepare.dx_of(dx, needs[1])
        return dx, uncast, None, None, *grads


def define(x: Tensor, siblings: Sequence[Sibling], seed: Tensor | None) -> list[Tensor]:
    """The definition, [y (..., N)] of the siblings from x (..., K), differentiable."""
    with torch.autocast(x.device.type, enabled=False):
        masks = prepare.masks(x, seed, [a.p for s in siblings for a in s.adapters])
        wide = x.to(prepare.at_least_float32(x.dtype))
        ys = reference.forward(wide, [prepare.widened(s, x.dtype) for s in siblings], masks)
        return [y.to(x.dtype) for y in ys]


def _saved(ctx, gs):
    """What was saved, also for a backward after that of other siblings, as layers apart allow: q's loss, then k's.

    The first one frees what autograd holds; it is kept here until each sibling had its turn or the graph is gone. An
    optimizer may have stepped since: only what this backward reads must be as it was.
    """
    now = {i for i, g in enumerate(gs) if g is not None}
    if ctx.kept is not None:
        saved, versions, done = ctx.kept
        places, _ = group.places_of(sorted(now), ctx.spec)
        read = [0, 1, 2, *(3 + place for place in places)]  # x, H, seed and the siblings' own
        if not now & done and all(_version(saved[i]) == versions[i] for i in read):
            done |= now
            ctx.kept = ctx.kept if len(done) < len(gs) else None
            return saved
    saved = ctx.saved_tensors  # which raises where autograd has freed them
    ctx.kept = saved, [_version(t) for t in saved], now
    return saved


def _version(tensor):
    return None if tensor is None else tensor._version
