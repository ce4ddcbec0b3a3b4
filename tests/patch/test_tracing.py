"""What is an MLP block: found by what a forward computes, refused wherever it computes anything else."""

import operator
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peft_fast.patch import places, tracing
from tests.patch.toys import K, conv1d

I = 48


class Mlp(nn.Module):
    """Layers by usual names; what is tested is the forward."""

    def __init__(self, forward, up=I, down=I):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(K, I), nn.Linear(K, up), nn.Linear(down, K)
        self.act, self.drop, self.tail = nn.SiLU(), nn.Dropout(0.1), nn.Dropout(0.2)
        self.norm, self.p, self.eps, self.config = nn.LayerNorm(K), 0.3, 1e-5, object()
        type(self).forward = forward


def mlp(forward, **sizes):
    # a class each: the forward is found on the class
    return type("Mlp", (Mlp,), {"__init__": Mlp.__init__})(forward, **sizes)


def find(forward, **sizes):
    return tracing.find(mlp(forward, **sizes), places.is_linear)


def block(gate="", up="up", down="down", act="act", halves="", drops=(), tail=(), reads=()):
    return gate, up, down, act, halves, drops, tail, reads


def _drop(self, x):
    return F.dropout(x, p=self.p, training=self.training)


def _t5(self, x):
    h = self.act(self.up(x))
    if isinstance(self.down.weight, torch.Tensor) and h.dtype != self.down.weight.dtype:
        h = h.to(self.down.weight.dtype)
    return self.down(h)


def _chunk(self, x):
    h, gate = self.up(x).chunk(2, dim=-1)
    return self.down(self.act(h) * gate)


def _split(self, x):
    h, gate = torch.split(self.up(x), 24, dim=-1)
    return self.down(h * self.act(gate))


def _helper(self, x):
    def inner(h):
        return self.act(self.up(h))

    return self.down(inner(x))


BLOCKS = {
    "gated": (lambda self, x: self.down(self.act(self.gate(x)) * self.up(x)), block("gate")),
    "gated, the other way round": (lambda self, x: self.down(self.up(x) * self.act(self.gate(x))), block("gate")),
    "torch.mul": (lambda self, x: self.down(torch.mul(self.act(self.up(x)), self.gate(x))), block("up", "gate")),
    "plain": (lambda self, x: self.down(self.act(self.up(x))), block()),
    "relu": (lambda self, x: self.down(F.relu(self.up(x))), block(act="=relu")),
    "torch.relu": (lambda self, x: self.down(torch.relu(self.up(x))), block(act="=relu")),
    "silu": (lambda self, x: self.down(F.silu(self.gate(x)) * self.up(x)), block("gate", act="=silu")),
    "gelu": (lambda self, x: self.down(F.gelu(self.up(x))), block(act="=gelu")),
    "gelu tanh": (lambda self, x: self.down(F.gelu(self.up(x), approximate="tanh")), block(act="=gelu_tanh")),
    "dropout before down": (lambda self, x: self.down(self.drop(self.act(self.up(x)))), block(drops=("drop",))),
    "dropouts behind": (
        lambda self, x: self.tail(self.drop(self.down(self.act(self.up(x))))),
        block(tail=("drop", "tail")),
    ),
    "functional dropouts": (
        lambda self, x: _drop(self, self.down(_drop(self, self.act(self.up(x))))),
        block(drops=(0.3,), tail=(0.3,), reads=(("p", 0.3),)),
    ),
    "dtype question": (_t5, block()),
    "function inside": (_helper, block()),
    "first half": (_chunk, block(halves="first")),
    "second half": (_split, block(halves="second")),
    "attribute": (lambda self, x: self.down(self.act(self.up(x))) if self.eps else x, block(reads=(("eps", 1e-5),))),
}


@pytest.mark.parametrize("forward, expected", BLOCKS.values(), ids=BLOCKS)
def test_is_a_block(forward, expected):
    halves = bool(expected[4])
    found = find(forward, down=24 if halves else I)
    assert not isinstance(found, str), found
    assert tuple(found) == expected


