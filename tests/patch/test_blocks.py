"""Blocks run as one: equal to stock for every activation, layer, dtype and dropout."""

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import activations

import peft_fast
from peft_fast import ops
from tests.patch.toys import (
    K,
    adapt,
    assert_same,
    both,
    conv1d,
    inputs,
    layers,
)

I = 48


class Gated(nn.Module):
    """Llama's MLP."""

    def __init__(self, act=nn.SiLU, layer=nn.Linear):
        super().__init__()
        self.gate, self.up, self.down, self.act = layer(K, I), layer(K, I), layer(I, K), act()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Plain(nn.Module):
    """GPT's MLP, with the dropouts that others have."""

    def __init__(self, act=nn.GELU, layer=nn.Linear, p=0.0):
        super().__init__()
        self.up, self.down, self.act = layer(K, I), layer(I, K), act()
        self.inner, self.outer, self.p = nn.Dropout(p), nn.Dropout(p), p

    def forward(self, x):
        return self.outer(self.down(self.inner(self.act(self.up(x)))))


class Halves(nn.Module):
    """Phi-3's MLP."""

    def __init__(self, act=nn.SiLU, layer=nn.Linear):
        super().__init__()
        self.up, self.down, self.act = layer(K, 2 * I), layer(I, K), act()

    def forward(self, x):
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(up * self.act(gate))


ALL = ["gate", "up", "down"]


def mlp(kind=Gated, targets=ALL, *args, **config):
    return adapt(lambda: kind(*args), [t for t in targets if t != "gate" or issubclass(kind, Gated)], **config)


def inner(model):
    return model.base_model.model


def runs(model):
    return peft_fast.report(model).block_calls


def assert_block(model, x=None, rtol=1e-5):
    """The call ran as one block, all its layers counted, and is stock's."""
    x = inputs() if x is None else x
    before = ops.fast_calls()
    expected, got, fast, handed_back = both(model, x)
    assert handed_back == {} and fast == len(layers(model)) and runs(model) == 1
    assert ops.fast_calls() - before == 1
    assert_same(expected, got, rtol)


def assert_layers(model, reason, fast=None, x=None):
    """The block did not run, the report says why, and its layers are fast by themselves."""
    assert set(peft_fast.report(model).not_blocks.values()) == {reason}
    expected, got, calls, _ = both(model, inputs() if x is None else x)
    assert runs(model) == 0 and calls == (len(layers(model)) if fast is None else fast)
    assert_same(expected, got, 1e-5)


ACTS = {
    "SiLU": nn.SiLU,
    "GELU": nn.GELU,
    "GELU tanh": lambda: nn.GELU(approximate="tanh"),
    "ReLU": nn.ReLU,
    **{
        name: (lambda name=name: activations.ACT2FN[name])
        for name in ("silu", "gelu", "gelu_python", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_new", "gelu_fast")
    },
    **{name: (lambda name=name: activations.ACT2FN[name]) for name in ("gelu_accurate", "quick_gelu", "relu", "relu2")},
}


@pytest.mark.parametrize("kind", [Gated, Plain, Halves])
@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_activations(kind, act):
    assert_block(mlp(kind, ALL, act), rtol=2e-5)


@pytest.mark.parametrize("act", ["gelu_10", "mish", "tanh", "linear", "laplace", "leaky_relu", "swish", "prelu"])
def test_other_activations_run_layer_by_layer(act):
    model = mlp(Gated, ALL, lambda: activations.ACT2FN[act])
    if act == "swish":  # another name of SiLU
        return assert_block(model)
    assert_layers(model, f"its activation is a {type(inner(model).act).__name__}, or one with hooks")


@pytest.mark.parametrize("kind", [Gated, Plain, Halves])
@pytest.mark.parametrize(
    "layer", [nn.Linear, conv1d, lambda k, n: nn.Linear(k, n, bias=False)], ids=["", "conv1d", "no bias"]
)
def test_layers(kind, layer):
    assert_block(mlp(kind, ALL, nn.SiLU, layer, fan_in_fan_out=layer is conv1d))


@pytest.mark.parametrize("targets", ["gate", "up", "down", "gate up", "gate down", "up down"])
def test_adapters_on_any_subset(targets):
    assert_block(mlp(Gated, targets.split()))


def test_a_block_without_adapters_runs_where_it_saves_memory():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.mlp = nn.Linear(K, K), Gated()

        def forward(self, x):
            return self.mlp(self.first(x))

    model = adapt(Two, ["first"])
    expected, got, fast, _ = both(model, inputs())
    assert runs(model) == 1 and fast == 1
    assert_same(expected, got, 1e-5)
    with torch.no_grad():
        assert both(model, inputs())[2] == 1 and runs(model) == 0
    inner(model).mlp.up.weight.requires_grad_()
    assert set(peft_fast.report(model).not_blocks.values()) == {"it has no adapters, and its weights are trained"}


def test_several_adapters_biases_and_an_inactive_one():
    model = mlp(lora_bias=True, bias="all")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    assert_block(model)
    model.set_adapter("other")  # gate has no active adapter: it is a frozen layer of the block
    expected, got, fast, handed_back = both(model, inputs())
    assert (fast, handed_back, runs(model)) == (2, {}, 1)
    assert_same(expected, got, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype):
    model = adapt(lambda: Gated().to(dtype), ALL)
    if dtype is torch.float64:
        model.double()
    assert_block(model, inputs(16, K, dtype=dtype), {torch.bfloat16: 4e-2, torch.float16: 6e-3}.get(dtype, 1e-12))


def test_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_block(mlp(), rtol=4e-2)


@pytest.mark.parametrize("shape", [(K,), (7, K), (2, 1, 3, K), (0, K)], ids=str)
def test_shapes(shape):
    assert_block(mlp(), inputs(*shape))


def test_dropouts_of_the_block_itself():
    model = mlp(Plain, ALL, nn.GELU, nn.Linear, 0.5)
    assert_block(model.eval())
    model.train()
    x = torch.ones(4000, K)
    with torch.no_grad():
        y = model(x)
        expected = model.eval()(x[:1])[0]
        model.train()
        # rows that outer dropped are 0, the others doubled
        assert 0.45 < (y == 0).double().mean() < 0.55
        spread = y.std(0) / 4000**0.5
        assert ((y.mean(0) - expected).abs() < 6 * spread).all()
        inner(model).outer.p = 0.0
        y = model(x)
    assert (
        0.1 < (y.std(0) / y.mean(0).abs()).median() and ((y.mean(0) - expected).abs() < 6 * y.std(0) / 4000**0.5).all()
    )
    assert runs(model) >= 3
    inner(model).inner.p = 0.0
    assert_block(model)
    inner(model).inner.p = 1.0
    assert_layers(model, "dropout with p = 1 or in place")


def test_a_dropout_mask_is_drawn_again_by_a_checkpoint():
    from torch.utils.checkpoint import checkpoint

    model, x = mlp(Plain, ALL, nn.GELU, nn.Linear, 0.5, lora_dropout=0.2), inputs()
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(run(x).square().sum(), [x, inner(model).up.lora_A["default"].weight]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
