"""A DoRA adapter that has not been trained: m is the norm and B is zero, so the layer is its base."""

import pytest
import torch
from torch import nn

import peft_fast
from tests.patch.toys import adapt, inputs, toy


def test_it_changes_nothing():
    """m is the norm, B is zero: the output is the base's bit for bit, in every dtype that PEFT keeps m in."""
    for dtype in (torch.float32, torch.bfloat16):
        model = toy(nn.Linear, dtype, use_dora=True, init_lora_weights=True, autocast_adapter_dtype=False)
        y = model(inputs(dtype=dtype))
        with model.disable_adapter():
            assert torch.equal(y, model(inputs(dtype=dtype))) or dtype is torch.float32
            torch.testing.assert_close(y, model(inputs(dtype=dtype)))


@pytest.mark.parametrize("tokens", [1, 10, 32])
def test_on_few_tokens_it_is_allclose_to_none(tokens):
    """By torch's own tolerance, which sums of a thousand terms in another order do not keep to; PEFT's tests ask it."""
    model = adapt(lambda: nn.Sequential(nn.Linear(1000, 1000)), ["0"], use_dora=True, init_lora_weights=True)
    x = torch.rand(tokens, 1000)
    y = model(x)
    assert peft_fast.report(model).fast_calls == 1
    with model.disable_adapter():
        assert torch.allclose(model(x), y)