def _noise(self, x):
    h = self.act(self.up(x))
    return self.down(h + torch.randn(I)) if self.training else self.down(h)


def _unequal(self, x):
    h, gate = torch.split(self.up(x), [20, 28], dim=-1)
    return self.down(self.act(h) * gate)


def _wrong_dim(self, x):
    h, gate = self.up(x).chunk(2, dim=1)
    return self.down(self.act(h) * gate)


def _same_half(self, x):
    h, _ = self.up(x).chunk(2, dim=-1)
    return self.down(self.act(h) * h)


def _looks_at(self, x):
    return self.down(self.act(self.up(x))) if x.shape[0] > 3 else x


def _keeps(self, x):
    h = self.act(self.up(x))
    self.norm(h)
    return self.down(h)


def _beside(self, x):
    self.norm(x)
    return self.down(self.act(self.up(x)))


def _used_twice(self, x):
    h = self.up(x)
    return self.down(self.act(h) * h)


NOT = {
    "an addend": lambda self, x: self.down(self.act(self.gate(x)) + self.up(x)),
    "a residual": lambda self, x: x + self.down(self.act(self.up(x))),
    "a factor": lambda self, x: self.down(self.act(self.up(x)) * 2),
    "scaled input": lambda self, x: self.down(self.act(self.up(x * 2))),
    "a norm before": lambda self, x: self.down(self.act(self.up(self.norm(x)))),
    "a norm behind": lambda self, x: self.norm(self.down(self.act(self.up(x)))),
    "two inputs": lambda self, x: self.down(self.act(self.gate(x)) * self.up(x + 1)),
    "no activation": lambda self, x: self.down(self.up(x)),
    "activation twice": lambda self, x: self.down(self.act(self.act(self.up(x)))),
    "gate without activation": lambda self, x: self.down(self.gate(x) * self.up(x)),
    "gated by itself": _used_twice,
    "activation behind": lambda self, x: self.act(self.down(self.act(self.up(x)))),
    "gelu of an unknown form": lambda self, x: self.down(F.gelu(self.up(x), approximate=self.p)),
    "tanh": lambda self, x: self.down(torch.tanh(self.up(x))),
    "noise while training": _noise,
    "dropout that never ends": lambda self, x: self.down(F.dropout(self.act(self.up(x)), 0.1, True)),
    "dropout in place": lambda self, x: self.down(F.dropout(self.act(self.up(x)), 0.1, self.training, True)),
    "dropout by another p in evaluation": lambda self, x: self.down(
        F.dropout(self.act(self.up(x)), 0.1 if self.training else 0.2, self.training)
    ),
    "dropout on x": lambda self, x: self.down(self.act(self.up(self.drop(x)))),
    "halves of unequal size": _unequal,
    "halves of another dimension": _wrong_dim,
    "one half twice": _same_half,
    "a look at the data": _looks_at,
    "something beside": _keeps,
    "something beside, of x": _beside,
    "two tensors out": lambda self, x: (self.down(self.act(self.up(x))), x),
    "nothing out": lambda self, x: None,
    "keyword for a layer": lambda self, x: self.down(self.act(self.up(input=x))),
    "a parameter": lambda self, x: self.down(self.act(self.up(x))) * self.norm.weight,
    "reads what may change inside": lambda self, x: self.down(self.act(self.up(x))) if self.config else x,
    "more arguments": lambda self, x, scale=1: self.down(self.act(self.up(x))),
    "any arguments": lambda self, *x: self.down(self.act(self.up(*x))),
    "an error": lambda self, x: operator.truediv(1, 0),
}


@pytest.mark.parametrize("forward", NOT.values(), ids=NOT)
def test_is_none(forward):
    found = find(forward, down=24 if "half" in forward.__name__ or forward in (_unequal, _wrong_dim) else I)
    assert isinstance(found, str), found


REASONS = {
    "reads what may change inside": "its forward reads self.config",
    "a look at the data": "its forward cannot be traced",
    "dropout by another p in evaluation": "its forward is another one while training",
    "more arguments": "its forward takes more than one tensor",
    "a residual": "its forward is not down(act(gate(x))·up(x)) or down(act(up(x)))",
}


