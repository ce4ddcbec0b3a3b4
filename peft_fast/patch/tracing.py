"""Is a module an MLP block, down(act(gate(x))·up(x)) or down(act(up(x)))? Its own forward, traced, is the answer.

The forward runs once on a stand-in whose children are leaves that only note that they were called, so no name and
no source decides. torch.fx's graph is used without its Tracer, which patches nn.Module for every thread while it runs.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from peft_fast.patch.purity import impure

# attribute of a guard: the forward that it stands before
STOCK = "_peft_fast_stock"
UNKNOWN = "its forward is not down(act(gate(x))·up(x)) or down(act(up(x)))"
# functions that stand where an activation module would
FUNCTIONS = {F.relu: "relu", torch.relu: "relu", F.silu: "silu"}
SIMPLE = (int, float, bool, str, type(None))
# what every module has, and the stand-in shows by other means
USUAL = {*nn.Module().__dict__, *vars(nn.Module), *vars(object)}


class Block(NamedTuple):
    """What a module's forward computes, by the names of its children; kept as a plain tuple, which pickles anywhere."""

    gate: str  # empty: no gate
    up: str
    down: str
    act: str  # a child, or "=silu" where the forward calls a function
    halves: str  # "first" or "second" half of up's output is the activated one; empty: neither
    drops: tuple[str | float, ...]  # dropouts before down: a child, or the p that applies while training
    tail: tuple[str | float, ...]  # dropouts behind down
    reads: tuple[tuple[str, object], ...]  # attributes that the forward reads, with the values it was traced with


class _Refused(Exception):
    """Why this forward is no block."""


class _Leaf:
    """Stands for a child: a call becomes a node; of its attributes only a weight's dtype and shape can be read."""

    def __init__(self, tracer: _Tracer, name: str, child: nn.Module) -> None:
        self._tracer, self._name, self._child = tracer, name, child

    def __call__(self, *args, **kwargs):
        return self._tracer.create_proxy("call_module", self._name, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._child, name) if name in ("weight", "bias") else None
        if not isinstance(value, torch.Tensor):
            raise _Refused(f"its forward reads self.{self._name}.{name}")
        return torch.empty_like(value, device="meta")


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Answers whether dtypes differ: they do not, which holds wherever the fast path takes a call."""

    def to_bool(self, obj: fx.Proxy) -> bool:
        node = obj.node
        dtypes = [a for a in node.args if isinstance(a, torch.dtype) or _is_dtype(a)]
        if node.target in (operator.eq, operator.ne) and len(dtypes) == 2:
            return node.target is operator.eq
        return super().to_bool(obj)


def find(module: nn.Module, linear: Callable[[nn.Module], bool]) -> Block | str:
    """The block that ``module`` is, or why it is none; ``linear`` says which children are linear layers."""
    if not one_argument(module):
        return "its forward takes more than one tensor"
    try:
        train, evaluate = (_match(module, linear, training) for training in (True, False))
    except _Refused as why:
        return str(why)
    except Exception:  # whatever a forward does with values that are not there
        return "its forward cannot be traced"
    return train if train == evaluate else "its forward is another one while training"


def one_argument(module: nn.Module) -> bool:
    """Does the forward take one tensor and nothing else? Only those are traced."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return len(parameters) == 1 and parameters[0].kind is parameters[0].POSITIONAL_OR_KEYWORD


