"""Mixed batches in the common case, without gradients on the CPU: one operator, and never a state that has changed."""

import pytest
import torch
from peft import LoraConfig
from torch import nn

import peft_fast
from benchmarks.criterion import check
from peft_fast import native, settings
from peft_fast.ops.lora_decode import MOST, TURNED, most
from peft_fast.patch import decode, mixed, plan
from tests.patch.toys import K, conv1d, inputs, layers, stock, toy

pytestmark = pytest.mark.skipif(not native.load(), reason=f"the compiled operators: {native.reason()}")
NAMES = ["other", "default", "third", "default"]


def crowd(layer=nn.Linear, dtype=torch.float32, autocast_adapter_dtype=True, **config):
    """Three adapters of different rank and scaling."""
    model = toy(layer, dtype, autocast_adapter_dtype=autocast_adapter_dtype, **config)
    config = {"fan_in_fan_out": layer is conv1d, "init_lora_weights": False, "target_modules": ["up", "down"], **config}
    for name, more in {"other": {"r": 7, "lora_alpha": 3}, "third": {"r": 1, "use_rslora": True}}.items():
        model.add_adapter(name, LoraConfig(**{**config, **more}), autocast_adapter_dtype=autocast_adapter_dtype)
    return model.eval()


@pytest.fixture
def watched(monkeypatch):
    """What became of each layer's call, in order: "one pass", "behind the base", or "the long way"."""
    found = []
    common, kernel = mixed._common, mixed.kernel

    def passes():
        found.append("one pass")
        return kernel()

    def run(*args):
        before = len(found)
        y = common(*args)
        if len(found) == before:
            found.append("the long way" if y is None else "behind the base")
        return y

    monkeypatch.setattr(mixed, "kernel", passes)
    monkeypatch.setattr(mixed, "_common", run)
    return found


def compare(model, x, names, rtol=1e-5):
    """Ours, which is PEFT's to rtol of the largest value."""
    with torch.no_grad():
        with stock():
            expected = model(x, adapter_names=names)
        y = model(x, adapter_names=names)
    assert (y.dtype, y.shape) == (expected.dtype, expected.shape) and y.is_contiguous()
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(y, expected, rtol=rtol, atol=rtol * largest)
    return y


