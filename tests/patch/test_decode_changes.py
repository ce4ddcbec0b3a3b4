"""Few tokens without gradients: whatever changes between two calls is seen by the next."""

import pytest
import torch
from peft import LoraConfig
from torch import nn

import peft_fast
from peft_fast import native, settings
from peft_fast.patch import decode, plan
from tests.patch.decoding import assert_decodes, assert_stocks, decoded
from tests.patch.toys import K, N, inputs, layers, stock, toy

pytestmark = pytest.mark.skipif(not native.load(), reason=f"the compiled operators: {native.reason()}")


_compiled = native.layer()


@pytest.fixture(autouse=True, params=["compiled call", "compiled look", "python look"])
def as_shipped(untouched_peft, request, monkeypatch):
    """The number of tokens that users have, by each of the ways to look at a layer."""
    assert _compiled is not None
    if request.param == "python look":
        monkeypatch.setattr(native, "layer", lambda: None)
    if request.param != "compiled call":
        monkeypatch.setattr(decode, "direct", lambda: None)
    with settings.override(min_tokens=128):
        yield


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


# what changes between two calls -> how many layers decode afterwards
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
    "tensor_parallel": (lambda m: setattr(layers(m)[0].base_layer, "_hf_tp_plan", "colwise"), 1),
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
    "A_of_a_rank_above_the_most": lambda m: _ranked(layers(m)[0], plan.MAX_RANK + 1),
    "A_of_another_rank": lambda m: setattr(layers(m)[0].lora_A["default"], "weight", nn.Parameter(torch.randn(7, K))),
}


def _ranked(layer, r):
    layer.lora_A["default"].weight = nn.Parameter(torch.randn(r, K))
    layer.lora_B["default"].weight = nn.Parameter(torch.randn(N, r))


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
    same = change in ("tensor_parallel", "unmerge", "merge", "merge_one", "identity", "train_without_dropout")
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


def test_only_layers_that_are_to_be_fast():
    model, other, x = toy().eval(), toy(seed=1).eval(), inputs(1, K).detach()
    peft_fast.restore(other)
    assert_decodes(model, x)
    assert_stocks(other, x)
    (layer, *_), (foreign, *_) = layers(model), layers(other)
    with torch.no_grad():
        assert decode.run(layer, x) is not None and decode.run(foreign, x) is None
        peft_fast.enable()
        assert decode.run(foreign, x) is not None
        peft_fast.disable()  # whoever kept a reference to the guard calls it still
        assert decode.run(layer, x) is None and decode.run(foreign, x) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [{}, {"lora_bias": True}, {"lora_dropout": 0.1}])
def test_the_compiled_look_takes_the_common_layer(dtype, config):
    """Who is not taken goes the long way, which nobody would see."""
    model = toy(base_dtype=dtype, **config).eval()
    _second(model)
    model.base_model.set_adapter(["default", "second"])
    model.eval()
    layer, x = layers(model)[0], torch.randn(3, 2, K, dtype=dtype)
    with torch.no_grad():
        W, bias, low, tokens, rank, m = _compiled(layer, x, decode._around())
        assert m is None and decode._found(layer, x) == (W, bias, low, tokens, rank, False)
    assert (tokens, rank, len(low[0])) == (6, 9, 2) and bias is not None
    layer.base_layer.add_module("base_layer", nn.Linear(K, N))
    with torch.no_grad():
        assert _compiled(layer, x, decode._around()) is None and decode._found(layer, x) is None


def test_modes_of_the_process(monkeypatch):
    """Each by itself: what is traced or transformed may fail later for another reason."""
    (layer, *_), x = layers(toy().eval()), inputs(1, K).detach()
    assert decode.run(layer, x) is None, "with gradients"
    with torch.inference_mode():
        assert decode.run(layer, x.clone()) is not None
    with torch.no_grad():
        found = []
        jitted = torch.jit.trace(lambda t: found.append(decode.run(layer, t)) or t + 1, x, check_trace=False)
        assert found == [None] and torch.equal(jitted(x), x + 1)
        torch.func.vmap(lambda t: found.append(decode.run(layer, x)) or t)(torch.ones(2))
        with torch.autograd.forward_ad.dual_level():
            found.append(decode.run(layer, x))
        with monkeypatch.context() as patched:
            patched.setattr(torch.compiler, "_is_exporting_flag", True)
            found.append(decode.run(layer, x))
        assert found == [None] * 4
        assert decode.run(layer, nn.Parameter(x)) is None and decode.run(nn.Linear(K, N), x) is None
        assert decode.run(layer, torch.zeros(())) is None
        layer.__class__ = type("Other", (plan.Linear,), {})
        assert decode.run(layer, x) is None
        layer.__class__ = plan.Linear
        assert decode.run(layer, x) is not None
        with monkeypatch.context() as patched:
            patched.setattr(nn.Linear, "forward", lambda self, x: x)
            assert decode.run(layer, x) is None
    assert_decodes(toy().eval(), x)


def test_it_takes_nothing_that_the_plan_refuses():
    """decode.py looks by itself, for speed: whatever it takes, plan.py takes too, with the same tensors."""
    peft_fast.enable()  # also a base that nobody marked
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
