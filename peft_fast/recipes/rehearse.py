"""A training step rehearsed without arithmetic: every tensor that it would allocate, in order, none of them real.

The weights are torch's FakeTensors: shapes, strides, dtypes and a device, no memory. What depends on the rows alone
(ids, masks, labels) stays real, so that a loss that looks at its labels can. A 7B model takes no more memory than
its rows do, on a machine that could not hold it.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

INDEX = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}


class Ledger(TorchDispatchMode):
    """Bytes of tensors that live, and the most that did, from the operators' results."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def know(self, tensors: Any) -> None:
        """These were there before: not counted."""
        for t in tensors:
            storage = t.untyped_storage()
            self._alive[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
        else:
            if func in INDEX:
                args = (args[0], _places(args[1]), *args[2:])
            result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        return result

    def _count(self, t: torch.Tensor) -> None:
        storage = t.untyped_storage()
        known = self._alive.get(storage._cdata)
        if known is not None and known() is storage:
            return
        size = storage.nbytes()
        self.held += size
        self.peak = max(self.peak, self.held)
        self._alive[storage._cdata] = weakref.ref(storage, lambda _: self._free(size))

    def _free(self, size: int) -> None:
        self.held -= size


def _places(indices: list) -> list:
    """Real masks as real places: how many rows a mask takes is known, but not to an operator on fakes."""
    out: list = []
    for index in indices:
        if index is None or isinstance(index, FakeTensor) or index.dtype not in (torch.bool, torch.uint8):
            out.append(index)
        else:
            with unset_fake_temporarily():
                out += index.nonzero().unbind(1)
    return out


def twin(model: nn.Module, device: torch.device, mode: FakeTensorMode) -> nn.Module:
    """A copy of the model on ``device`` whose weights take no memory; the model may be on no device itself."""
    memo: dict[int, Any] = {}
    with mode:
        for t in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values():
            fake: Any = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
            if isinstance(t, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=t.requires_grad)
            memo[id(t)] = fake
    return copy.deepcopy(model, memo)


@contextlib.contextmanager
def fakes_are_dense() -> Iterator[None]:
    """peft_fast takes dense tensors only; its operators have fakes of their own, which say what they allocate."""
    from peft_fast import settings
    from peft_fast.patch import plan

    plain = plan.plain
    # a packed copy is made from values
    with (
        mock.patch.object(plan, "plain", lambda t: type(t) is FakeTensor or plain(t)),
        settings.override(pack_mb=0, quiet=True),
        warnings.catch_warnings(),
    ):
        # groups of layers tell states apart by addresses; a fake's is always 0, and its identity does as well
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield


def peak(
    model: nn.Module, step: Callable[[nn.Module], None], device: torch.device, prepare: Callable, times: int = 1
) -> tuple[int, Any]:
    """(most bytes beyond the weights while ``step`` runs on a twin, what ``prepare`` returned for the twin)."""
    from peft_fast.patch import groups

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fakes_are_dense():
        fake = twin(model, device, mode)
        found = prepare(fake)
        try:
            with mode:
                return _most(fake, step, times), found
        finally:
            groups.forget(fake.modules())


def performed(
    model: nn.Module, step: Callable[[nn.Module], None], prepare: Callable, times: int = 1
) -> tuple[int, Any]:
    """The same with real arithmetic, for a model that looks at its values; frozen weights are not copied."""
    memo = {id(t): t for t in [*model.parameters(), *model.buffers()] if not t.requires_grad}
    same = copy.deepcopy(model, memo)
    found = prepare(same)
    return _most(same, step, times), found


def _most(model: nn.Module, step: Callable[[nn.Module], None], times: int) -> int:
    ledger = Ledger()
    ledger.know([*model.parameters(), *model.buffers()])
    with ledger:
        for _ in range(times):
            step(model)
    return ledger.peak
