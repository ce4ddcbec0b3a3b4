"""Subclasses of nn.Linear: those that compute what it computes are fast, all others PEFT's."""

import functools

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear

import peft_fast
from peft_fast.patch import alike
from tests.patch.toys import assert_fast, inputs, stock, toy


class Bare(nn.Linear):
    """Another constructor, as ESMFold's."""

    def __init__(self, k, n):
        super().__init__(k, n)
        self.init = "final"


class Super(nn.Linear):
    def forward(self, hidden):
        """Its docstring."""
        return super().forward(hidden)


class Functional(nn.Linear):
    def forward(me, inputs):
        return torch.nn.functional.linear(inputs, me.weight, me.bias)


class Short(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("kind", [FalconLinear, Bare, Super, Functional, Short])
def test_what_computes_as_nn_linear_is_fast(kind):
    model = toy(kind)
    assert peft_fast.report(model).slow == {}
    assert_fast(model, inputs())
    assert_fast(toy(kind, base_dtype=torch.bfloat16), inputs(dtype=torch.bfloat16), rtol=3e-2)


def test_nn_linear_itself():
    """It is no subclass of itself, and accelerate() notes it like any other."""
    assert_fast(toy(), inputs())
    alike.note(nn.Linear)
    assert alike.linear(nn.Linear)


def test_falcon_without_bias():
    assert_fast(toy(lambda k, n: FalconLinear(k, n, bias=False)), inputs())


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class NoBias(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight)


class Other(nn.Linear):
    def forward(self, x, scale=1):
        return F.linear(x, self.weight, self.bias)


class Twice(nn.Linear):
    def forward(self, x):
        y = x @ self.weight.T
        if self.bias is None:
            return y
        return x + self.bias


class Further(Super):
    def forward(self, x):
        return super().forward(x)


class Property(nn.Linear):
    @property
    def scale(self):
        return 2


class Called(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) * 2


class Decorated(nn.Linear):
    @torch.no_grad()
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def _made(forward):
    return type("Made", (nn.Linear,), {"forward": forward})


RUN = ["__call__", "_call_impl", "forward", "__getattribute__", "__getattr__", "weight", "bias"]


@pytest.mark.parametrize("name", RUN)
def test_who_inherits_what_calling_runs(name, monkeypatch):
    assert alike.inherits(type("Kind", (Property,), {"more": 1})) and not alike.inherits(nn.Bilinear)
    assert not alike.inherits(type("Kind", (Bare,), {name: len}))
    monkeypatch.setattr(nn.Linear, "forward", Scaled.forward)
    assert not alike.inherits(Bare)


def _elsewhere():
    F = type("F", (), {"linear": staticmethod(lambda x, w, b: torch.nn.functional.linear(x, w, b) * 2)})

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)

    return forward


def _wrapped():
    @functools.wraps(Short.forward)
    def forward(self, x):
        return Short.forward(self, x) * 2

    return forward


OTHERS = [Scaled, NoBias, Other, Twice, Further, Property, Called, Decorated]
OTHERS += [_made(_elsewhere()), _made(_wrapped()), _made(Scaled.forward), _made(Super.forward)]


@pytest.mark.parametrize("kind", [*OTHERS, _made(lambda self, x: x), _made(len)])
def test_what_may_not_is_pefts(kind):
    assert not alike.linear(kind)


@pytest.mark.parametrize("kind, replaced", [(Short, Short), (Bare, nn.Linear), (Super, nn.Linear), (nn.Linear,) * 2])
def test_a_forward_replaced_later_is_seen(monkeypatch, kind, replaced):
    model, x = toy(kind), inputs()
    assert_fast(model, x)
    torchs = F.linear
    monkeypatch.setattr(replaced, "forward", lambda self, x: 2 * torchs(x, self.weight, self.bias))
    assert not alike.linear(kind)
    monkeypatch.undo()
    assert alike.linear(kind)
    assert_fast(model, x)


def test_a_name_that_only_looks_like_torchs(tmp_path, monkeypatch):
    """F of the module that the class lies in decides, not its letters."""
    (tmp_path / "their_layers.py").write_text(
        "import torch\nfrom torch import nn\nclass F:\n    linear = staticmethod(lambda *args: None)\n"
        "class Layer(nn.Linear):\n    def forward(self, x):\n        return F.linear(x, self.weight, self.bias)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import their_layers

    assert not alike.linear(their_layers.Layer)
    monkeypatch.setattr(their_layers, "F", F)
    del alike._known[their_layers.Layer]
    assert alike.linear(their_layers.Layer)


def test_compiled_in_one_graph():
    model = toy(FalconLinear)
    x = inputs()
    y = model(x)
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(x), y, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_a_parametrized_layer_is_none():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert not alike.linear(type(layer))


def test_merging_and_unloading_gives_the_class_back():
    model = get_peft_model(nn.Sequential(FalconLinear(32, 48)), LoraConfig(target_modules=["0"]))
    peft_fast.accelerate(model)
    x = inputs().detach()
    with stock():
        expected = model(x)
    base = model.merge_and_unload()
    assert type(base[0]) is FalconLinear and torch.allclose(base(x), expected, rtol=1e-5, atol=1e-6)
