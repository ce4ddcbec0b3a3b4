"""bitsandbytes' layers in a model that does not say it is loaded in few bits: PEFT puts its plain layer on them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import peft_fast
from peft_fast.errors import UnsupportedError
from peft_fast.patch import plan
from tests.patch.toys import assert_same, both, stock
from tests.quantized import models
from tests.quantized.models import BASES, assert_fast, inputs, ready

KINDS = ("nf4", "fp4", "nf4 in float32s", "int8", "int8 with outliers")
bases = pytest.mark.parametrize("name", KINDS)


def unmarked(name, dtype=torch.float32, **config):
    """An accelerated PEFT model, its layers PEFT's plain ones."""
    quantize, options, *_ = BASES[name]
    torch.manual_seed(0)
    base = models.Toy(quantize, dtype, **options)
    base.is_loaded_in_4bit = base.is_loaded_in_8bit = False
    config = {"r": 4, "init_lora_weights": False, "target_modules": ["up", "down"], **config}
    model = ready(peft_fast.accelerate(get_peft_model(base, LoraConfig(**config))), dtype)
    assert [type(layer) for layer in layers(model)] == [plan.Linear] * 2
    return model


def layers(model):
    net = model.base_model.model
    return [net.up, net.down]


@bases
def test_values_and_gradients(name):
    model = unmarked(name)
    assert_fast(model, inputs())
    assert_fast(model.eval(), inputs())
    report = peft_fast.report(model)
    assert set(report.quantized.values()) == {BASES[name][2]} and len(report.fast) == 2 and not report.slow


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_bfloat16(name):
    """PEFT rounds the base's product first, whose sum with the adapters it rounds again."""
    model = unmarked(name, torch.bfloat16)
    expected, got, fast, handed_back = both(model, inputs(dtype=torch.bfloat16))
    assert (fast, handed_back) == (2, {})
    assert_same(expected, got, 0.03)


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_autocast(name):
    model, found = unmarked(name, lora_dropout=0.0), []
    for call in (stock, None):
        x = inputs(seed=3)
        with call() if call else torch.autocast("cpu", enabled=False), torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        found.append((y, *torch.autograd.grad(y.float().square().sum(), x)))
    for a, b in zip(*found, strict=True):
        assert a.dtype is b.dtype
        torch.testing.assert_close(b, a, rtol=0.05, atol=0.05 * a.abs().max().item())


@bases
def test_we_multiply_by_the_base(name, monkeypatch):
    """Once tried, the library's layer is not called."""
    model = unmarked(name)
    model(inputs())
    kind, calls = type(layers(model)[0].base_layer), []
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *args: calls.append(1) or forward(*args))
    model(inputs())
    assert not calls
    with stock():
        model(inputs())
    assert len(calls) == 2


def test_what_is_pefts_stays_so():
    model = unmarked("nf4")
    with model.disable_adapter():
        expected, got, fast, handed_back = both(model, inputs())
    assert fast == 0 and list(handed_back) == ["the adapters are disabled"]
    assert_same(expected, got)
    with pytest.raises(UnsupportedError, match="plain dense parameter"), peft_fast.merged(model):
        pytest.fail("not reached")
    magnified = unmarked("nf4", use_dora=True)
    expected, got, fast, handed_back = both(magnified, inputs())
    assert fast == 0 and "keeps PEFT's forward" in next(iter(handed_back))
    assert_same(expected, got)


def test_hooks_on_the_base_are_called():
    model, calls = unmarked("nf4"), []
    layers(model)[0].base_layer.register_forward_hook(lambda *a: calls.append(1))
    assert_fast(model, inputs())
    assert len(calls) == 2


def test_restore_and_compile():
    model = unmarked("nf4")
    with stock():
        expected = model(inputs())
    torch._dynamo.reset()
    got = torch.compile(model, backend="eager")(inputs())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    peft_fast.restore(model)
    assert torch.equal(model(inputs()), expected)