def _is_dtype(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is getattr and node.args[1] == "dtype"


def _trace(module: nn.Module, training: bool) -> tuple[fx.Graph, dict[str, object]]:
    """The graph of one call, and what was read of the module beside its children."""
    tracer, reads, own = _Tracer(fx.Graph()), {}, module.__dict__

    def understood(function: object) -> None:
        if why := impure(function):
            raise _Refused(why)

    def note(name: str, value: object) -> None:
        if not isinstance(value, SIMPLE):
            raise _Refused(f"its forward reads self.{name}")
        reads[name] = value

    class Spy(type(module)):
        def __getattribute__(self, name):
            if name not in USUAL:
                if name in own:
                    note(name, own[name])
                elif (found := _of_class(type(module), name)) is not None:
                    found = getattr(found, "__func__", getattr(found, "fget", found))
                    understood(found) if callable(found) else note(name, found)
            return object.__getattribute__(self, name)

    forward = type(module).forward
    forward = getattr(forward, STOCK, forward)
    understood(forward)
    spy = object.__new__(Spy)
    leaves = {name: child and _Leaf(tracer, name, child) for name, child in module._modules.items()}
    # without values: a forward that looks at them cannot be traced
    tensors = {
        kind: {name: t if t is None else torch.empty_like(t, device="meta") for name, t in own[kind].items()}
        for kind in ("_parameters", "_buffers")
    }
    spy.__dict__.update(own, _modules=leaves, training=training, **tensors)
    y = forward(spy, tracer.create_proxy("placeholder", "x", (), {}))
    if any(t is not None and t._version for kind in tensors.values() for t in kind.values()):
        raise _Refused("its forward changes something")
    if not isinstance(y, fx.Proxy):
        raise _Refused(UNKNOWN)
    tracer.graph.output(y.node)
    return tracer.graph, reads


def _of_class(kind: type, name: str) -> object:
    """What a class that is not torch's says an attribute is; None if none does."""
    return next((vars(c)[name] for c in kind.__mro__ if c not in nn.Module.__mro__ and name in vars(c)), None)


def _match(module: nn.Module, linear: Callable[[nn.Module], bool], training: bool) -> Block:
    graph, reads = _trace(module, training)
    parts = _Parts(module, linear, training)
    x = next(iter(graph.nodes))
    node = next(node for node in graph.nodes if node.op == "output").args[0]
    node, tail = parts.dropouts(node)
    down, node = parts.linear(node)
    node, drops = parts.dropouts(node)
    gate = halves = ""
    if factors := parts.product(node):
        act, node, other = factors
        if _is_half(node) and _is_half(other):
            halves, node = parts.halves(node, other)
            up, source = parts.linear(node)
            parts.is_halved(up, node)
        else:
            gate, source = parts.linear(node)
            up, source_up = parts.linear(other)
            source = source if source is source_up else None
    else:
        act, node = parts.activation(node) or parts.no()
        up, source = parts.linear(node)
    parts.nothing_else(graph, x, source)
    return Block(gate, up, down, act, halves, drops, tail, tuple(sorted(reads.items())))


def _is_half(node: fx.Node) -> bool:
    return node.target is operator.getitem


class _Parts:
    """Takes a graph apart from its end; what was taken is remembered, and anything unknown refuses the forward."""

    def __init__(self, module: nn.Module, linear: Callable[[nn.Module], bool], training: bool) -> None:
        self.children, self.is_linear, self.training = module._modules, linear, training
        self.taken: list[fx.Node] = []

    def no(self):
        raise _Refused(UNKNOWN)

    def child(self, node: fx.Node) -> tuple[nn.Module, fx.Node] | None:
        """(child, what it is given) if the node is a child's call."""
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node):
            return self.children[node.target], node.args[0]
        return None

    def linear(self, node: fx.Node) -> tuple[str, fx.Node]:
        found = self.child(node)
        if found is None or not self.is_linear(found[0]):
            self.no()
        self.taken.append(node)
        return node.target, found[1]

    def activation(self, node: fx.Node) -> tuple[str, fx.Node] | None:
        if found := self.child(node):
            if self.is_linear(found[0]) or isinstance(found[0], (nn.Dropout, nn.Identity)):
                return None
            self.taken.append(node)
            return node.target, found[1]
        name = FUNCTIONS.get(node.target, "")
        given = {"input": None, "inplace": False, "approximate": "none", **node.kwargs}
        if node.target is F.gelu:
            name = {"none": "gelu", "tanh": "gelu_tanh"}.get(given["approximate"], "")
        if not name or len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
            return None
        self.taken.append(node)
        return f"={name}", node.args[0]

    def product(self, node: fx.Node) -> tuple[str, fx.Node, fx.Node] | None:
        """act(a)·b, in either order -> (act, a, b)."""
        if node.target not in (operator.mul, torch.mul) or len(node.args) != 2 or node.kwargs:
            return None
        if not all(isinstance(arg, fx.Node) for arg in node.args):
            self.no()
        self.taken.append(node)
        for one, other in (node.args, node.args[::-1]):
            if found := self.activation(one):
                return *found, other
        self.no()

    def halves(self, activated: fx.Node, other: fx.Node) -> tuple[str, fx.Node]:
        """The two halves of one tensor -> (which one is activated, the tensor)."""
        (parts, i), (same, j) = activated.args, other.args
        if parts is not same or (i, j) not in ((0, 1), (1, 0)):
            self.no()
        self.taken += [activated, other, parts]
        names = {"chunk": ("chunks", 2), "split": ("split_size", None)}
        target = parts.target if isinstance(parts.target, str) else getattr(parts.target, "__name__", "")
        if target not in names:
            self.no()
        given = dict(zip(("input", "size", "dim"), parts.args, strict=False)) | dict(parts.kwargs)
        self.size = given.get("size", given.get(names[target][0], given.get("split_size_or_sections")))
        self.target = target
        if given.get("dim") != -1:
            self.no()
        return ("first", "second")[i], given["input"]

    def is_halved(self, up: str, node: fx.Node) -> None:
        """chunk(2) halves whatever it is given; split(n) only what is 2·n wide."""
        base = self.children[up]
        while "base_layer" in base._modules:
            base = base._modules["base_layer"]
        width = base.nf if hasattr(base, "nf") else base.out_features
        if width % 2 or self.size != (2 if self.target == "chunk" else width // 2):
            self.no()

    def dropouts(self, node: fx.Node) -> tuple[fx.Node, tuple[str | float, ...]]:
        """Dropouts around a node -> (the node inside, them in the order they are applied)."""
        out: list[str | float] = []
        while True:
            found = self.child(node)
            if found and isinstance(found[0], (nn.Dropout, nn.Identity)):
                out.append(node.target)
                inner = found[1]
            elif node.target is F.dropout:
                given = dict(zip(("input", "p", "training", "inplace"), node.args, strict=False)) | dict(node.kwargs)
                if given.get("training", True) is not self.training or given.get("inplace"):
                    self.no()
                out.append(float(given.get("p", 0.5)))
                inner = given["input"]
            else:
                return node, tuple(reversed(out))
            self.taken.append(node)
            node = inner

    def nothing_else(self, graph: fx.Graph, x: fx.Node, source: fx.Node | None) -> None:
        """The forward computes the block of its x and nothing beside it."""
        if source is not x:
            self.no()
        known = {x, *self.taken}
        asked = {n for n in graph.nodes if n.target is getattr or n.target in (operator.eq, operator.ne)}
        for node in graph.nodes:
            if node not in known and node not in asked and node.op != "output":
                self.no()
            users = [user for user in node.users if user not in asked]
            if node in self.taken and len(users) > 1 and not all(_is_half(user) for user in users):
                self.no()
