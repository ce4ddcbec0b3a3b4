"""The life of a model over quantized bases: adapters, states, copies and hooks, and what stays PEFT's."""

import copy
import io

import pytest
import torch
from peft import LoraConfig

import peft_fast
from peft_fast.patch import ledger, quantized
from tests.patch.toys import assert_same, both, stock
from tests.quantized import models
from tests.quantized.models import BASES, SOME, K, assert_fast, bases, inputs, layers, model_of, ready, toy


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
    ledger.forget(model.modules())
    got = torch.compile(model, backend=backend)(inputs())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    report = peft_fast.report(model)
    assert not report.fast_calls and not report.handed_back and "a quantized base under torch.compile" in report.traced
    assert "2 over a quantized base (PEFT's own under torch.compile): bitsandbytes nf4" in str(report)
