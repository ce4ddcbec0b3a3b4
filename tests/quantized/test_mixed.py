"""Mixed batches over quantized bases: the base is called once, all adapters of the batch are one pass behind it."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import peft_fast
from benchmarks.criterion import check
from peft_fast import settings
from peft_fast.patch import ledger, packed
from peft_fast.reference import lora_mixed as reference
from tests.patch.toys import assert_same, both, stock
from tests.quantized import models
from tests.quantized.models import BASES, SOME, K, bases, inputs, layers, model_of, toy

NAMES = ["default", "other", "__base__", "third", "other"]


@pytest.fixture(autouse=True)
def usual_settings():
    with settings.override(min_tokens=128):
        yield


def crowd(quantize, options, dtype=torch.float32, **config):
    """Three adapters of different rank and scaling, the last on one of two layers."""
    if quantize is models.four_bits:
        options = {**options, "compute": dtype}
    model = model_of(quantize, options, dtype, **config)
    config.pop("use_dora", None)
    both_layers = {"target_modules": ["up", "down"], "init_lora_weights": False, **config}
    model.add_adapter("other", LoraConfig(r=7, lora_alpha=3, **both_layers))
    model.add_adapter("third", LoraConfig(r=1, use_rslora=True, **both_layers | {"target_modules": ["up"]}))
    ledger.forget(model.modules())
    return model.eval()


def mixed(layer, x, names=NAMES):
    """(stock's y, ours), which was fast, without gradients."""
    with torch.no_grad():
        with stock():
            expected = layer(x, adapter_names=names)
        before = peft_fast.report(layer).fast_calls
        got = layer(x, adapter_names=names)
    assert peft_fast.report(layer).fast_calls == before + 1 and not peft_fast.report(layer).handed_back
    return expected, got


@bases()
@pytest.mark.parametrize("tokens", [1, 7, 60])
def test_values(quantize, options, kind, product, tokens):
    model = crowd(quantize, options)
    up, x = layers(model)[0], inputs(5, tokens, K).detach()
    expected, got = mixed(up, x)
    assert_same({"y": expected}, {"y": got}, 2e-6)
    with torch.no_grad():
        base = up.base_layer(x)
    assert torch.equal(got[2], base[2]) and not torch.equal(got[3], base[3])
    with torch.no_grad():
        expected, got, fast, handed_back = both(model, x, adapter_names=tuple(NAMES))
    assert (fast, handed_back) == (2, {})
    assert_same(expected, got, 2e-6 if quantize in (models.hqq, models.torchao_int4) else 0.02)


@pytest.mark.parametrize(
    "names", [["default"] * 5, ["__base__"] * 5, ["third"] * 5, ["__base__", "third"] * 2 + ["other"]], ids=str
)
@bases(SOME)
def test_names(quantize, options, kind, product, names):
    for layer, width in zip(layers(crowd(quantize, options)), (K, models.N), strict=True):
        x = inputs(5, 3, width).detach()
        expected, got = mixed(layer, x, names)
        assert_same({"y": expected}, {"y": got}, 2e-6)
        for row, name in enumerate(names):
            if name not in layer.lora_A:
                with torch.no_grad():
                    assert torch.equal(got[row], layer.base_layer(x)[row])


# (x and base, adapters, autocast)
SITUATIONS = {
    "f32": (torch.float32, torch.float32, False),
    "bf16": (torch.bfloat16, torch.bfloat16, False),
    "bf16, f32 adapters": (torch.bfloat16, torch.float32, False),
    "f32, bf16 adapters": (torch.float32, torch.bfloat16, False),
    "f16": (torch.float16, torch.float16, False),
    "f16, f32 adapters": (torch.float16, torch.float32, False),
    "autocast": (torch.float32, torch.float32, True),
    "autocast, bf16 x": (torch.bfloat16, torch.float32, True),
}


@pytest.mark.parametrize("situation", SITUATIONS)
@bases(SOME)
def test_no_less_accurate_than_peft(quantize, options, kind, product, situation):
    """Against the adapters in float64 behind the base's own bits."""
    dtype, low, autocast = SITUATIONS[situation]
    up = layers(crowd(quantize, options, dtype))[0]
    for name, p in up.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(torch.bfloat16).to(low)
    x = inputs(5, 13, K).detach().to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        expected, got = mixed(up, x)
        base = up.base_layer(x)
    names = list(up.lora_A)
    adapters = [(up.lora_A[n].weight.double(), up.lora_B[n].weight.double(), up.scaling[n], 0.0, None) for n in names]
    owners = [names.index(name) if name in names else -1 for name in NAMES]
    truth = reference.forward(x.double(), base.double(), adapters, owners)
    assert got.dtype is expected.dtype is base.dtype and torch.equal(got[2], base[2])
    own = [row for row, owner in enumerate(owners) if owner >= 0]
    narrow = torch.bfloat16 if autocast else min((dtype, low), key=lambda d: torch.finfo(d).bits)
    verdict = check(got[own], expected[own], truth[own], narrow, 64 * 4)
    assert verdict, verdict.reason


@bases({name: BASES[name] for name in ("nf4", "fp4", "torchao int8", "hqq 4-bit")})
def test_gradients(quantize, options, kind, product):
    """Against the definition: PEFT itself raises with bitsandbytes' 4-bit layers, whose result it writes into."""
    up, x = layers(crowd(quantize, options))[0], inputs(5, 3, K)
    adapters = [(up.lora_A[n].weight, up.lora_B[n].weight, up.scaling[n], 0.0, None) for n in up.lora_A]
    leaves = [x, *[t.requires_grad_() for a in adapters for t in a[:2]]]
    owners = [list(up.lora_A).index(name) if name in up.lora_A else -1 for name in NAMES]
    g = torch.randn(5, 3, models.N, generator=torch.Generator().manual_seed(4))
    y = up(x, adapter_names=NAMES)
    got = torch.autograd.grad(y, leaves, g)
    W = packed.base_of(up.base_layer).W.dense(torch.float32)
    truth = reference.forward(x, nn.functional.linear(x, W, up.base_layer.bias), adapters, owners)
    expected = torch.autograd.grad(truth, leaves, g)
    assert not peft_fast.report(up).handed_back
    for a, b in zip((y, *got), (truth, *expected), strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


def test_biases_of_adapters():
    for quantize in (models.four_bits, models.eight_bits):
        up = layers(crowd(quantize, {}, lora_bias=True))[0]
        for lora_B in up.lora_B.values():
            nn.init.normal_(lora_B.bias)
        expected, got = mixed(up, inputs(5, 3, K).detach())
        assert_same({"y": expected}, {"y": got}, 2e-6)


@bases(SOME)
def test_what_peft_raises(quantize, options, kind, product):
    model, x = crowd(quantize, options), inputs(5, 3, K).detach()
    with pytest.raises(ValueError, match="same as the number of inputs"):
        model(x, adapter_names=NAMES[:4])
    up = layers(model)[0]
    up.merged_adapters.append("default")
    with pytest.raises(ValueError, match="merged adapters"):
        model(x, adapter_names=NAMES)
    up.merged_adapters.clear()
    with pytest.raises(ValueError, match="DoRA"):
        crowd(quantize, options, use_dora=True)(x, adapter_names=NAMES)


@bases(SOME)
def test_what_is_pefts(quantize, options, kind, product):
    model, x = crowd(quantize, options, lora_dropout=0.5), inputs(5, 3, K).detach()

    def handed_back(reason, model=model):
        with torch.no_grad():
            expected, got, fast, reasons = both(model.base_model.model, x, adapter_names=NAMES)
        assert fast == 0 and any(reason in given for given in reasons), reasons
        assert_same(expected, got)

    with model.disable_adapter():
        handed_back("the adapters are disabled")
    with peft_fast.disabled():
        handed_back("inside `with peft_fast.disabled()`")
    handed_back("dropout in a mixed batch", crowd(quantize, options, lora_dropout=0.5).train())


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_unmarked(name):
    """PEFT's plain layer on bitsandbytes' one."""
    quantize, options, *_ = BASES[name]
    torch.manual_seed(0)
    base = models.Toy(quantize, **options)
    base.is_loaded_in_4bit = base.is_loaded_in_8bit = False
    config = {"target_modules": ["up", "down"], "init_lora_weights": False}
    model = peft_fast.accelerate(get_peft_model(base, LoraConfig(r=4, **config)))
    model.add_adapter("other", LoraConfig(r=2, **config))
    x, names = inputs(3, 2, K).detach(), ["other", "__base__", "default"]
    expected, got = mixed(model.eval().base_model.model.up, x, names)
    assert_same({"y": expected}, {"y": got}, 2e-6)


def test_generating_between_training_steps():
    model = toy(models.four_bits)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False))
    found = []
    for evaluated in (False, True):
        other = copy.deepcopy(model)
        if evaluated:
            with torch.no_grad():
                other.eval()(inputs(2, 1, K).detach(), adapter_names=["other", "__base__"])
        x = inputs(150, K)
        other.train()(x).sum().backward()
        found.append({n: p.grad for n, p in other.named_parameters() if p.grad is not None} | {"x": x.grad})
    assert_same(*found)
