"""A trial's memory is its own: what the trials before it left in the C library goes back to the system."""

import ctypes

import pytest
import torch

from peft_fast.recipes import process, search

SIZE, COUNT = 16_000, 2_000  # float32: 122 MiB in blocks that the C library keeps on its heap


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_what_is_free_goes_back_though_something_above_it_is_in_use():
    blocks = [torch.full((SIZE,), 1.0) for _ in range(COUNT)]
    last = blocks[-1]  # the heap cannot shrink past it by itself
    del blocks
    held = process.memory(torch.device("cpu"))
    search.free()
    assert process.memory(torch.device("cpu")) < held - 2 * SIZE * COUNT and last.sum() == SIZE


def test_where_the_c_library_has_no_such_call_nothing_happens(monkeypatch):
    for library in (object(), None):
        monkeypatch.setattr(ctypes, "CDLL", lambda name, library=library: library)
        process.trim()
