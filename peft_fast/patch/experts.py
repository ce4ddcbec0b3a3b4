"""The guard before PEFT's lora.ParamWrapper.forward: LoRA on the experts of a mixture, by `target_parameters`.

PEFT builds W + s·B·A of all experts for every forward, and a gradient of that size in backward. Here the outermost of
the nested wrappers runs the experts' forward, which is transformers' own one function for all classes that its
decorator use_experts_implementation has made, with lora_experts for its two products.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peft_fast import dispatch, settings
from peft_fast.ops import Adapter, combine_experts, lora_experts, prepare, route_experts
from peft_fast.ops.checks import FLOATS, MAX_RANK
from peft_fast.patch import ledger, plan
from peft_fast.patch.marks import wanted

# attributes that the decorator gives an instance, and what they are where a forward of the class itself runs
FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")
# fingerprint of what the decorated forward and grouped_mm are made of -> the releases of transformers that have it
KNOWN = dict.fromkeys(("d7fecd3c4c1cc499", "303e7d8e88dceb92", "129b5165c7720f95"), "5.20 to 5.23")
# fingerprint of a class's own forward ("eager") -> its FLAGS, and whether it calls self._apply_gate
KNOWN_EAGER = {
    "176c1d9b2401897a": ((True, False, False, False), False),  # Mixtral's, and that of fifty more
    "e304f09b0e1ffe3a": ((True, False, False, False), True),  # DeepSeek-V4's
    "97ecc64b6fc3c8a3": ((True, False, False, False), True),  # Inkling2's
    "710eb077ad2d4c78": ((True, True, True, False), True),  # gpt-oss's
    "c6a8573e2c27d67b": ((True, False, True, False), False),  # Aria's
    "dca26ed4edd3d659": ((True, False, False, True), False),  # Muse Spark's
    "907022c50fa6edb5": ((False, False, False, False), False),  # Nemotron-H's
}

stock = None
ParamWrapper = None
# what the stock forward calls: class, name, function
_called: list[tuple[type, str, Callable]] = []


class Stack(NamedTuple):
    """The weights of all experts, and what adapts them."""

    W: Tensor
    bias: Tensor | None
    adapters: list[Adapter]


class Plan(NamedTuple):
    """A module of experts as lora_experts takes it."""

    base: nn.Module
    up: Stack
    down: Stack
    wrappers: list[nn.Module]


def load() -> None:
    """Imports PEFT; must have run before the guard is called."""
    global stock, ParamWrapper
    if ParamWrapper is None:
        from peft.tuners.lora import layer

        plan.load()
        stock, ParamWrapper = layer.ParamWrapper.forward, layer.ParamWrapper
        for name in ("_activate_lora", "get_delta_factors", "get_delta_weight"):
            if name in vars(ParamWrapper):
                _called.append((ParamWrapper, name, vars(ParamWrapper)[name]))
        for proxy in ("_LoraParameterProxy", "_LoraFactorsProxy"):
            if proxy := getattr(layer, proxy, None):
                _called.append((proxy, "forward", proxy.forward))
        functools.update_wrapper(forward, stock)


def forward(self, x, *args, **kwargs):
    """x (T, H), experts (T, k), weights (T, k) -> y (T, H): what accelerate() puts on PEFT's lora.ParamWrapper."""
    if not wanted(self):
        return stock(self, x, *args, **kwargs)
    if torch.compiler.is_compiling():
        reason = "experts under torch.compile: the sizes of their products hang on values"
    else:
        found = plan.refuse_call((), kwargs) or plan_of(self)
        reason = found if type(found) is str else refuse_input(found, x, args)
    if reason:
        ledger.count(self, reason)
        return stock(self, x, *args, **kwargs)
    for wrapper in found.wrappers:
        ledger.count(wrapper, None)
    return run(found, x, *args)


