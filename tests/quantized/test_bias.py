"""bias="all" on a quantized base: its gradient is stock's, and a lost or wrong one is noticed."""

import pytest
import torch

import peft_fast
from peft_fast.ops import lora_add, lora_quantized
from tests.patch.test_base_biases import FAULTS, base_biases, plant, wrong
from tests.patch.toys import step, stock
from tests.quantized import models
from tests.quantized.models import bases, inputs, layers, model_of, toy

# where each Function hands it back; lora_add with the gradient of all that the library's own product made
AT = {"LoraQuantized": (lora_quantized, [1]), "LoraAdd": (lora_add, [0])}
# bases that compute in another dtype than x has: the library runs them
APART = {kind: {"quant_type": kind, "compute": torch.bfloat16} for kind in ("nf4", "fp4")}


def trained(model):
    """HQQ's bias is no parameter, so PEFT's "all" does not find it: it is asked for a gradient by hand."""
    for layer in layers(model):
        layer.base_layer.bias.requires_grad_()
    return model


def gradients(model):
    """One step's output and gradients, those of biases that are no parameters too."""
    biases = {f"{i}.bias": layer.base_layer.bias for i, layer in enumerate(layers(model))}
    for bias in biases.values():
        bias.grad = None
    found = step(model, (inputs(),), {})
    return found | {name: bias.grad.clone() for name, bias in biases.items() if bias.grad is not None}


def compared(model):
    with stock():
        expected = gradients(model)
    before = peft_fast.report(model).fast_calls
    got = gradients(model)
    assert peft_fast.report(model).fast_calls == before + 2
    assert len(base_biases(expected)) >= 2
    return expected, got


def apart(options):
    model = trained(toy(models.four_bits, options=options, bias="all"))
    model(inputs())  # in which bitsandbytes casts its biases
    return model


@bases()
def test_it_is_stocks(quantize, options, kind, product):
    expected, got = compared(trained(model_of(quantize, options, bias="all")))
    assert expected.keys() == got.keys() and not wrong(expected, got, 2e-6)


@pytest.mark.parametrize("options", APART.values(), ids=APART)
def test_it_is_stocks_where_the_library_runs_the_base(options):
    expected, got = compared(apart(options))
    assert expected.keys() == got.keys() and not wrong(expected, got, 2e-6)


def faulty(function, fault, monkeypatch):
    op, at = AT[function]
    return plant(monkeypatch, op.__globals__[function], lambda ctx, out: at, FAULTS[fault])


@bases(models.SOME)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(quantize, options, kind, product, fault, monkeypatch):
    model = trained(model_of(quantize, options, bias="all"))
    changed = faulty("LoraQuantized", fault, monkeypatch)
    expected, got = compared(model)
    off = wrong(expected, got, 2e-6)
    assert changed and off == base_biases(expected)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("options", APART.values(), ids=APART)
def test_a_fault_where_the_library_runs_the_base_is_noticed(options, fault, monkeypatch):
    model = apart(options)
    changed = faulty("LoraAdd", fault, monkeypatch)
    expected, got = compared(model)
    assert changed and base_biases(wrong(expected, got, 2e-6)) == base_biases(expected)
