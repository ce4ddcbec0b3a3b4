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
from tests.patch.toys import K, N, conv1d, inputs, layers, stock, toy

pytestmark = pytest.mark.skipif(not native.load(), reason=f"the compiled operators: {native.reason()}")


@pytest.fixture(autouse=True)
def as_shipped(untouched_peft):
    """The number of tokens that users have."""
    with settings.override(min_tokens=128):
        yield


def decoded(model, x, **kwargs):
    """The model's y, and how many of its layers decode() ran."""
    taken = []
    run = decode.run

    def watched(layer, x):
        y = run(layer, x)
        taken.append(y is not None)
        return y

    decode.run = watched
    try:
        y = model(x, **kwargs)
    finally:
        decode.run = run
    return y, sum(taken)


def twice(model, x):
    """(PEFT's y, ours, layers that decoded) without gradients."""
    with torch.no_grad():
        with stock():
            expected = model(x)
        return expected, *decoded(model, x)


def assert_decodes(model, x, calls=2):
    expected, y, taken = twice(model, x)
    assert taken == calls
    assert (y.dtype, y.shape) == (expected.dtype, expected.shape)
    rtol = 1e-5 if y.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        y, expected, rtol=rtol, atol=rtol * (expected.abs().max().item() if expected.numel() else 0)
    )
    return y


def assert_stocks(model, x, calls=0):
    """PEFT's own bits."""
    expected, y, taken = twice(model, x)
    assert taken == calls and torch.equal(y, expected)


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


# what changes between two calls -> does the layer still decode afterwards
def _hook(module):
    module.register_forward_hook(lambda m, args, y: y * 2)


def _replace(module, name):
    tensor = getattr(module, name)
    setattr(module, name, nn.Parameter(torch.randn_like(tensor)))


def _data(tensor):
    tensor.data = torch.randn_like(tensor)


def _in_place(tensor):
    tensor.data.mul_(1.5)


def _scaling_tensor(layer):
    layer.scaling["default"] = torch.tensor(0.3)


def _half(module):
    module.double()


def _second(model):
    model.add_adapter("second", LoraConfig(r=5, target_modules=["up", "down"], init_lora_weights=False))
    model.set_adapter("second")


def _delete(model):
    _second(model)
    model.delete_adapter("default")


def _hotswap(model):
    from peft.utils.hotswap import hotswap_adapter_from_state_dict

    state = {k: torch.randn_like(v) for k, v in model.state_dict().items() if "lora_" in k}
    hotswap_adapter_from_state_dict(model, state, "default", LoraConfig(r=4, target_modules=["up", "down"]))


def _weighted(model):
    _second(model)
    model.add_weighted_adapter(["default", "second"], [0.5, 2.0], "both", combination_type="cat")
    model.set_adapter("both")
    model.eval()


CHANGES = {
    "set_adapter": (_second, 2),
    "delete_adapter": (_delete, 2),
    "add_weighted_adapter": (_weighted, 2),
    "hotswap": (_hotswap, 2),
    "scale_layer": (lambda m: layers(m)[0].scale_layer(3.0), 2),
    "set_scale": (lambda m: layers(m)[0].set_scale("default", 0.5), 2),
    "scaling_tensor": (lambda m: _scaling_tensor(layers(m)[0]), 2),
    "merge": (lambda m: m.merge_adapter(), 0),
    "merge_one": (lambda m: layers(m)[0].merge(), 1),
    "unmerge": (lambda m: (m.merge_adapter(), m.unmerge_adapter()), 2),
    "disabled": (lambda m: m.base_model.disable_adapter_layers(), 0),
    "train": (lambda m: m.train(), 0),
    "train_a_dropout": (lambda m: layers(m)[0].lora_dropout["default"].train(), 1),
    "train_without_dropout": (
        lambda m: (m.train(), [setattr(x.lora_dropout["default"], "p", 0.0) for x in layers(m)]),
        2,
    ),
    "identity": (lambda m: layers(m)[0].lora_dropout.update({"default": nn.Identity()}), 2),
    "other_dropout": (lambda m: layers(m)[0].lora_dropout.update({"default": nn.Tanh()}), 1),
    "hook_on_base": (lambda m: _hook(layers(m)[0].base_layer), 1),
    "hook_on_A": (lambda m: _hook(layers(m)[0].lora_A["default"]), 1),
    "hook_on_B": (lambda m: _hook(layers(m)[0].lora_B["default"]), 1),
    "hook_on_dropout": (lambda m: _hook(layers(m)[0].lora_dropout["default"]), 1),
    "hook_on_layer": (lambda m: _hook(layers(m)[0]), 2),
    "pre_hook": (lambda m: layers(m)[0].base_layer.register_forward_pre_hook(lambda m, args: (args[0] * 2,)), 1),
    "forward_of_base": (lambda m: setattr(layers(m)[0].base_layer, "forward", lambda x: torch.zeros(1, N)), 1),
    "W_replaced": (lambda m: _replace(layers(m)[0].base_layer, "weight"), 2),
    "W_data": (lambda m: _data(layers(m)[0].base_layer.weight), 2),
    "W_in_place": (lambda m: _in_place(layers(m)[0].base_layer.weight), 2),
    "A_replaced": (lambda m: _replace(layers(m)[0].lora_A["default"], "weight"), 2),
    "A_data": (lambda m: _data(layers(m)[0].lora_A["default"].weight), 2),
    "B_data": (lambda m: _data(layers(m)[0].lora_B["default"].weight), 2),
    "B_in_place": (lambda m: _in_place(layers(m)[0].lora_B["default"].weight), 2),
    "bias_gone": (lambda m: setattr(layers(m)[0].base_layer, "bias", None), 2),
    "A_with_bias": (lambda m: _give_bias(layers(m)[0].lora_A["default"]), 1),
    "base_replaced": (lambda m: setattr(layers(m)[0], "base_layer", nn.Linear(K, N)), 2),
    "base_of_another_class": (lambda m: setattr(layers(m)[0], "base_layer", Doubling(K, N)), 1),
    "A_of_another_class": (lambda m: layers(m)[0].lora_A.update({"default": Doubling(K, 4, bias=False)}), 1),
    "parametrized": (lambda m: _parametrize(layers(m)[0].base_layer), 1),
}
# what PEFT itself cannot run: only who takes it is compared
BROKEN = {
    "A_of_another_rank": lambda m: setattr(layers(m)[0].lora_A["default"], "weight", nn.Parameter(torch.randn(7, K))),
}


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _give_bias(module):
    module.bias = nn.Parameter(torch.randn(module.out_features))