@pytest.mark.parametrize("narrow", [True, False], ids=["float32 adapters", "adapters as the base"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [nn.Linear, conv1d])
def test_values_are_pefts(layer, dtype, narrow, watched):
    model = crowd(layer, dtype, autocast_adapter_dtype=narrow, lora_bias=layer is nn.Linear)
    for up in layers(model):
        for lora_B in up.lora_B.values():
            if lora_B.bias is not None:
                nn.init.normal_(lora_B.bias)
    rtol = 1e-5 if dtype == torch.float32 else 0.02
    few = min(MOST, most(dtype, layer is conv1d))
    for shape, names, way in (
        ((4, K), NAMES, "one pass"),
        ((4, 1, K), NAMES, "one pass"),
        ((4, 2, 1, K), NAMES, "one pass"),
        ((8, few // 8, K), NAMES * 2, "one pass"),
        ((4, few // 4 + 1, K), NAMES, "behind the base"),
        ((5, 1, K), [*NAMES, "__base__"], "one pass"),
        ((8, few // 8, K), ["__base__"] * 7 + ["third"], "one pass"),
        ((5, few // 4, K), [*NAMES, "__base__"], "behind the base"),
        ((4, 0, K), NAMES, "the long way"),
        ((3, 2, K), ["__base__"] * 3, "the long way"),
    ):
        watched.clear()
        compare(model, inputs(*shape, dtype=dtype).detach(), names, rtol)
        assert watched == [way] * 2, shape
    assert few == (TURNED if layer is conv1d and dtype is torch.bfloat16 else 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_values_keep_the_contract(dtype, tokens):
    """No further from float64 than PEFT's own sequence of calls."""
    model = crowd(dtype=dtype, r=8)
    up, names = layers(model)[0], [*NAMES, "__base__"] * 3 + ["__base__"]
    x = inputs(16, tokens, K, dtype=dtype).detach()
    with torch.no_grad():
        y, expected = mixed._common(up, x, names), plan.stock_linear(up, x, adapter_names=names)
        truth = nn.functional.linear(x.double(), up.base_layer.weight.double(), up.base_layer.bias.double())
        for row, name in enumerate(names):
            if name == "__base__":
                continue
            A, B = up.lora_A[name].weight.double(), up.lora_B[name].weight.double()
            truth[row] += x[row].double() @ A.T @ B.T * up.scaling[name]
    assert check(y, expected, truth, dtype=dtype)


def test_rows_without_an_adapter():
    """Of many tokens they have the bits of the base, of few no part of any adapter and no bits of another row's."""
    model, names = crowd(dtype=torch.bfloat16), ["default", "__base__", "other", "other", "__base__"]
    up = layers(model)[0]
    for tokens in (1, 50):
        x = inputs(5, tokens, K, dtype=torch.bfloat16).detach()
        with torch.no_grad():
            y, base = up(x, adapter_names=names), up.base_layer(x)
            assert not (y[[0, 2, 3]] == base[[0, 2, 3]]).all(-1).any()
            if tokens == 50:
                assert torch.equal(y[[1, 4]], base[[1, 4]])
                continue
            alone = decode.kernel()(x, up.base_layer.weight, up.base_layer.bias, [], [], [], [], False)
            assert torch.equal(y[[1, 4]], alone[[1, 4]])
            torch.testing.assert_close(y[[1, 4]], base[[1, 4]], rtol=0.01, atol=0.01)


def test_rows_do_not_touch_each_other():
    model, x = crowd(), inputs(4, 1, K).detach()
    up, order = layers(model)[0], [2, 0, 3, 1]
    with torch.no_grad():
        y = up(x, adapter_names=NAMES)
        assert torch.equal(up(x[order], adapter_names=[NAMES[i] for i in order]), y[order])
        x[1] = torch.nan
        spoilt = up(x, adapter_names=NAMES)
    assert spoilt[1].isnan().all() and torch.equal(spoilt[[0, 2, 3]], y[[0, 2, 3]])


def test_a_layer_without_one_of_the_adapters(watched):
    model = crowd()
    model.add_adapter("narrow", LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    compare(model.eval(), inputs(4, 1, K).detach(), ["narrow", "default", "narrow", "other"])
    assert watched == ["one pass", "one pass"]


def test_names_are_read_at_every_call():
    model, x, names = crowd(), inputs(4, 1, K).detach(), list(NAMES)
    first = compare(model, x, names)
    names[0] = "third"
    assert not torch.equal(compare(model, x, names)[0], first[0])


def test_states_are_read_at_every_call(watched):
    model, x, seen = crowd(lora_bias=True, lora_dropout=0.5), inputs(4, 1, K).detach(), set()
    up, down = layers(model)
    for change in (
        lambda: None,
        lambda: nn.init.normal_(up.lora_B["other"].bias),
        lambda: up.set_scale("default", 3.0),
        lambda: up.scaling.update(third=torch.tensor(0.3)),
        lambda: up.lora_A["other"].weight.data.mul_(2),
        lambda: setattr(down.lora_B["third"], "weight", nn.Parameter(down.lora_B["third"].weight * 3)),
        lambda: up.base_layer.weight.data.mul_(2),
    ):
        change()
        seen.add(compare(model, x, NAMES).sum().item())
    assert len(seen) == 7 and set(watched) == {"one pass"}
    watched.clear()
    hook = down.lora_A["other"].register_forward_hook(lambda *_: None)
    compare(model, x, NAMES)
    hook.remove()
    up.base_layer.register_forward_hook(lambda module, args, y: y + 1)
    compare(model, x, NAMES)
    assert watched == ["one pass", "the long way", "the long way", "one pass"]


def test_what_takes_the_long_way(watched):
    model, x = crowd(), inputs(4, 1, K)
    model(x, adapter_names=NAMES)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(x, adapter_names=NAMES)
    with torch.no_grad(), settings.override(backend="torch"):
        model(x, adapter_names=NAMES)
    with torch.no_grad(), peft_fast.disabled():
        model(x, adapter_names=NAMES)
    for lora in layers(model):
        lora.lora_A["third"].to(torch.bfloat16), lora.lora_B["third"].to(torch.bfloat16)
    with torch.no_grad():
        model(x, adapter_names=NAMES)
    assert watched == ["the long way"] * 10
    assert decode.adapters(layers(model)[0], ["default", "third"], torch.float32) is None


def test_calls_are_counted():
    model, x = crowd(), inputs(4, 1, K).detach()
    with torch.no_grad():
        model(x, adapter_names=NAMES)
        model(x, adapter_names=["__base__", *NAMES[1:]])
    found = peft_fast.report(model)
    assert (found.fast_calls, found.handed_back) == (4, {})
