"""A quantized base is tried once: whatever its library raises is a no, and what the trial calls tries nothing again."""

import threading

import pytest
import torch
from torch import nn

from peft_fast.patch import packed
from peft_fast.patch.packed import Base, Rows


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch):
    monkeypatch.setattr(packed, "_trusted", {})


class Library(nn.Module):
    """A library's layer, which multiplies by int8 times a scale, or does something else instead."""

    def __init__(self, instead=None):
        super().__init__()
        values = torch.randint(-127, 127, (6, 8), dtype=torch.int8)
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.W, self.instead, self.calls = Rows(values, torch.rand(6, 1)), instead, 0

    def forward(self, x):
        self.calls += 1
        if self.instead is not None:
            self.instead(self)
        return x @ self.W.dense(x.dtype).T

    def trusted(self):
        return packed.trusted(self, Base("int8", self.W), torch.float32)


def fails(error):
    def instead(layer):
        raise error

    return instead


def test_one_trial():
    layer = Library()
    assert layer.trusted() and layer.trusted() and layer.calls == 1


ERRORS = [KeyError("kernel"), IndexError(3), ImportError("kernels"), OSError(), ValueError()]
ERRORS += [MemoryError(), torch.OutOfMemoryError()]


@pytest.mark.parametrize("error", ERRORS)
def test_what_a_library_raises_is_a_no(error):
    layer = Library(fails(error))
    assert not layer.trusted() and not layer.trusted() and layer.calls == 1


def test_another_product_is_a_no():
    layer = Library(lambda layer: setattr(layer, "W", layer.W._replace(scale=layer.W.scale * 1.1)))
    assert not layer.trusted()


def test_a_trial_within_a_trial_asks_nobody():
    layer = Library(lambda layer: inner.append(layer.trusted()))
    inner = []
    assert layer.trusted() and inner == [False] and layer.calls == 1


def test_the_first_answer_of_two_threads_stays():
    def another_is_first(layer):
        layer.instead = fails(MemoryError())
        thread = threading.Thread(target=layer.trusted)
        thread.start()
        thread.join()
        layer.instead = None

    layer = Library(another_is_first)
    assert not layer.trusted() and not layer.trusted() and layer.calls == 2


def test_an_interruption_says_nothing():
    layer = Library(fails(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        layer.trusted()
    layer.instead = None
    assert layer.trusted()
