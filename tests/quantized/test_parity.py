"""Every quantized base: values and gradients equal to stock PEFT, and no less accurate where both round."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import peft_fast
from benchmarks.criterion import check
from peft_fast import settings
from peft_fast.ops import draw_seed, dropout_mask
from peft_fast.patch import packed, quantized
from peft_fast.reference import lora_linear as reference
from tests.patch.toys import assert_same, both, stock
from tests.quantized import models
from tests.quantized.models import BASES, SOME, K, assert_fast, bases, inputs, layers, model_of, ready, toy


@bases()
def test_values_and_gradients(quantize, options, kind, product):
    model = model_of(quantize, options)
    assert_fast(model, inputs())
    assert set(peft_fast.report(model).quantized.values()) == {kind}
    up = layers(model)[0]
    found = quantized.plan_of(up)
    assert found.base.kind == kind and quantized.multiplies(up, inputs(), found) is product
    with torch.no_grad():
        x = inputs().detach()
        with stock():
            expected = copy.deepcopy(model)(x)  # bitsandbytes repacks its weight for inference here
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-2 * expected.abs().max().item())


@bases(SOME)
def test_evaluation(quantize, options, kind, product):
    model = model_of(quantize, options, lora_dropout=0.5).eval()
    assert_fast(model, inputs())


@bases(SOME)
@pytest.mark.parametrize("shape", [(K,), (7, K), (2, 1, 3, K), (0, K)], ids=str)
def test_shapes(quantize, options, kind, product, shape):
    if quantize is models.eight_bits and 0 in shape:
        pytest.skip("bitsandbytes raises")
    assert_fast(model_of(quantize, options), inputs(*shape))


CONFIGS = {
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {"rank_pattern": {"up": 3}, "alpha_pattern": {"down": 20}},
    "B = 0": {"init_lora_weights": True},
    "lora_bias": {"lora_bias": True},
    "no bias": {"bias": False},
}


@bases(SOME)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_config(quantize, options, kind, product, config):
    if config.get("lora_bias") and quantize not in (models.four_bits, models.eight_bits):
        pytest.skip("PEFT has no lora_bias here")
    bias = config.get("bias", True)
    model = toy(quantize, bias=bias, options=options, **{k: v for k, v in config.items() if k != "bias"})
    for layer in layers(model):
        if config.get("lora_bias"):
            nn.init.normal_(layer.lora_B["default"].bias)
    assert_fast(ready(model), inputs())


class Given(nn.Module):
    """A dropout with a given mask."""

    def __init__(self, keep, p):
        super().__init__()
        self.keep, self.p = keep, p

    def forward(self, x):
        return x * self.keep.view(x.shape).to(x.dtype) / (1 - self.p)


@bases(SOME)
def test_dropout(quantize, options, kind, product):
    p, x = 0.3, inputs()
    model = model_of(quantize, options, lora_dropout=p)
    up = layers(model)[0]
    torch.manual_seed(5)
    keep = dropout_mask(draw_seed(1)[0], 10, K, p)
    torch.manual_seed(5)
    y = up(x)
    g = torch.randn_like(y)
    tensors = x, up.lora_A["default"].weight, up.lora_B["default"].weight
    got = (y, *torch.autograd.grad(y, tensors, g))
    up.lora_dropout["default"] = Given(keep, p)
    with stock():
        y = up(x)
    for a, b in zip(got, (y, *torch.autograd.grad(y, tensors, g)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.manual_seed(6)
    assert not torch.equal(got[0], layers(model_of(quantize, options, lora_dropout=p))[0](x))


# (x, compute dtype of the base, adapters, autocast)
SITUATIONS = {
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16, False),
    "autocast": (torch.float32, torch.bfloat16, torch.float32, True),
    "autocast, bf16 x": (torch.bfloat16, torch.bfloat16, torch.float32, True),
    "bf16 base, f32 x and adapters": (torch.float32, torch.bfloat16, torch.float32, False),
    "f32 base, bf16 adapters": (torch.float32, torch.float32, torch.bfloat16, False),
    "exact": (torch.bfloat16, torch.bfloat16, torch.float32, False),
    "f16": (torch.float16, torch.float16, torch.float16, False),
    "f16, f32 adapters": (torch.float16, torch.float16, torch.float32, False),
}


@pytest.mark.parametrize("situation", SITUATIONS)
@bases({name: BASES[name] for name in ("nf4", "int8", "torchao int8")})
def test_no_less_accurate_than_peft(quantize, options, kind, product, situation):
    dtype, compute, adapter, autocast = SITUATIONS[situation]
    base_dtype = compute
    if quantize is models.four_bits:
        options = {**options, "compute": compute}
    elif dtype is not compute:
        if quantize is models.torchao_int8 and not autocast:
            pytest.skip("this base computes in x's dtype")
        base_dtype = dtype
    torch.manual_seed(2)
    model = toy(quantize, base_dtype, options=options)
    for name, p in model.named_parameters():
        if "lora_" in name:
            # values that a narrow adapter can hold: only the arithmetic differs
            p.data = p.data.to(torch.bfloat16).to(adapter)
    layer = layers(model)[0]
    x = inputs(64, K).detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layer(x).sum().backward()
    g = torch.randn(64, models.N, generator=torch.Generator().manual_seed(4)).to(dtype)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)
        return y, *torch.autograd.grad(y, (x, A, B), g.to(y.dtype))

    with stock():
        expected = run()
    with settings.override(exact=situation == "exact"):
        before = peft_fast.report(model).fast_calls
        got = run()
        assert peft_fast.report(model).fast_calls == before + 1
    found = packed.base_of(layer.base_layer)
    leaves = [t.detach().double().requires_grad_() for t in (x, A, B)]
    s = layer.scaling["default"]
    bias = layer.base_layer.bias.detach().double()
    W = found.W.dense(torch.float64) if found.W is not None else None
    adapters = [(leaves[1], leaves[2], s, 0.0, None)]
    y = reference.forward(leaves[0], W, bias, adapters)
    truth = (y, *torch.autograd.grad(y, leaves, g.double()))
    narrow = min((dtype, compute, adapter), key=lambda d: torch.finfo(d).bits)
    for name, ours, theirs, exact in zip(("y", "dx", "dA", "dB"), got, expected, truth, strict=True):
        assert ours.dtype is theirs.dtype and ours.shape == theirs.shape, name
        verdict = check(ours.detach(), theirs.detach(), exact.detach(), narrow, 64 * 4)
        assert verdict, f"{name}: {verdict.reason}"


def test_the_first_call_lets_bitsandbytes_choose_its_dtypes():
    model = toy(models.four_bits, torch.bfloat16)
    up = layers(model)[0]
    assert not up.base_layer.compute_type_is_set
    with stock():
        expected = copy.deepcopy(model)(inputs(dtype=torch.bfloat16))
    got = model(inputs(dtype=torch.bfloat16))
    assert up.base_layer.compute_type_is_set and up.base_layer.compute_dtype is torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
    assert peft_fast.report(model).fast_calls == 2


def test_blocks_that_reach_over_a_row_stay_the_librarys():
    """On the CPU bitsandbytes starts a block at every row, against its own format: its result is what stock has."""
    layer = models.four_bits(nn.Linear(96, 64), quant_type="nf4")
    state, W = layer.weight.quant_state, packed.base_of(layer).W
    assert W is None  # before its first call
    x = inputs(3, 96)
    layer(x)
    found = packed.base_of(layer)
    agrees = torch.allclose(layer(x), x @ found.W.dense(torch.float32).t() + layer.bias, atol=1e-5)
    assert packed.trusted(layer, found, torch.float32) is agrees
    base = nn.Sequential(layer)
    base.is_loaded_in_4bit = True
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    expected, got, fast, handed_back = both(peft_fast.accelerate(model), x)
    assert fast == 1 and state.shape[1] % state.blocksize
    assert_same(expected, got, 2e-6)


def test_packed_for_inference_stays_the_librarys():
    model = model_of(models.four_bits, {}).eval()
    with stock(), torch.no_grad():
        expected = model(inputs().detach())
    up = layers(model)[0]
    if not getattr(up.base_layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this processor has no kernel for it")
    with torch.no_grad():
        torch.testing.assert_close(model(inputs().detach()), expected, rtol=0.02, atol=0.02)
    assert quantized.plan_of(up).base.W is None


def test_second_derivatives():
    model = model_of(models.four_bits, {})
    up = layers(model)[0]

    def penalty():
        x = inputs()
        (dx,) = torch.autograd.grad(up(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (up.lora_A["default"].weight, up.lora_B["default"].weight))

    with stock():
        expected = penalty()
    for a, b in zip(penalty(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
