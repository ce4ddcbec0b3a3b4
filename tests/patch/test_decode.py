"""Few tokens without gradients: one operator, PEFT's values, and never a state that has changed since."""

import copy
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import peft_fast
from benchmarks.criterion import check
from peft_fast import native, ops, settings
from peft_fast.ops.lora_decode import MOST, TURNED, WIDE, most
from peft_fast.patch import decode, guard, ledger, plan
from tests.patch.decoding import assert_decodes, assert_stocks, decoded, twice
from tests.patch.toys import K, conv1d, inputs, layers, stock, toy

pytestmark = pytest.mark.skipif(not native.load(), reason=f"the compiled operators: {native.reason()}")


@pytest.fixture(autouse=True)
def as_shipped(untouched_peft):
    """The number of tokens that users have."""
    with settings.override(min_tokens=128):
        yield


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [nn.Linear, conv1d])
@pytest.mark.parametrize("autocast_adapters", [True, False])
def test_values_are_pefts(base_dtype, layer, autocast_adapters):
    model = toy(layer, base_dtype, lora_dropout=0.1, autocast_adapter_dtype=autocast_adapters).eval()
    for shape in ((K,), (1, K), (1, 1, K), (3, K), (2, 2, 2, K), (most(base_dtype, layer is conv1d), K), (0, K)):
        assert_decodes(model, inputs(*shape, dtype=base_dtype).detach())
    x = inputs(4, 2 * K, dtype=base_dtype).detach()[:, K:]
    assert_decodes(model, x) if layer is nn.Linear else assert_decodes(model, x.contiguous())


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_values_keep_the_contract(base_dtype):
    """No further from float64 than PEFT's own sequence of calls."""
    model = toy(base_dtype=base_dtype, r=8).eval()
    layer = layers(model)[0]
    x = inputs(7, K, dtype=base_dtype).detach().repeat(4, 1) * torch.rand(28, 1).to(base_dtype)
    with torch.no_grad():
        y = decode.run(layer, x)
        expected = plan.stock_linear(layer, x)
        A, B = (m["default"].weight.double() for m in (layer.lora_A, layer.lora_B))
        base = nn.functional.linear(x.double(), layer.base_layer.weight.double(), layer.base_layer.bias.double())
        truth = base + x.double() @ A.T @ B.T * layer.scaling["default"]
    assert check(y, expected, truth, dtype=base_dtype)


