"""Every quantized base: values, gradients and states equal to stock PEFT, and no less accurate where both round."""

import copy
import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import peft_fast
from benchmarks.criterion import check
from peft_fast import settings
from peft_fast.ops import draw_seed, dropout_mask
from peft_fast.patch import packed, quantized
from peft_fast.reference import lora_linear as reference
from tests.patch.toys import assert_same, both, stock
from tests.quantized import models
from tests.quantized.models import K, inputs, layers, ready, toy

# name -> (how to quantize, options, what the report says, whether we multiply by the base too)
BASES = {
    "nf4": (models.four_bits, {}, "bitsandbytes nf4, double quant", True),
    "nf4 plain": (models.four_bits, {"nested": False}, "bitsandbytes nf4", True),
    "fp4": (models.four_bits, {"quant_type": "fp4"}, "bitsandbytes fp4, double quant", True),
    "nf4 in float32s": (models.four_bits, {"storage": torch.float32}, "bitsandbytes nf4, double quant", True),
    "int8": (models.eight_bits, {}, "bitsandbytes int8", True),
    "int8 with outliers": (models.eight_bits, {"threshold": 6.0}, "bitsandbytes int8", True),
    "torchao int8": (models.torchao_int8, {}, "torchao Int8Tensor", True),
    "torchao int4": (models.torchao_int4, {}, "torchao IntxUnpackedToInt8Tensor", True),
    "hqq 4-bit": (models.hqq, {}, "HQQ 4-bit", True),
    "hqq 8-bit": (models.hqq, {"bits": 8}, "HQQ 8-bit", True),
}
SOME = {name: BASES[name] for name in ("nf4", "int8", "torchao int8", "hqq 4-bit")}


def bases(which=BASES):
    return pytest.mark.parametrize(("quantize", "options", "kind", "product"), which.values(), ids=which)


def model_of(quantize, options, dtype=torch.float32, **config):
    if quantize is models.hqq:
        options = {"compute": dtype, **options}
    return ready(toy(quantize, dtype, options=options, **config), dtype)


def assert_fast(model, *args, rtol=2e-6, **kwargs):
    expected, got, fast, handed_back = both(model, *args, **kwargs)
    assert (fast, handed_back) == (2, {})
    assert_same(expected, got, rtol)


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


@pytest.mark.parametrize("reentrant", [False, True])
@bases(SOME)
def test_checkpointing_draws_the_mask_again(quantize, options, kind, product, reentrant):
    model = model_of(quantize, options, lora_dropout=0.4)

    def step(run):
        x = inputs()
        torch.manual_seed(3)
        y = run(x)
        y.square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"x": x.grad}
        model.zero_grad()
        return {"y": y.detach()} | grads

    whole = step(model)
    assert_same(whole, step(lambda x: checkpoint(model, x, use_reentrant=reentrant)))


def _selective():
    return create_selective_checkpoint_contexts([torch.ops.aten.addmm.default, torch.ops.aten.mm.default])


@pytest.mark.parametrize("options_of_checkpoint", [{}, {"context_fn": _selective}], ids=["plain", "selective"])
@pytest.mark.parametrize("bias", [torch.float32, torch.bfloat16])
@bases(SOME)
def test_checkpointing_the_first_call(quantize, options, kind, product, bias, options_of_checkpoint):
    """What is tried, or chosen, at a layer's first call must not make the recomputation another."""
    packed._trusted.clear()
    model = toy(quantize, options=options)
    if quantize in (models.four_bits, models.eight_bits):
        for layer in layers(model):
            layer.base_layer.bias.data = layer.base_layer.bias.data.to(bias)

    w = 1.5 * torch.eye(K)

    def run(model, call):
        x = inputs()
        y = call(lambda x: (model(x @ w) @ w).tanh(), x)
        y.square().sum().backward()
        return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    with stock():
        expected = run(copy.deepcopy(model), lambda f, x: f(x))
    calls = []
    agrees = packed._agrees
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "_agrees", lambda *args: calls.append(args) or agrees(*args))
        got = run(model, lambda f, x: checkpoint(f, x, use_reentrant=False, **options_of_checkpoint))
    assert len(calls) == 2, "one trial a shape"
    assert_same(expected, got, 2e-6)


@bases(SOME)
def test_several_adapters_and_their_life(quantize, options, kind, product):
    model = model_of(quantize, options)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["up"], init_lora_weights=False)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    assert_fast(model, inputs())
    model.set_adapter("second")
    expected, got, fast, handed_back = both(model, inputs())
    assert fast == 1 and list(handed_back) == ["no active adapter in this layer"]
    assert_same(expected, got, 2e-6)
    with model.disable_adapter():
        expected, got, fast, handed_back = both(model, inputs())
        assert fast == 0 and list(handed_back) == ["the adapters are disabled"]
        assert_same(expected, got)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert_fast(model, inputs())


