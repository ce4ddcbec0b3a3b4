"""A call leaves no byte behind: long trainings and servers make billions of them."""

import ctypes
import gc
import sys

import pytest
import torch
from torch import nn

from peft_fast import settings
from tests.patch.toys import K, conv1d, inputs, layers, toy

FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class Info(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in FIELDS.split())


try:
    _mallinfo = ctypes.CDLL(None).mallinfo2
    _mallinfo.restype = Info
except (AttributeError, OSError):
    pytestmark = pytest.mark.skip(reason="no mallinfo2: a C library other than glibc from 2.33 on")


def used():
    """Bytes that C has, and Python's blocks, which it takes from others, at the least that one has."""
    gc.collect()
    return _mallinfo().uordblks + 16 * sys.getallocatedblocks()


def growth(call, calls=500):
    """Bytes in use that a call adds: the least of some rounds, as caches fill and lists grow."""
    found = []
    for _ in range(3):
        before = used()
        for _ in range(calls):
            call()
        found.append((used() - before) / calls)
    return min(found)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_dropout": 0.1}], ids=str)
@pytest.mark.parametrize("layer", [nn.Linear, conv1d])
def test_evaluation(layer, config, tokens):
    model, x = toy(layer, **config).eval(), inputs(tokens, K).detach()
    with settings.override(min_tokens=128), torch.no_grad():
        assert growth(lambda: layers(model)[0](x)) < 8


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_dropout": 0.1}], ids=str)
def test_training(config):
    model, x = toy(**config), inputs(40, K).detach()

    def step():
        model(x).sum().backward()
        model.zero_grad()

    assert growth(step, 200) < 40


def test_what_leaks_is_noticed():
    kept = []
    assert growth(lambda: kept.append(torch.empty(100))) > 400
    assert growth(lambda: kept.append({"a": object()})) > 16
