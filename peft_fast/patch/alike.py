"""Subclasses of nn.Linear that compute what nn.Linear does, read off their forward's source: Falcon's, for one."""

from __future__ import annotations

import ast
import inspect
import textwrap

import torch
from torch import nn
from torch.nn import functional as F

# what a class may define without changing what calling it does; a property called weight, for one, is none of it
_HARMLESS = {"forward", "reset_parameters", "extra_repr", "__init__", "__doc__", "__module__", "__qualname__"}
_HARMLESS |= {"__annotations__", "__annotate_func__", "__firstlineno__", "__static_attributes__", "__parameters__"}
_FORMS = {
    "return super().forward(x)",
    "return F.linear(x, self.weight, self.bias)",
    # Falcon's: its second rounding, between product and bias, is the one thing that nn.Linear does without
    "y = x @ self.weight.T\nif self.bias is None:\n    return y\nreturn y + self.bias",
}
# what calling an nn.Linear runs and reads; weight and bias are no attributes of the class
_RUN = ("__call__", "_call_impl", "forward", "__getattribute__", "__getattr__", "weight", "bias")

torchs = nn.Linear.forward
# class -> the forward that was read, and the verdict: libraries replace forwards
_known: dict[type, tuple[object, bool]] = {nn.Linear: (torchs, True)}


def linear(kind: type) -> bool:
    """Does calling an instance compute x·Wᵀ + bias, and nothing else?"""
    if not torch.compiler.is_compiling():
        note(kind)
    forward, verdict = _known.get(kind, (None, False))
    return verdict and kind.forward is forward and nn.Linear.forward is torchs


def inherits(kind: type) -> bool:
    """Does calling an instance run nn.Linear's own forward? Whatever else its class has does not count."""
    same = all(getattr(kind, name, None) is getattr(nn.Linear, name, None) for name in _RUN)
    return same and issubclass(kind, nn.Linear) and nn.Linear.forward is torchs


def note(kind: type) -> None:
    """Reads a class, which compiled code cannot do."""
    if kind in _known and (kind is nn.Linear or _known[kind][0] is kind.forward):
        return
    verdict = kind.__bases__ == (nn.Linear,) and set(vars(kind)) <= _HARMLESS and _plain_forward(kind)
    _known[kind] = kind.forward, verdict


def _plain_forward(kind: type) -> bool:
    function = vars(kind).get("forward")
    if function is None:
        return True
    # names from elsewhere than its module, or the source of what it wraps
    if not inspect.isfunction(function) or hasattr(function, "__wrapped__") or "super" in function.__globals__:
        return False
    if any(cell.cell_contents is not kind for cell in function.__closure__ or ()):
        return False
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return False
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list or len(tree.args.args) != 2:
        return False
    if tree.args.posonlyargs or tree.args.vararg or tree.args.kwonlyargs or tree.args.kwarg:
        return False
    body = [line for line in tree.body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))]
    names = _Names(tree, function.__globals__)
    return "\n".join(ast.unparse(names.visit(line)) for line in body) in _FORMS


class _Names(ast.NodeTransformer):
    """Its arguments become self and x, its only variable y, and torch's linear F.linear."""

    def __init__(self, tree: ast.FunctionDef, known: dict) -> None:
        me, x = (argument.arg for argument in tree.args.args)
        own = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        self.known, self.own = known, own
        self.names = {me: "self", x: "x"} | ({own.pop(): "y"} if len(own) == 1 else {})

    def visit_Name(self, node: ast.Name) -> ast.Name:
        # another name that happens to be called x, y or F must not pass for ours
        new = self.names.get(node.id, node.id if node.id == "super" else f"other_{node.id}")
        return ast.Name(new, node.ctx)

    def visit_Call(self, node: ast.Call) -> ast.Call:
        if self._is_linear(node.func):
            arguments = [self.visit(a) for a in node.args]
            keywords = [ast.keyword(k.arg, self.visit(k.value)) for k in node.keywords]
            return ast.Call(ast.Attribute(ast.Name("F", ast.Load()), "linear", ast.Load()), arguments, keywords)
        return self.generic_visit(node)

    def _is_linear(self, node: ast.expr) -> bool:
        path = ast.unparse(node).split(".")
        if path[0] in self.names or path[0] in self.own:
            return False
        found = self.known.get(path[0])
        for name in path[1:]:
            found = getattr(found, name, None)
        return found is F.linear
