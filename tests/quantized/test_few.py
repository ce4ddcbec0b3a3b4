"""Few tokens in evaluation without gradients, as when generating: fast over every quantized base, and right."""

import contextlib
import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft_fast
from benchmarks.criterion import check
from peft_fast import settings
from peft_fast.patch import ledger, packed, quantized
from peft_fast.reference import lora_linear as reference
from tests.patch.toys import assert_same, both, stock
from tests.quantized import models
from tests.quantized.models import BASES, SOME, K, bases, inputs, layers, model_of, toy


@pytest.fixture(autouse=True)
def usual_settings():
    with settings.override(min_tokens=128):
        yield


def evaluated(quantize, options, dtype=torch.float32, **config):
    if quantize is models.four_bits:
        options = {**options, "compute": dtype}
    model = model_of(quantize, options, dtype, **config).eval()
    ledger.forget(model.modules())
    return model


def one_layer(layer, x):
    """(stock's y, ours) of a layer without gradients, which must have been fast."""
    with torch.no_grad():
        with stock():
            expected = layer(x)
        before = peft_fast.report(layer).fast_calls
        got = layer(x)
    assert peft_fast.report(layer).fast_calls == before + 1 and not peft_fast.report(layer).handed_back
    return expected, got


@bases()
def test_fast_and_right(quantize, options, kind, product):
    model = evaluated(quantize, options)
    with torch.no_grad():
        expected, got, fast, handed_back = both(model, inputs(2, 5, K).detach())
    assert (fast, handed_back) == (2, {})
    # the second layer's x, an ulp off, is rounded again by who computes in int8 or bfloat16
    assert_same(expected, got, 2e-6 if quantize in (models.hqq, models.torchao_int4) else 0.02)
    shapes = [(1, K), (K,), (3, 2, K), (1, 60, K)]
    if quantize is models.eight_bits:
        shapes.remove((K,))  # bitsandbytes raises
    for x in (*(inputs(*shape) for shape in shapes), inputs(2, 5, 2 * K)[..., ::2]):
        expected, got = one_layer(layers(model)[0], x.detach())
        assert_same({"y": expected}, {"y": got}, 2e-6)


