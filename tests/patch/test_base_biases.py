"""bias="all": the gradient of every base's bias, and that a lost or wrong one is noticed, which PEFT's tests do not do.

A fault is planted in the backward of each Function that hands such a gradient back, where it stands in what it returns.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

import peft_fast
from peft_fast.ops import dora_linear, lora_experts, lora_group, lora_linear, lora_mixed, lora_mlp
from peft_fast.ops.function import Function
from tests.architectures import training
from tests.architectures.zoo import ARCHITECTURES
from tests.patch import test_conv as convolution
from tests.patch import test_dora as dora
from tests.patch import test_experts as experts
from tests.patch import test_groups as siblings
from tests.patch import test_mixed as mixed
from tests.patch.toys import both, conv1d, inputs, layers, toy

pytestmark = pytest.mark.filterwarnings("ignore")
ALL = {"bias": "all"}


def second(ctx, out):
    """Where it is after x and W: the Functions of one layer."""
    return [2]


def flat(ctx, out):
    """Where they are among flat tensors: of siblings (ops/siblings.py), and of the layer that ends a block."""
    n = len((ctx.spec if hasattr(ctx, "spec") else ctx.specs.down).counts)
    return range(4 + n, 4 + 2 * n)


def of_base(ctx, out):
    """Where the base ran by itself, and its bias has what its result has."""
    return [1]


class Place(NamedTuple):
    """Whose backward, where in what it returns, and a model with a call that comes through it."""

    of: Callable
    function: str
    at: Callable
    make: Callable[[], tuple]  # -> model, arguments, keyword arguments
    rtol: float = 1e-5

    def kind(self):
        return self.of.__globals__[self.function]


def attention():
    """Its three layers run as a group once a step was seen."""
    model = siblings.attention(**ALL)
    model(inputs()).sum().backward()
    training.idle_step(model)
    return model, (inputs(),), {}


def block():
    model = ARCHITECTURES["ViT"].adapted(**ALL)
    batch = training.batches(ARCHITECTURES["ViT"], 1)[0]
    peft_fast.accelerate(model)
    training.loss_of(model, batch).backward()
    training.idle_step(model)
    return model, (), batch


def stack_of_experts():
    """PEFT's "all" means parameters that are called bias; these can be trained by hand."""
    model = experts.layer_of("gpt_oss")
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad or name.endswith("proj_bias"))
    return model, (experts.tokens(),), {}


def mixed_batch():
    """PEFT allows no second adapter beside trained biases; these too are trained by hand."""
    model = mixed.crowd()
    for layer in layers(model):
        layer.base_layer.bias.requires_grad_()
    return model, (inputs(5, 3, 32),), {"adapter_names": mixed.NAMES}


F32 = torch.float32
PLACES = {
    "linear": Place(lora_linear, "LoraLinear", second, lambda: (toy(**ALL), (inputs(),), {})),
    "linear, lora_bias": Place(
        lora_linear, "LoraLinear", second, lambda: (toy(lora_bias=True, **ALL), (inputs(),), {})
    ),
    "Conv1D": Place(lora_linear, "LoraLinear", second, lambda: (toy(conv1d, **ALL), (inputs(),), {})),
    "convolution": Place(
        lora_linear,
        "LoraLinear",
        second,
        lambda: (convolution.model_of(dtype=F32, last=True, lora=ALL), (convolution.image(dtype=F32, last=True),), {}),
    ),
    "DoRA": Place(dora_linear, "DoraLinear", second, lambda: (dora.made(**ALL), (inputs(),), {})),
    "DoRA Conv1D": Place(dora_linear, "DoraLinear", second, lambda: (dora.made(conv1d, **ALL), (inputs(),), {})),
    "DoRA in evaluation": Place(
        dora_linear, "DoraLinear", second, lambda: (dora.made(lora_dropout=0.5, **ALL).eval(), (inputs(),), {})
    ),
    "siblings": Place(lora_group, "LoraGroup", flat, attention),
    "block": Place(lora_mlp, "LoraMlp", flat, block, 1e-3),
    "experts": Place(lora_experts, "LoraExperts", second, stack_of_experts, 2e-5),
    "mixed batch": Place(lora_mixed, "LoraMixed", of_base, mixed_batch),
}
FAULTS = {"lost": lambda t: None, "1 % off": lambda t: t * 1.01}


def plant(monkeypatch, kind, at, fault):
    """Every backward of this Function changes the gradients at these places -> a list that counts them."""
    backward, changed = kind.backward, []

    @functools.wraps(backward)
    def faulty(ctx, *gs):
        out = list(backward(ctx, *gs))
        for i in at(ctx, out):
            if out[i] is not None:
                out[i] = fault(out[i])
                changed.append(i)
        return tuple(out)

    monkeypatch.setattr(kind, "backward", staticmethod(faulty))
    return changed


def wrong(expected, got, rtol):
    """The names of what is missing or off; a gradient of nearly nothing, as of a key's bias, counts as a thousandth."""
    least = max(t.abs().max() for name, t in expected.items() if name != "y") / 1000
    return {
        name
        for name, e in expected.items()
        if name not in got
        or (e.dtype, e.shape) != (got[name].dtype, got[name].shape)
        or (got[name] - e).abs().max() > rtol * max(e.abs().max(), least)
    }


def base_biases(names):
    """Those among the names of gradients."""
    return {name for name in names if name.endswith("bias") and "lora_" not in name}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_they_are_stocks(place):
    model, args, kwargs = place.make()
    expected, got, fast, handed_back = both(model, *args, **kwargs)
    assert fast and not handed_back
    assert base_biases(expected) and expected.keys() == got.keys()
    assert not wrong(expected, got, place.rtol)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_fault_is_noticed(place, fault, monkeypatch):
    """The comparison above names biases, and of a Function of one layer nothing else."""
    model, args, kwargs = place.make()
    changed = plant(monkeypatch, place.kind(), place.at, FAULTS[fault])
    expected, got, *_ = both(model, *args, **kwargs)
    assert changed
    off = wrong(expected, got, place.rtol)
    assert base_biases(off)
    assert place.at is of_base or all(name.endswith("bias") for name in off)


def test_every_function_with_a_bias_is_here_or_has_none():
    """A new op with a bias has to come with its place; quantized bases have theirs in tests/quantized/test_bias.py."""
    elsewhere = {"LoraQuantized", "LoraAdd"}
    without = {"LoraEmbedding", "DoraEmbedding", "Combine"}
    assert {kind.__name__ for kind in Function.__subclasses__() if kind.__module__.startswith("peft_fast.")} == {
        *(place.function for place in PLACES.values()),
        *elsewhere,
        *without,
    }
