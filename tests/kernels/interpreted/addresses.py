"""Triton's interpreter with memory taken away: loads give zeros, and every address is held against its tensor.

Launches run on meta tensors, so shapes may be larger than any machine; a tensor that holds data is read. Each load and
store must lie inside the view it was given, and no element may be stored twice in one launch (that would be a race
between programs).
"""

from __future__ import annotations

import builtins
import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import torch
from triton.runtime import interpreter

SLOT = 44  # each argument of a launch has 2^44 bytes of addresses of its own
FEW = 8
COUNTED = 1 << 24  # larger outputs are held to their bounds only


@dataclass
class Seen:
    """One tensor argument of one launch: the range of elements touched, and how often each was stored."""

    tensor: torch.Tensor
    low: int = 1 << 62
    high: int = -1
    loads: int = 0
    stores: int = 0
    counts: np.ndarray | None = field(default=None, repr=False)

    def touch(self, offsets: np.ndarray, store: bool) -> np.ndarray:
        """Checks bytes from the tensor's first, counts them, and gives the elements' numbers."""
        t = self.tensor
        assert not (offsets % t.element_size()).any(), f"misaligned access to {tuple(t.shape)}"
        elements = offsets // t.element_size()
        if elements.size == 0:
            return elements
        index, rest = np.zeros_like(elements), elements.copy()
        sizes = sorted(zip(t.stride(), t.shape, range(t.dim()), strict=True), reverse=True)
        for stride, size, dim in sizes:
            if size == 1 or stride == 0:
                continue
            here = rest // stride
            rest -= here * stride
            wrong = here >= size
            assert not wrong.any(), f"element {int(elements[wrong][0])} is outside {tuple(t.shape)} at {t.stride()}"
            index += here * math.prod(t.shape[dim + 1 :])
        assert not rest.any() and (elements >= 0).all(), f"between the elements of {tuple(t.shape)} at {t.stride()}"
        self.low, self.high = min(self.low, int(index.min())), max(self.high, int(index.max()))
        if not store:
            self.loads += elements.size
            return index
        self.stores += elements.size
        if t.numel() <= COUNTED:
            if self.counts is None:
                self.counts = np.zeros(t.numel(), np.int64)
            np.add.at(self.counts, index, 1)
            assert self.counts.max() <= 1, f"an element of {tuple(t.shape)} is stored twice in one launch"
        return index

    @property
    def covered(self) -> bool:
        """Every element stored."""
        return self.tensor.numel() == 0 or (self.counts is not None and bool((self.counts == 1).all()))


@contextlib.contextmanager
def addresses(corners: Sequence[ModuleType] = ()) -> Iterator[list[list[Seen]]]:
    """Lists the tensors of each launch inside the block.

    With `corners`, the modules of the kernels, only the first and last program of each grid dimension and the first
    and last step of each loop of more than a few run.
    """
    launches: list[list[Seen]] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor

    def convert(argument, original=interpreter._implicit_cvt):
        if not isinstance(argument, torch.Tensor):
            return original(argument)
        # a real one-element tensor of this dtype gives the pointer its type
        pointer = original(torch.zeros(1, dtype=argument.dtype))
        launches[-1].append(Seen(argument))
        pointer.handle.data = np.array([len(launches[-1]) << SLOT], np.uint64)
        return pointer

    def touch(pointers, mask, store, values=None):
        kept = np.asarray(mask.data).astype(bool)  # of a descriptor it is a plain array
        at = np.broadcast_to(pointers.data, kept.shape)[kept].astype(np.int64)
        for slot in np.unique(at >> SLOT):
            assert 1 <= slot <= len(launches[-1]), "an address outside every tensor"
            seen = launches[-1][slot - 1]
            index = seen.touch(at[at >> SLOT == slot] - (int(slot) << SLOT), store)
            if values is not None and not seen.tensor.is_meta:
                values[kept] = seen.tensor.reshape(-1)[torch.from_numpy(index)].numpy()

    def load(self, pointers, mask, other, *_, **__):
        dtype = pointers.get_element_ty()
        values = np.zeros(pointers.data.shape, interpreter._get_np_dtype(dtype))
        if other is not None:
            values[...] = np.where(np.asarray(mask.data).astype(bool), 0, other.data)
        touch(pointers, mask, store=False, values=values)
        return interpreter.TensorHandle(values, dtype)

    def store(self, pointers, value, mask, *_, **__):
        touch(pointers, mask, store=True)

    def begin(self, arguments, keywords):
        launches.append([])
        return arguments, keywords

    def ends(*bounds):
        every = builtins.range(*bounds)
        # over adapters or siblings each step counts, and there are few
        return every if len(every) <= FEW else (every[0], every[-1])

    changes = [
        (interpreter, "_implicit_cvt", convert),
        (builder, "create_masked_load", load),
        (builder, "create_masked_store", store),
        (executor, "_init_args_hst", begin),
        (executor, "_restore_args_dev", lambda *_: None),
    ]
    if corners:
        changes += [(module, "range", ends) for module in (interpreter, *corners)]
    before = [(owner, name, owner.__dict__.get(name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield launches
    finally:
        for owner, name, value in before:
            delattr(owner, name) if value is None else setattr(owner, name, value)