def run(found: Plan, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """transformers' grouped_mm_experts_forward, its products with adapters."""
    base, up, down, _ = found
    if prepare.adds_nothing(x, [*up.adapters, *down.adapters]):
        return base(x, experts, weights)
    options = {"transposed": base.is_transposed, "exact": settings.get().exact}
    routing = route_experts(experts, up.W.shape[0])
    h = lora_experts(x, up.W, routing, up.bias, up.adapters, tokens=True, **options)
    h = base._apply_gate(h) if base.has_gate else base.act_fn(h)
    z = lora_experts(h, down.W, routing, down.bias, down.adapters, **options)
    if base.has_post_expert_norm:
        z = base.post_expert_norm(z)
    return combine_experts(z, weights, routing).to(x.dtype)


def plan_of(layer: nn.Module) -> Plan | str:
    """A wrapper, and those nested in it -> what lora_experts needs to run them, or why PEFT keeps it."""
    if any(getattr(owner, name) is not function for owner, name, function in _called):
        return "another library has replaced a function that PEFT's lora.ParamWrapper.forward calls"
    adapters: dict[str, list[Adapter]] = {}
    wrappers = []
    base = layer
    while isinstance(base, ParamWrapper):
        if type(base) is not ParamWrapper:
            return f"{type(base).__name__} is not PEFT's plain lora.ParamWrapper"
        if base is not layer and plan.hooked(base):
            return "hooks or a replaced forward on a wrapper inside this one"
        if base._disable_adapters:
            return "the adapters are disabled"
        if base.parameter_name in adapters:
            return "two wrappers of one parameter"
        found = [] if base.merged_adapters else _adapters(base)
        if type(found) is str:
            return found
        adapters[base.parameter_name] = found
        wrappers.append(base)
        base = base._modules["base_layer"]
    if not any(adapters.values()):
        merged = any(w.merged_adapters for w in wrappers)
        return "the adapter is merged into the base weight" if merged else "no active adapter in this layer"
    if reason := _refuse_base(base, layer):
        return reason
    names = ("gate_up_proj" if base.has_gate else "up_proj", "down_proj")
    if others := adapters.keys() - set(names):
        return f"{min(others)} is adapted, which is not one of the experts' two stacks"
    stacks = [_stack(base, name, adapters.get(name, [])) for name in names]
    for found in stacks:
        if type(found) is str:
            return found
    found = Plan(base, *stacks, wrappers)
    return _refuse_backend(found) or found


def refuse_input(found: Plan, x: Tensor, args: tuple) -> str:
    """Why these tokens are PEFT's: transformers would raise, or take another way."""
    if len(args) != 2 or not all(plan.plain(t) for t in (x, *args)):
        return "the input is not three plain tensors: tokens, experts and weights"
    experts, weights = args
    if x.dim() != 2 or experts.dim() != 2 or weights.shape != experts.shape or experts.shape[0] != x.shape[0]:
        return "tokens, experts and weights are not (T, H), (T, k) and (T, k)"
    if experts.dtype not in (torch.int32, torch.int64) or x.dtype not in FLOATS or weights.dtype not in FLOATS:
        return "tokens and weights are not floats, or experts no integers"
    W = found.up.W
    if any(t.device != W.device for t in (x, *args)):
        return "input and base weight are on different devices"
    if x.shape[1] != W.shape[1 if found.base.is_transposed else 2]:
        return "the input's last dimension does not fit the base weight"
    if implementation(found.base) != "grouped_mm":
        # the others cast to what autocast says, or raise
        device = W.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if dtype is not W.dtype:
            return "input and base weight have different dtypes"
    # another device would have to be waited for: there ops.route_experts says what becomes of such numbers
    if experts.numel() and W.device.type == "cpu":
        low, high = torch.stack(torch.aminmax(experts)).tolist()
        if low < 0 or high >= W.shape[0]:
            return "the router names experts that are not here"
    return ""


def choice(found: Plan) -> dispatch.Choice:
    """What would run the products of these experts."""
    W = found.up.W
    tensors = [t for stack in found[1:3] for t in (stack.bias, *[a.A for a in stack.adapters]) if t is not None]
    exact = settings.get().exact or dispatch.must_be_exact(W.dtype, tensors)
    return dispatch.pick(W, W.dtype, W, tensors, exact, op="lora_experts", plan="accumulate")


def implementation(base: nn.Module) -> str:
    """What transformers would run: "grouped_mm", "batched_mm", or "eager", the class's own forward; else another."""
    return base.config._experts_implementation or "eager"


def adaptable(module: nn.Module) -> bool:
    """Is it a module of experts that `target_parameters` may adapt?"""
    return "is_transposed" in module.__dict__ or ("base_layer" in module._modules and isinstance(module, ParamWrapper))


def _adapters(layer: nn.Module) -> list[Adapter] | str:
    """The active adapters of one wrapper, or why PEFT keeps it."""
    E = layer.num_experts
    if E < 2:
        return "the parameter is not a stack of several experts"
    if layer._did_swap_in_out_features == bool(getattr(layer.get_base_layer(), "is_transposed", False)):
        return "the adapter's sides are swapped in a way that is not known"
    out = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if name in layer.lora_variant:
            return f"{type(layer.lora_variant[name]).__name__} keeps PEFT's forward"
        lora_A, lora_B, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear:
            return "lora_A or lora_B is not a plain nn.Linear"
        A, B = lora_A._parameters.get("weight"), lora_B._parameters.get("weight")
        if not plan.plain(A) or not plan.plain(B):
            return "adapter weights are not plain dense tensors (sharded, parametrized)"
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] % E or B.shape[1] != A.shape[0]:
            return "the adapter's shapes do not fit its number of experts"
        if not 0 < A.shape[0] // E <= MAX_RANK:
            return f"the rank is above {MAX_RANK}"
        if A.dtype is not B.dtype or A.dtype not in FLOATS or (out and A.dtype is not out[0].A.dtype):
            return "active adapters, or both sides of one, have different dtypes"
        if not plan.number(scaling):
            return "the scaling is not a number or a 0-dimensional tensor without gradient"
        out.append(Adapter(A, B, scaling))
    return out