def _parametrize(module):
    torch.nn.utils.parametrize.register_parametrization(module, "weight", nn.Tanh())


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen_by_the_next_call(change):
    """The same call before and after: nothing may be remembered that has changed."""
    apply, calls = CHANGES[change]
    model = toy(lora_dropout=0.2).eval()
    if change in ("base_replaced", "base_of_another_class"):
        peft_fast.enable()  # a base that nobody marked
    x = inputs(3, K).detach()
    before = assert_decodes(model, x)
    apply(model)
    torch.manual_seed(3)
    with torch.no_grad():
        with stock():
            torch.manual_seed(3)
            expected = model(x)
        torch.manual_seed(3)
        y, taken = decoded(model, x)
    assert taken == calls
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    same = change in ("unmerge", "merge", "merge_one", "identity", "train_without_dropout")
    assert same == torch.allclose(y, before, rtol=1e-5, atol=1e-5)


def test_another_dtype_is_seen():
    model = toy().eval()
    assert_decodes(model, inputs(1, K).detach())
    assert_decodes(model.bfloat16(), inputs(1, K, dtype=torch.bfloat16).detach())
    assert_stocks(model.double(), inputs(1, K, dtype=torch.float64).detach())
    assert_stocks(model.half(), inputs(1, K, dtype=torch.float16).detach())
    model = toy(base_dtype=torch.bfloat16).eval()
    layers(model)[0].cast_input_dtype_enabled = False
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        model(inputs(1, K, dtype=torch.bfloat16).detach())


def test_states_of_the_process():
    model, x = toy().eval(), inputs(1, K).detach()
    with peft_fast.disabled():
        assert_stocks(model, x)
    with settings.override(disable=True):
        assert_stocks(model, x)
    with settings.override(backend="torch"):
        assert_stocks(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_stocks(model, x)
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: None)
    assert_stocks(model, x)
    handle.remove()
    peft_fast.restore(model)
    assert_stocks(model, x)
    peft_fast.accelerate(model)
    assert_decodes(model, x)


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
    assert twice(toy(use_dora=True).eval(), inputs(2, K).detach())[2] == 0


def test_it_takes_nothing_that_the_plan_refuses():
    """decode.py looks by itself, for speed: whatever it takes, plan.py takes too, with the same tensors."""
    x = inputs(2, K).detach()
    for change, apply in {name: apply for name, (apply, _) in CHANGES.items()}.items() | BROKEN.items():
        model = toy(lora_dropout=0.2).eval()
        apply(model)
        with torch.no_grad():
            for layer, given in zip(layers(model), (x, inputs(2, N).detach()), strict=True):
                own = plan.plan_of(layer)
                refused = (
                    type(own) is str
                    or plan.refuse_input(layer, given, own, few=False)
                    or any(a.p for a in own.adapters)
                )
                assert (decode.run(layer, given) is None) == bool(refused), change


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