def test_decoding_and_prefill_agree():
    """One token at a time, and all of them by the path of many tokens."""
    model = toy(r=8).eval()
    x = inputs(40, K).detach()
    with torch.no_grad():
        with settings.override(min_tokens=0):
            whole, taken = decoded(model, x)
        assert taken == 0
        parts = [decoded(model, row) for row in x.split(1)]
    assert all(taken == 2 for _, taken in parts)
    torch.testing.assert_close(torch.cat([y for y, _ in parts]), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("more", [MOST, 50])
def test_few_tokens_only_and_no_gradients(monkeypatch, more):
    monkeypatch.setitem(sys.modules["peft_fast.ops.lora_decode"].MORE, native.isa(), {torch.float32: more})
    model = toy().eval()
    assert_stocks(model, inputs(more + 1, K).detach())
    assert_decodes(model, inputs(more, K).detach())
    with settings.override(min_tokens=4):
        assert_decodes(model, inputs(3, K).detach())
        with torch.no_grad():
            assert decoded(model, inputs(4, K).detach())[1] == 0
    y, taken = decoded(model, inputs(1, K))
    assert taken == 0 and y.requires_grad
    with torch.inference_mode():
        y, taken = decoded(model, inputs(1, K).detach())
        assert taken == 2 and y.is_inference()


@pytest.mark.parametrize(
    ("layer", "dtype", "rank", "limit"),
    [
        (conv1d, torch.bfloat16, 8, TURNED),
        (nn.Linear, torch.bfloat16, 8, MOST),
        (nn.Linear, torch.bfloat16, WIDE[0], WIDE[1]),
        (conv1d, torch.float32, 8, MOST),
        (nn.Linear, torch.float32, WIDE[0], MOST),
    ],
)
def test_fewer_in_bfloat16_of_a_turned_weight_or_of_wide_adapters(monkeypatch, layer, dtype, rank, limit):
    monkeypatch.setattr(sys.modules["peft_fast.ops.lora_decode"], "MORE", {})
    model = toy(layer, dtype, r=rank, fan_in_fan_out=layer is conv1d).eval()
    assert_decodes(model, inputs(limit, K, dtype=dtype).detach())
    assert_stocks(model, inputs(limit + 1, K, dtype=dtype).detach())


def test_where_the_host_has_time_decoding_comes_after_the_plan(monkeypatch):
    """As on a GPU: siblings, which a group would join, decode one by one."""
    monkeypatch.setattr(decode, "LATE", ("cpu",))
    monkeypatch.setattr(decode, "run", lambda layer, x: None)
    model, calls = toy(lora_dropout=0.2).eval(), []
    monkeypatch.setattr(guard, "lora_decode", lambda *a, **o: calls.append(1) or ops.lora_decode(*a, **o))
    with settings.override(min_tokens=0):
        x = inputs(3, K).detach()
        with torch.no_grad():
            with stock():
                expected = model(x)
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
            assert len(calls) == 2
            model(inputs(MOST + 1, K).detach())
            with settings.override(exact=True):
                model(x)
            model.train()(x)
        model.eval()(inputs(1, K))
    assert len(calls) == 2


def test_the_ledger_counts_them():
    model = toy().eval()
    ledger.forget(model.modules())
    with torch.no_grad():
        model(inputs(1, K).detach())
    report = peft_fast.report(model)
    assert report.fast_calls == 2 and report.handed_back == {}


def test_the_result_may_be_written_to():
    model = toy().eval()
    x = inputs(2, K).detach()
    with torch.no_grad():
        y = layers(model)[0](x)
        again = y.clone()
        y += 1
        assert torch.equal(layers(model)[0](x), again)


def test_options_of_peft():
    assert_decodes(toy(lora_bias=True).eval(), inputs(2, K).detach())
    assert_decodes(
        toy(use_rslora=True, rank_pattern={"up": 3}, alpha_pattern={"down": 5}).eval(), inputs(2, K).detach()
    )
    assert_decodes(toy(bias="all").eval(), inputs(2, K).detach())
    model = toy().eval()
    model.add_adapter("second", LoraConfig(r=7, target_modules=["up"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    assert_decodes(model, inputs(2, K).detach())
    model.base_model.set_adapter("second")
    assert_decodes(model, inputs(2, K).detach(), calls=1)


def test_inputs_that_are_pefts():
    model = toy().eval()
    layer = layers(model)[0]
    with torch.no_grad():
        for x in (torch.randn(1, K + 1), torch.randn(1, K).to_sparse(), torch.randn(1, K, dtype=torch.bfloat16)):
            assert decode.run(layer, x) is None
        assert decode.run(layer, torch.randn(1, K, device="meta")) is None
        assert decode.run(layer, nn.Parameter(torch.randn(1, K))) is None
        assert decode.run(layer, torch.nested.nested_tensor([torch.randn(1, K), torch.randn(2, K)])) is None
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(torch.randn(1, K + 1))
    conv = toy(conv1d).eval()
    with torch.no_grad():
        assert decode.run(layers(conv)[0], torch.randn(2, K, 2)[..., 0]) is None
    assert twice(toy(conv1d, use_dora=True).eval(), inputs(2, K).detach())[2] == 0


def test_copies_and_pickles(tmp_path):
    model, x = toy().eval(), inputs(1, K).detach()
    y = assert_decodes(model, x)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for twin in (copy.deepcopy(model), loaded):
        assert torch.equal(assert_decodes(twin, x), y)


def test_compiled_code_is_right():
    model, x = toy().eval(), inputs(1, K).detach()
    with torch.no_grad():
        expected = model(x)
        y = torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(y, expected)


def tiny_llama(dtype, seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.1)
    return get_peft_model(model, lora).eval()


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_gives_stocks_tokens(beams):
    model = tiny_llama(torch.float32)
    ids = torch.randint(1, 97, (2, 5))
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "min_new_tokens": 12}
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    peft_fast.accelerate(model)
    ledger.forget(model.modules())
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(found, expected)
    report = peft_fast.report(model)
    assert report.fast_calls == 14 * 12 and report.handed_back == {} and report.block_calls == 0