def _refuse_base(base: nn.Module, layer: nn.Module) -> str:
    """Why the experts themselves are not for us."""
    if plan.hooked(base):
        return "hooks or a replaced forward on the experts"
    if plan.hooks_everywhere():
        return "hooks registered for all modules"
    if "parametrizations" in base._modules:
        return "the experts carry a parametrization: PEFT's, of the wrapper around this one, or another"
    own = base.__dict__
    if any(type(own.get(flag)) is not bool for flag in (*FLAGS, "_is_expert_parallel")) or "config" not in own:
        return f"{type(base).__name__} is not made by transformers' use_experts_implementation"
    if own["_is_expert_parallel"] or own.get("_hf_tp_plan") is not None:
        return "the experts are spread over processes"
    return refuse_forward(base)


def _refuse_backend(found: Plan) -> str:
    """Why what would run here is not worth it: plain torch, expert after expert, keeps no GPU busy."""
    device = found.up.W.device.type
    if device == "cpu":
        return ""
    backend, _, reason = choice(found)
    return f"plain torch would run the experts one by one on {device} ({reason})" if backend == "torch" else ""


def _stack(base: nn.Module, name: str, adapters: list[Adapter]) -> Stack | str:
    W, bias = base._parameters.get(name), None
    if not plan.plain(W) or W.dim() != 3 or W.dtype not in FLOATS:
        return "the base weight is not a plain dense stack (quantized, sharded, parametrized)"
    if W.requires_grad:
        return "the experts' own weights are trained"
    if W.shape[0] != base.num_experts:
        return "the stack has another number of experts than its module"
    if base.has_bias:
        bias = base._parameters.get(f"{name}_bias")
        if not plan.plain(bias) or bias.dtype is not W.dtype or bias.shape[0] != W.shape[0]:
            return "the base bias is not a plain dense tensor of the weight's dtype"
    N, K = W.shape[:0:-1] if base.is_transposed else W.shape[1:]
    for A, B, *_ in adapters:
        if A.shape != (B.shape[1], K) or B.shape[0] != N or A.shape[0] % W.shape[0]:
            return "the adapter's shapes do not fit the base weight"
        if A.device != W.device or B.device != W.device:
            return "adapter and base weight are on different devices"
        if A.dtype is not W.dtype and (A.dtype is not torch.float32 or W.dtype not in plan.NARROW):
            return "adapters of lower precision than the base, or of float64 beside it"
    return Stack(W, bias, adapters)