@pytest.mark.parametrize("case", REASONS)
def test_the_reason_says_why(case):
    assert REASONS[case] in find(NOT[case])


def test_conv1d_is_a_linear_layer():
    module = mlp(lambda self, x: self.down(self.act(self.up(x))))
    module.up, module.down = conv1d(K, I), conv1d(I, K)
    assert tuple(tracing.find(module, places.is_linear)) == block()
    module = mlp(_chunk, down=24)
    module.up = conv1d(K, I)
    assert tracing.find(module, places.is_linear).halves == "first"


FLAG, COUNTS = False, []


def _global(self, x):
    return self.down(self.up(x)) if FLAG else self.down(self.act(self.up(x)))


def _skip(self, x):
    if self.training and random.random() < 0.5:
        return torch.zeros_like(x)
    return self.down(self.act(self.up(x)))


def _noise_unused(self, x):
    torch.rand(1)
    return self.down(self.act(self.up(x)))


def _no_grad(self, x):
    return self.down(self.act(self.up(x))) if torch.is_grad_enabled() else x


def _autocast(self, x):
    return x if torch.is_autocast_enabled("cpu") else self.down(self.act(self.up(x)))


def _counts(self, x):
    self.calls = self.calls + 1
    return self.down(self.act(self.up(x)))


def _counts_inside(self, x):
    self.seen.add_(1)
    return self.down(self.act(self.up(x)))


def _appends(self, x):
    COUNTS.append(x)
    return self.down(self.act(self.up(x)))


def _history(self, x):
    self.history.append(x)
    return self.down(self.act(self.up(x)))


def _child(self, x):
    h = self.act(self.up(x))
    return self.down(self.drop(h) if self.drop.p > 0 else h)


def _prints(self, x):
    print(x)
    return self.down(self.act(self.up(x)))


def _imports(self, x):
    import os

    return self.down(self.act(self.up(x))) if os.sep else x


def _dict(self, x):
    return self.down(self.act(self.up(x))) if self.__dict__["p"] else x


def _asks(self, x):
    return x if hasattr(self, "nothing") else self.down(self.act(self.up(x)))


def _through(function):
    """The same one call further away."""

    def helper(self, x):
        return function(self, x)

    return lambda self, x: helper(self, x)


IMPURE = (
    _global, _skip, _noise_unused, _no_grad, _autocast, _counts, _counts_inside, _appends, _history, _child, _prints,
    _imports, _dict, _asks,
)  # fmt: skip


@pytest.mark.parametrize("distance", (lambda f: f, _through), ids=("itself", "a helper"))
@pytest.mark.parametrize("forward", IMPURE, ids=lambda f: f.__name__)
def test_a_forward_that_hangs_on_more_than_its_module_is_none(forward, distance, capsys):
    """It is not run either: nothing it would change is changed."""
    module = mlp(distance(forward))
    module.calls, module.history = 0, []
    module.register_buffer("seen", torch.zeros(()))
    before, states = dict(module.__dict__), (torch.get_rng_state(), random.getstate())
    call = nn.Module.__call__
    assert isinstance(tracing.find(module, places.is_linear), str)
    assert module.__dict__ == before and module.calls == 0 and module.seen == 0 and nn.Module.__call__ is call
    assert module.history == COUNTS == [] and capsys.readouterr().out == ""
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_what_a_forward_reads_is_noted_wherever_it_is_kept():
    """On the instance, also by a private name, on the class, behind a property."""

    def forward(self, x):
        return self.down(F.dropout(self.act(self.up(x)), self._p * self.scale * self.factor, self.training))

    module = mlp(forward)
    module._p, type(module).scale, type(module).factor = 0.5, 0.5, property(lambda self: 1.0 if self.eps else 0.0)
    found = tracing.find(module, places.is_linear)
    assert dict(found.reads) == {"_p": 0.5, "scale": 0.5, "eps": 1e-5} and found.drops == (0.25,)
