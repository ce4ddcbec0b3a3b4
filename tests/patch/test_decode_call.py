"""Few tokens by one compiled call (csrc/call.h): what it takes, what it leaves to the operator, what it keeps."""

import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import peft_fast
from peft_fast import native, ops, settings
from peft_fast.patch import decode, ledger, plan
from tests.patch.decoding import assert_decodes
from tests.patch.toys import K, N, inputs, layers, toy

pytestmark = [
    pytest.mark.skipif(not native.load(), reason=f"the compiled operators: {native.reason()}"),
    pytest.mark.usefixtures("as_shipped"),
]
TARGETS = ["up", "down"]


def call(layer, x):
    with torch.no_grad():
        return native.decode()(layer, x, decode._around())


def by_operator(layer, x):
    """What the same layer gives by way of torch's dispatcher."""
    with torch.no_grad():
        W, bias, low, *_, transposed = decode._found(layer, x)
        return torch.ops.peft_fast.lora_decode(x, W, bias, *low, transposed)


def model_of(**config):
    model = toy(**config).eval()
    for layer in layers(model):
        for B in layer.lora_B.values():
            nn.init.normal_(B.weight)
    return model


@pytest.mark.parametrize("lead", [(), (1,), (1, 1), (2, 3), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "bf16_f32_adapters"])
@pytest.mark.parametrize("config", [{}, {"lora_bias": True}, {"r": 20}, {"lora_alpha": 3}], ids=str)
def test_the_operators_bits(lead, dtypes, config):
    model = model_of(**config)
    dtype = torch.float32 if dtypes == "f32" else torch.bfloat16
    model = model.to(dtype)
    if dtypes == "bf16_f32_adapters":
        for layer in layers(model):
            layer.lora_A.float(), layer.lora_B.float()
    layer, x = layers(model)[0], torch.randn(*lead, K).to(dtype)
    y = call(layer, x)
    assert y is not None and not y.requires_grad and (y.dtype, y.shape) == (dtype, (*lead, N))
    assert torch.equal(y, by_operator(layer, x)) and torch.equal(y, call(layer, x))