def refuse_forward(base: nn.Module) -> str:
    """Why the forward that transformers would run is not known to be its own; empty if it is."""
    kind = type(base)
    if reason := _refuse_class(kind):
        return reason
    free = _free(kind.forward)
    original, interface = free["original_forward"], free["experts_interface"]
    moe = sys.modules["transformers.integrations.moe"]
    if interface is not moe.ALL_EXPERTS_FUNCTIONS:
        return f"{kind.__name__}'s forward asks another library what to run"
    name = implementation(base)
    function = interface.get(name, original)
    flags = tuple(base.__dict__[flag] for flag in FLAGS)
    return _refuse_function(kind, name, function, function is original, flags)


@functools.cache
def _refuse_class(kind: type) -> str:
    """Why a class's forward is not what the decorator makes of it."""
    moe = sys.modules.get("transformers.integrations.moe")
    try:
        if moe is None or kind.forward.__code__ not in _inside(moe.use_experts_implementation.__code__):
            return f"{kind.__name__}'s forward is not the one of transformers' use_experts_implementation"
        source = fingerprint(moe.use_experts_implementation, moe.ExpertsInterface.get_interface)
    except (OSError, TypeError, SyntaxError, ValueError, AttributeError) as error:
        return f"{kind.__name__}'s forward cannot be read ({type(error).__name__})"
    return "" if source in KNOWN else f"transformers has a use_experts_implementation that is not known ({source})"


@functools.cache
def _refuse_function(kind: type, name: str, function: Callable, eager: bool, flags: tuple[bool, ...]) -> str:
    """Why one of transformers' experts functions, or the class's own, is not one that was read."""
    moe = sys.modules["transformers.integrations.moe"]
    try:
        if eager:
            known, calls = KNOWN_EAGER.get(fingerprint(function), (None, False))
            gates = calls or not flags[0] or kind._apply_gate is moe._default_apply_gate
            return "" if known == flags and gates else f"{kind.__name__} runs a forward of its own, which is not known"
        if function is moe.grouped_mm_experts_forward:
            source = fingerprint(function, moe._grouped_linear, moe._grouped_mm)
        elif function is moe.batched_mm_experts_forward:
            source = fingerprint(function, moe._batched_linear)
        else:
            return f"the experts run {name}, not eager, grouped_mm or batched_mm"
    except (OSError, TypeError, SyntaxError, ValueError, AttributeError) as error:
        return f"{kind.__name__}'s forward cannot be read ({type(error).__name__})"
    return "" if source in KNOWN else f"transformers has a {name} that is not known ({source})"


def _free(function: Callable) -> dict[str, object]:
    """Name -> value of what a function has from the function it was written in."""
    cells = zip(function.__code__.co_freevars, function.__closure__, strict=True)
    return {name: cell.cell_contents for name, cell in cells}


def fingerprint(*functions) -> str:
    """16 hex digits of functions' code, whatever their comments, docstrings and line breaks."""
    texts = []
    for function in functions:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        texts.append(ast.unparse(tree))
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _inside(code):
    """The code of the functions that are written inside a function."""
    out = []
    for constant in code.co_consts:
        if hasattr(constant, "co_code"):
            out += [constant, *_inside(constant)]
    return out
