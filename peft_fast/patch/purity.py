"""Does a forward hang on nothing that a trace of it would not show? Judged from its code, before it runs.

A trace shows calls on the stand-ins and attributes of the module. Everything else that Python code may look at or
change (globals, modules, random numbers, other objects' attributes) must not be there at all: a forward that is not
understood is left as it is, which costs time and nothing else.
"""

from __future__ import annotations

import builtins
import dis
import math
import operator
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType

import torch
from torch import nn
from torch.nn import functional as F

# functions of torch that end up in the graph, and whose result hangs on their arguments alone
PURE = {F.relu, torch.relu, F.silu, F.gelu, F.dropout, torch.mul, torch.chunk, torch.split}
MODULES = (math, operator)
BUILTINS = {isinstance, len, int, float, bool, str, tuple, list, range, min, max, abs, zip, enumerate}
# a forward that changes something
WRITES = {
    *("STORE_ATTR", "DELETE_ATTR", "STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"),
    *("STORE_GLOBAL", "DELETE_GLOBAL", "IMPORT_NAME", "YIELD_VALUE"),
}


def impure(function: object, seen: set[CodeType] | None = None) -> str:
    """Why a function may look beyond its arguments or change something; empty if it cannot."""
    seen = set() if seen is None else seen
    if not isinstance(function, FunctionType):
        return f"its forward calls {getattr(function, '__name__', function)!r}"
    if function.__code__ in seen:
        return ""
    seen.add(function.__code__)
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    free = {name: cell.cell_contents for name, cell in cells if name != "__class__"}
    for code in _codes(function.__code__):
        steps = list(dis.get_instructions(code))
        for i, step in enumerate(steps):
            if step.opname in WRITES or (step.opname == "STORE_DEREF" and step.argval in free):
                return "its forward changes something"
            if step.argval in ("__dict__", "__class__") and step.opname.startswith("LOAD_"):
                return f"its forward looks at {step.argval}"
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                name = step.argval
                value = function.__globals__.get(name, getattr(builtins, name, None))
            elif step.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF") and step.argval in free:
                name, value = step.argval, free[step.argval]
            else:
                continue
            for more in steps[i + 1 :]:
                if not isinstance(value, ModuleType) or more.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                    break
                if value in MODULES:
                    value = math.sqrt
                    break
                name, value = f"{name}.{more.argval}", getattr(value, more.argval, None)
            if why := _impure_value(name, value, seen):
                return why
    return ""


def _impure_value(name: str, value: object, seen: set[CodeType]) -> str:
    try:
        known = value in PURE or value in BUILTINS
    except TypeError:
        known = False
    if known or isinstance(value, torch.dtype):
        return ""
    if isinstance(value, type):
        if issubclass(value, (BaseException, torch.Tensor)):
            return ""
        if issubclass(value, nn.Module) and value.__module__.startswith("torch."):
            return ""
    if isinstance(value, BuiltinFunctionType) and value.__module__ in ("math", "_operator"):
        return ""
    if isinstance(value, FunctionType):
        # transformers' own helpers are read as they are; torch's beside the known ones hang on its state
        root = value.__module__.partition(".")[0]
        if root == "transformers":
            return ""
        if root != "torch":
            return impure(value, seen)
    return f"its forward uses {name}"


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of the functions written inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