# (x and base, adapters, how many of these)
SITUATIONS = {
    "f32": (torch.float32, torch.float32, 1),
    "bf16": (torch.bfloat16, torch.bfloat16, 1),
    "bf16, f32 adapters": (torch.bfloat16, torch.float32, 1),
    "f32, two": (torch.float32, torch.float32, 2),
    "bf16, two": (torch.bfloat16, torch.bfloat16, 2),
    "f16, f32 adapters": (torch.float16, torch.float32, 1),
}


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("situation", SITUATIONS)
@bases({name: BASES[name] for name in (*SOME, "torchao int4")})
def test_no_less_accurate_than_peft(quantize, options, kind, product, situation, tokens):
    """Against float64: the adapters behind the base's own bits, or where we multiply by it the whole product."""
    dtype, low, count = SITUATIONS[situation]
    model = evaluated(quantize, options, dtype)
    if count == 2:
        model.add_adapter("second", LoraConfig(r=3, target_modules=["up"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
    up = layers(model.eval())[0]
    adapters = []
    for name in up.active_adapters:
        for part in (up.lora_A[name], up.lora_B[name]):
            part.weight.data = part.weight.data.to(torch.bfloat16).to(low)
        A, B = up.lora_A[name].weight.double(), up.lora_B[name].weight.double()
        adapters.append((A, B, up.scaling[name], 0.0, None))
    ours, theirs, exact = [], [], []
    with torch.no_grad():
        for seed in range(1 + 60 // tokens):
            x = inputs(tokens, K, seed=seed).detach().to(dtype)
            expected, got = one_layer(up, x)
            assert got.dtype is expected.dtype and got.shape == expected.shape
            if packed.calls(up.base_layer, tokens, dtype):
                truth = reference.forward(x.double(), torch.zeros(models.N, K).double(), None, adapters)
                truth = truth + up.base_layer(x).double()
            else:
                W = packed.base_of(up.base_layer).W.dense(torch.float64)
                truth = reference.forward(x.double(), W, up.base_layer.bias.double(), adapters)
            for found, y in zip((ours, theirs, exact), (got, expected, truth), strict=True):
                found.append(y)
    narrow = min((dtype, low), key=lambda d: torch.finfo(d).bits)
    verdict = check(torch.cat(ours), torch.cat(theirs), torch.cat(exact), narrow, 64 * 4)
    assert verdict, verdict.reason


@bases(SOME)
def test_what_it_depends_on_is_read_at_every_call(quantize, options, kind, product):
    model = evaluated(quantize, options, lora_dropout=0.4)
    up, x, seen = layers(model)[0], inputs(3, K).detach(), []
    for change in (
        lambda: None,
        lambda: up.set_scale("default", 3.0),
        lambda: up.scaling.update(default=torch.tensor(0.3)),
        lambda: up.lora_A["default"].weight.data.mul_(2),
        lambda: setattr(up.lora_B["default"], "weight", nn.Parameter(up.lora_B["default"].weight * 3)),
        lambda: setattr(up.base_layer, "bias", nn.Parameter(up.base_layer.bias + 1, requires_grad=False)),
    ):
        change()
        expected, got = one_layer(up, x)
        assert_same({"y": expected}, {"y": got}, 2e-6)
        seen.append(got.sum().item())
    assert len(set(seen)) == len(seen)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(up(x), up.base_layer(x))
    assert "the adapters are disabled" in peft_fast.report(up).handed_back


@bases({name: BASES[name] for name in ("nf4", "int8")})
def test_biases_of_adapters(quantize, options, kind, product):
    up = layers(evaluated(quantize, options, lora_bias=True))[0]
    nn.init.normal_(up.lora_B["default"].bias)
    expected, got = one_layer(up, inputs(3, K).detach())
    assert_same({"y": expected}, {"y": got}, 2e-6)


@pytest.mark.parametrize(
    "around",
    [lambda: torch.autocast("cpu", torch.bfloat16), lambda: settings.override(exact=True), torch.inference_mode],
    ids=["autocast", "exact", "inference"],
)
@bases(SOME)
def test_modes(quantize, options, kind, product, around):
    up = layers(evaluated(quantize, options, torch.float32))[0]
    with around():
        autocast = torch.is_autocast_enabled("cpu")
        expected, got = one_layer(up, inputs(3, K).detach())
    assert_same({"y": expected}, {"y": got}, 0.02 if autocast else 2e-6)


@bases(SOME)
def test_who_looks_at_the_base_sees_its_own_result(quantize, options, kind, product):
    """To what a hook may have kept nothing is added."""
    up, kept = layers(evaluated(quantize, options))[0], []
    x = inputs(3, K).detach()
    with torch.no_grad():
        up(x)
        expected = up.base_layer(x)
        up.base_layer.register_forward_hook(lambda module, args, y: kept.append(y))
        up(x)
    assert len(kept) == 1 and torch.equal(kept[0], expected)


def test_with_gradients_they_are_pefts():
    model = model_of(models.four_bits, {})
    expected, got, fast, handed_back = both(model, inputs())
    assert fast == 0 and next(iter(handed_back)).startswith("few tokens")
    assert_same(expected, got)


@pytest.mark.parametrize("p", [0.0, 0.4])
@bases(SOME)
def test_a_checkpoint_s_recomputation_goes_the_way_of_its_forward(quantize, options, kind, product, p):
    """Its forward has no gradients either, but is training."""
    model = model_of(quantize, options, lora_dropout=p)
    found = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=True)):
        x = inputs()
        torch.manual_seed(3)
        y = run(x)
        y.square().sum().backward()
        found.append({"y": y.detach(), "x": x.grad})
    assert_same(*found)


def test_a_base_that_does_not_pack_itself_is_multiplied_by():
    """As on processors without AVX512BF16."""
    model = evaluated(models.four_bits, {})
    for layer in layers(model):
        layer.base_layer.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        expected, got, fast, handed_back = both(model, inputs(3, K).detach())
    assert (fast, handed_back) == (2, {}) and not packed.calls(layers(model)[0].base_layer, 1, torch.float32)
    assert_same(expected, got, 2e-6)


@bases(SOME)
def test_wrong_inputs_raise_what_peft_raises(quantize, options, kind, product):
    up = layers(evaluated(quantize, options))[0]
    for x in (torch.randn(3, K + 1), torch.randn(3, K, dtype=torch.float64), torch.randn(3, K).to("meta")):
        errors = []
        for call in (stock, contextlib.nullcontext):
            try:
                with call(), torch.no_grad():
                    copy.deepcopy(up)(x)
                errors.append(None)
            except Exception as error:
                errors.append(type(error))
        assert errors[0] is errors[1]


def test_the_usual_look_is_short():
    """A call asks for no plan, whose look at everything takes longer than a library's product of one token."""
    model = evaluated(models.four_bits, {})
    if not getattr(layers(model)[0].base_layer, "support_avx512bf16_for_cpu", False):
        pytest.skip("this processor has no kernel for it")
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(quantized, "plan_of", lambda layer: pytest.fail("asked for a plan"))
        model(inputs(1, K).detach())


def test_unmarked():
    model = toy(models.eight_bits)
    model.base_model.model.is_loaded_in_8bit = False
    with torch.no_grad():
        expected, got, fast, handed_back = both(model.eval(), inputs(3, K).detach())
    assert (fast, handed_back) == (2, {})
    assert_same(expected, got, 0.02)


def test_where_the_base_is_called():
    """As measured: where the library multiplies by the weight as it is kept, and not after making it dense."""
    called = {"nf4": [True, True, False], "int8": [True] * 3, "torchao int8": [True] * 3}
    for name, (quantize, options, *_) in (SOME | {"torchao int4": BASES["torchao int4"]}).items():
        base = layers(evaluated(quantize, options, torch.bfloat16))[0].base_layer
        if name == "nf4" and not base.support_avx512bf16_for_cpu:
            continue  # which no processor without it packs
        found = [packed.calls(base, tokens, torch.bfloat16) for tokens in (1, 31, 32)]
        assert found == called.get(name, [False] * 3), name


def test_a_class_of_its_own_is_pefts():
    model = evaluated(models.four_bits, {})
    (layer, *_), kind = layers(model), type(layers(model)[0])
    layer.__class__ = type("Mine", (kind,), {"_cast_input_dtype": lambda self, x, dtype: 2 * x.to(dtype)})
    with torch.no_grad():
        for tokens in (3, 200):
            x = inputs(tokens, K).detach()
            with stock():
                expected = layer(x)
            assert torch.equal(layer(x), expected)
    layer.__class__ = kind
    base, x = layer.base_layer, inputs(3, K).detach()
    base.__class__ = type("Storing", (type(base),), {})
    with torch.no_grad():
        assert quantized._few(layer, x) is None
        base.__class__ = type(base).__mro__[1]
        assert quantized._few(layer, x) is not None
