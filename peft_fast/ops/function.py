"""The autograd Function of every op: it also takes a batch of gradients, one after the other.

Such are autograd.grad(is_grads_batched=True), autograd.functional.jacobian(vectorize=True) and torch.func.vmap around
autograd.grad: they run a backward once, on tensors of another kind. Ours write into buffers, and call operators that
have no rule for those.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack


class Function(torch.autograd.Function):
    """torch's, whose backward is called with one gradient at a time."""

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        cls.backward = staticmethod(_one_by_one(cls, cls.backward))

    @staticmethod
    def saved(ctx: object, gs: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
        """What forward saved, for the gradients that there are."""
        return ctx.saved_tensors


def _one_by_one(cls: type[Function], backward: Callable) -> Callable:
    @functools.wraps(backward)
    def either(ctx, *gs):
        if torch.compiler.is_compiling():
            return backward(ctx, *gs)
        if any(g is not None and _functorch.is_legacy_batchedtensor(g) for g in gs):
            level = torch._C._vmapmode_increment_nesting() - 1
            torch._C._vmapmode_decrement_nesting()
            whole = [g if g is None else torch._remove_batch_dim(g, level, 1, 0) for g in gs]
            return _batched(_each(backward, Once(ctx, cls.saved(ctx, whole)), whole), torch._add_batch_dim, level)
        if any(g is not None and _functorch.is_batchedtensor(g) for g in gs):
            level = _functorch.maybe_current_level()
            whole = [g if g is None else _functorch._remove_batch_dim(g, level, 1, 0) for g in gs]
            with temporarily_pop_interpreter_stack():
                columns = _each(backward, Once(ctx, cls.saved(ctx, whole)), whole)
            return _batched(columns, _functorch._add_batch_dim, level)
        return backward(ctx, *gs)

    return either


class Once:
    """A ctx whose saved tensors were asked for once: a checkpoint gives them no second time."""

    def __init__(self, ctx: object, saved: Sequence[torch.Tensor | None]):
        self.__dict__.update(ctx=ctx, saved_tensors=saved)

    def __getattr__(self, name):
        return getattr(self.ctx, name)

    def __setattr__(self, name, value):
        setattr(self.ctx, name, value)


def _each(backward, ctx, gs):
    """Gradients with the batch in front -> the backward's results, stacked the same way."""
    size = max(g.shape[0] for g in gs if g is not None)
    rows = [backward(ctx, *[g if g is None else g[min(i, g.shape[0] - 1)] for g in gs]) for i in range(size)]
    rows = [row if isinstance(row, tuple) else (row,) for row in rows]
    return [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]


def _batched(columns, add, level):
    return tuple(None if column is None else add(column, 0, level) for column in columns)