@bases(SOME)
def test_merge_and_unmerge_are_pefts(quantize, options, kind, product):
    if quantize is models.torchao_int8:
        pytest.skip("PEFT needs a transformers model to merge into torchao's weights")
    model = model_of(quantize, options)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    model.merge_adapter()
    expected, got, fast, handed_back = both(model, inputs())
    # the merged base of HQQ is a new one, which nobody has marked
    reasons = [] if quantize is models.hqq else ["the adapter is merged into the base weight"]
    assert fast == 0 and list(handed_back) == reasons
    assert_same(expected, got)
    model.unmerge_adapter()
    peft_fast.accelerate(model)
    ready(model)
    assert_fast(model, inputs())
    for name, p in model.named_parameters():
        if "lora_" in name:
            assert torch.equal(p, before[name])


@pytest.mark.parametrize("quantize", [models.four_bits, models.torchao_int8])
def test_variants_are_pefts(quantize):
    model = ready(toy(quantize, use_dora=True))
    expected, got, fast, handed_back = both(model, inputs())
    assert fast == 0 and "keeps PEFT's forward" in next(iter(handed_back))
    assert_same(expected, got)


@bases(SOME)
def test_mixed_batches_are_pefts(quantize, options, kind, product):
    model = model_of(quantize, options).eval()
    x, names = inputs(2, 5, K), ["default", "__base__"]
    with torch.no_grad():
        with stock():
            expected = copy.deepcopy(model)(x, adapter_names=names)
        assert torch.equal(model(x, adapter_names=names), expected)
    assert any("adapter_names" in reason for reason in peft_fast.report(model).handed_back)


@bases(SOME)
def test_saved_adapters_are_byte_equal(quantize, options, kind, product, tmp_path):
    model = model_of(quantize, options)
    model(inputs()).sum().backward()
    model.save_pretrained(tmp_path / "ours")
    peft_fast.restore(model)
    model.save_pretrained(tmp_path / "stock")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("ours", "stock")]
    assert files[0] == files[1]


@bases({name: BASES[name] for name in ("nf4", "int8", "torchao int8")})
def test_copies_and_pickles_stay_fast(quantize, options, kind, product):
    model = model_of(quantize, options)
    assert_fast(copy.deepcopy(model), inputs())
    if quantize is models.four_bits:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        assert_fast(ready(torch.load(file, weights_only=False)), inputs())


@bases()
def test_nothing_dense_is_saved(quantize, options, kind, product):
    """Between forward and backward: x, H and seeds, whatever the library keeps."""
    model = model_of(quantize, options, lora_dropout=0.1)
    layer, x = layers(model)[0], inputs(1, 16, K)
    layer(x)  # the first call of a kind tries the library's own product
    small = [layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.bias]
    known = {t.untyped_storage().data_ptr() for t in small}
    saved = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    assert sum(saved.values()) == x.nbytes + 16 * 4 * 4 + 8  # x, H, one seed


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
        expected = model(inputs())
    up = layers(model)[0]
    if not getattr(up.base_layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this processor has no kernel for it")
    with torch.no_grad():
        torch.testing.assert_close(model(inputs()), expected, rtol=0.02, atol=0.02)
    assert quantized.plan_of(up).base.W is None


def test_few_tokens_are_pefts():
    model = model_of(models.four_bits, {})
    with settings.override(min_tokens=11):
        expected, got, fast, handed_back = both(model, inputs())
        assert fast == 0 and next(iter(handed_back)).startswith("few tokens")
        assert_same(expected, got)


def test_restore_disable_and_enable():
    model = model_of(models.four_bits, {})
    kinds = quantized.kinds()
    assert {k.__name__ for k in kinds} == {"Linear4bit", "Linear8bitLt", "HqqLoraLinear", "TorchaoLoraLinear"}
    peft_fast.restore(model)
    assert all(kind.forward is not quantized.forward for kind in kinds)
    assert "forward" not in next(k for k in kinds if k.__name__ == "TorchaoLoraLinear").__dict__
    peft_fast.enable()
    assert_fast(model, inputs())
    with peft_fast.disabled():
        expected, got, fast, handed_back = both(model, inputs())
        assert fast == 0
    peft_fast.disable()
    assert "no fast path" in next(iter(peft_fast.report(model).slow.values())) or peft_fast.report(model).slow


def test_hooks_on_the_base_are_called():
    model = model_of(models.four_bits, {})
    calls = []
    up = layers(model)[0]
    up.base_layer.register_forward_hook(lambda *a: calls.append(1))
    assert_fast(model, inputs())
    assert len(calls) == 2
    up.lora_A["default"].register_forward_hook(lambda *a: None)
    assert "hooks" in quantized.plan_of(up)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    model = model_of(models.four_bits, {})
    with stock():
        expected = model(inputs())
    torch._dynamo.reset()
    got = torch.compile(model, backend=backend)(inputs())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


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