def test_several_active_adapters():
    model = model_of()
    model.add_adapter("second", LoraConfig(r=5, target_modules=TARGETS, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    model.eval()
    layer, x = layers(model)[0], torch.randn(3, K)
    assert torch.equal(call(layer, x), by_operator(layer, x))
    one = call(layer, x)
    layer._active_adapter.pop()  # in place, past every setter
    assert torch.equal(call(layer, x), by_operator(layer, x)) and not torch.equal(call(layer, x), one)


def test_another_name_where_one_was():
    """PEFT keeps the caller's own list of names: a new name may come to lie where one in it was."""
    model = model_of()
    for name in ("second0", "third00"):
        model.add_adapter(name, LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    model.eval()
    layer, x = layers(model)[0], torch.randn(1, K)
    reused = 0
    for _ in range(100):
        names = ["default", str(b"second0", "ascii")]
        layer.set_adapter(names)
        call(layer, x), call(layer, x)
        before = id(names[1])
        names.pop()
        names.append(str(b"third00", "ascii"))
        reused += id(names[1]) == before
        assert layer.active_adapters == ["default", "third00"]
        assert torch.equal(call(layer, x), by_operator(layer, x))
    if sys.version_info < (3, 13):  # later ones keep no versions of dicts: nothing is proven, no address kept
        assert not reused  # who keeps an address keeps what lies there


def test_names_of_a_class_of_their_own():
    class Name(str):
        pass

    layer, x = layers(model_of())[0], torch.randn(1, K)
    assert call(layer, x) is not None
    layer._active_adapter = [Name("default")]
    assert call(layer, x) is None


def test_a_call_is_counted():
    model = model_of()
    layer, x = layers(model)[0], torch.randn(1, K)
    ledger.forget([layer])
    before, process = ops.fast_calls(), ledger.process().fast
    assert call(layer, x) is not None and call(layer, x) is not None
    assert ops.fast_calls() == before + 2 and ledger.process().fast == process + 2
    assert ledger.total([layer]).fast == 2 and peft_fast.report(model).fast_calls == 2
    saved = ledger.state({layer: "layer"})
    ledger.forget([layer])
    assert ledger.total([layer]).fast == 0 and ops.fast_calls() == before + 2
    assert call(layer, x) is not None
    ledger.restore({"layer": layer}, saved)
    assert ledger.total([layer]).fast == 2 and ledger.state({layer: "layer"}) == saved


def _negative(tensor):
    return torch._neg_view(tensor.neg())


def _fresh(layer):
    nn.init.zeros_(layer.lora_B["default"].weight)


def _replace(module, tensor):
    module.weight = nn.Parameter(tensor)


# what a call leaves to the operator or to PEFT: (what is done to the layer, x)
LEFT = {
    "no tokens": (lambda layer: None, lambda: torch.randn(0, K)),
    "more tokens": (lambda layer: None, lambda: torch.randn(9, K)),
    "x beside itself": (lambda layer: None, lambda: torch.randn(3, 2 * K)[:, :K]),
    "x of another length": (lambda layer: None, lambda: torch.randn(3, K + 1)),
    "x negative": (lambda layer: None, lambda: _negative(torch.randn(3, K))),
    "x of another dtype": (lambda layer: None, lambda: torch.randn(3, K).double()),
    "x wants a class": (lambda layer: None, lambda: nn.Parameter(torch.randn(3, K))),
    "W turned": (lambda layer: _replace(layer.base_layer, layer.base_layer.weight.t().contiguous().t()), None),
    "W negative": (lambda layer: _replace(layer.base_layer, _negative(layer.base_layer.weight.detach())), None),
    "A turned": (
        lambda layer: _replace(layer.lora_A["default"], layer.lora_A["default"].weight.t().contiguous().t()),
        None,
    ),
    "B of fewer rows": (
        lambda layer: _replace(layer.lora_B["default"], layer.lora_B["default"].weight[1:].clone()),
        None,
    ),
    "a bias that does not fit": (lambda layer: setattr(layer.base_layer.bias, "data", torch.randn(N + 1)), None),
    "B zero": (_fresh, None),
    "a rank above the most": (
        lambda layer: (
            _replace(layer.lora_A["default"], torch.randn(plan.MAX_RANK + 1, K)),
            _replace(layer.lora_B["default"], torch.randn(N, plan.MAX_RANK + 1)),
        ),
        None,
    ),
}


@pytest.mark.parametrize("left", LEFT)
def test_what_it_leaves(left):
    change, make = LEFT[left]
    layer = layers(model_of())[0]
    x = torch.randn(3, K)
    assert call(layer, x) is not None
    with torch.no_grad():
        change(layer)
    assert call(layer, make() if make else x) is None


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Overriding(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


WATCHED = {
    "dispatch mode": Watching,
    "function mode": Overriding,
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "disabled": lambda: settings.override(disable=True),
    "another backend": lambda: settings.override(backend="torch"),
    "fewer tokens": lambda: settings.override(min_tokens=3),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "peft_fast.disabled": peft_fast.disabled,
}


@pytest.mark.parametrize("watched", WATCHED)
def test_who_watches_sees_an_operator(watched):
    layer, x = layers(model_of())[0], torch.randn(3, K)
    assert call(layer, x) is not None
    with WATCHED[watched]():
        assert call(layer, x) is None
    assert call(layer, x) is not None


def test_settings_of_a_backend():
    layer, x = layers(model_of())[0], torch.randn(3, K)
    with settings.override(backend="cpu"):
        assert call(layer, x) is not None


# past every setter of PEFT's and torch's: what is changed in place
IN_PLACE = {
    "__dict__": lambda layer: setattr(layer, "__dict__", {**layer.__dict__, "_disable_adapters": True}),
    "a value of __dict__": lambda layer: layer.__dict__.update(_disable_adapters=True),
    "merged": lambda layer: layer.merged_adapters.append("default"),
    "a variant": lambda layer: layer.lora_variant.update(default=object()),
    "no scaling": lambda layer: layer.scaling.clear(),
    "an integer for scaling": lambda layer: layer.scaling.update(default=2),
    "no A": lambda layer: layer.lora_A._modules.clear(),
    "a hook": lambda layer: layer.lora_A["default"]._forward_hooks.update({0: lambda *args: None}),
    "a backward hook": lambda layer: layer.base_layer._backward_hooks.update({0: lambda *args: None}),
    "W gone": lambda layer: layer.base_layer._parameters.update(weight=None),
    "the base's class": lambda layer: setattr(layer.base_layer, "__class__", type("Other", (nn.Linear,), {})),
    "A's class": lambda layer: setattr(layer.lora_A["default"], "__class__", type("Other", (nn.Linear,), {})),
    "the base's __dict__": lambda layer: setattr(
        layer.base_layer, "__dict__", {**layer.base_layer.__dict__, "forward": None}
    ),
    "a dropout that drops": lambda layer: layer.lora_dropout._modules.update(default=nn.Dropout(0.5)),
    "the base's mark": lambda layer: layer.base_layer.__dict__.pop("_peft_fast"),
    "a module inside": lambda layer: layer.base_layer._modules.update(base_layer=nn.Linear(1, 1)),
    "settings": lambda layer: object.__setattr__(settings.get(), "disable", True),
    "the adapters' dict": lambda layer: layer.lora_B.__dict__.update(_modules={}),
}


@pytest.mark.parametrize("change", IN_PLACE)
def test_nothing_stays_proven_that_changed(change):
    layer, x = layers(model_of())[0], torch.randn(3, K)
    assert call(layer, x) is not None and call(layer, x) is not None
    IN_PLACE[change](layer)
    assert call(layer, x) is None


def test_hooks_of_all_modules_that_were_replaced(monkeypatch):
    layer, x = layers(model_of())[0], torch.randn(3, K)
    assert call(layer, x) is not None
    monkeypatch.setattr(nn.modules.module, "_global_forward_hooks", {0: lambda *args: None})
    assert call(layer, x) is None


def test_tensors_are_asked_every_time():
    """torch swaps what is behind a tensor without telling the module that has it."""
    layer, x = layers(model_of())[0], torch.randn(3, K)
    call(layer, x)
    A = layer.lora_A["default"].weight
    torch.utils.swap_tensors(A, nn.Parameter(torch.randn_like(A)))
    assert torch.equal(call(layer, x), by_operator(layer, x))
    layer.base_layer.weight.data = torch.randn(N, K)
    assert torch.equal(call(layer, x), by_operator(layer, x))
    layer.lora_B["default"].weight.data = torch.randn(N, 4).double()
    assert call(layer, x) is None


def test_layers_where_others_were():
    """Models come and go, and new layers lie where old ones did."""
    x = torch.randn(2, K)
    for seed in range(60):
        torch.manual_seed(seed)
        layer = layers(model_of())[0]
        assert torch.equal(call(layer, x), by_operator(layer, x))
        assert torch.equal(call(layer, x), by_operator(layer, x))
        del layer


def test_it_keeps_nothing_alive():
    model = model_of()
    x = torch.randn(2, K)
    assert all(call(layer, x) is not None for layer in layers(model)[:1])
    layer = layers(model)[0]
    gone = [weakref.ref(of) for of in (layer, layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_A)]
    del layer.lora_A["default"]
    gc.collect()
    assert gone[2]() is None
    key = id(layer)
    assert native._module().calls(key) == 1
    del layer, model
    gc.collect()
    assert [of() for of in gone] == [None] * 4 and native._module().calls(key) == 0


def test_threads_of_their_own():
    models, found = [model_of() for _ in range(4)], {}
    x = inputs(2, K).detach()
    expected = [assert_decodes(model, x) for model in models]

    def run(i):
        with torch.no_grad():
            found[i] = [models[i](x) for _ in range(50)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert all(torch.equal(y, expected[i]) for i in range(4) for y in found[i])


def test_threads_of_one_layer():
    layer, x = layers(model_of())[0], torch.randn(1, K)
    one = call(layer, x)
    layer.scaling["default"] = 3.0
    three, found = call(layer, x), []

    def run():
        found.extend(call(layer, x) for _ in range(300))

    threads = [threading.Thread(target=run) for _ in range(3)]
    [thread.start() for thread in threads]
    for i in range(300):
        layer.scaling["default"] = 1.0 + 2.0 * (i % 2)
    [thread.join() for thread in threads]
    assert not torch.equal(one, three) and len(found) == 900
    assert all(torch.equal(y, one) or torch.equal(y, three) for y in found)


def test_a_build_of_other_sources_is_left_alone(monkeypatch):
    native.layer.cache_clear(), native.decode.cache_clear()
    monkeypatch.setattr(native, "LIST", native.LIST + 1)
    try:
        assert native.layer() is None and native.decode() is None
    finally:
        native.layer.cache_clear(), native.decode.cache_clear()


def test_a_process_ends_without_a_word(tmp_path):
    code = (
        "import torch, peft_fast\n"
        "from tests.patch.toys import K, inputs, toy\n"
        "peft_fast.enable()\n"
        "model = toy().eval()\n"
        "with torch.no_grad(): model(inputs(1, K).detach())\n"
        "assert peft_fast.report(model).fast_calls == 2\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
