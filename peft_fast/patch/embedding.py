"""The guard before PEFT's lora.Embedding.forward: vanilla adapters run lora_embedding, others PEFT's own forward."""

from __future__ import annotations

import ast
import functools
import inspect
import math
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peft_fast import settings
from peft_fast.ops import Adapter, lora_embedding
from peft_fast.ops.checks import FLOATS, MAX_RANK
from peft_fast.patch import dora, ledger, mixed, plan
from peft_fast.patch.marks import wanted

# class of embeddings -> _scaled_by it
_forms: dict[type, str] = {nn.Embedding: ""}


class Plan(NamedTuple):
    """An embedding as lora_embedding takes it."""

    W: Tensor
    adapters: list[Adapter]
    padding_idx: int | None
    scale: float | Tensor | None


def load() -> None:
    """Imports PEFT; must have run before the guard is called."""
    plan.load()
    dora.load()
    functools.update_wrapper(forward, plan.stock_embedding)


def forward(self, x, *args, **kwargs):
    """x (...,) tokens -> y (..., D): the forward that accelerate() puts on PEFT's lora.Embedding."""
    if not wanted(self):
        return plan.stock_embedding(self, x, *args, **kwargs)
    if kwargs and mixed.given(kwargs):
        return mixed.embed(self, x, args, kwargs)
    found = plan.refuse_call(args, kwargs) or dora.embedding_plan_of(self, plan_of) or plan_of(self)
    reason = found if type(found) is str else refuse_input(x, found, few=type(found) is Plan)
    ledger.count(self, reason or None)
    if reason:
        return plan.stock_embedding(self, x, *args, **kwargs)
    if type(found) is dora.EmbeddingPlan:
        return dora.run_embedding(self, x, found)
    W, adapters, padding_idx, scale = found
    return lora_embedding(x, W, adapters, padding_idx=padding_idx, scale=scale)


def plan_of(layer: nn.Module, names: Sequence[str] | None = None, variant: type | None = None) -> Plan | str:
    """A PEFT embedding -> what lora_embedding needs to run it, or why PEFT keeps it; ``names``: not the active ones."""
    if type(layer) is not plan.Embedding:
        return f"{type(layer).__name__} is not PEFT's plain lora.Embedding"
    if reason := plan.out_of_use(layer):
        return reason
    base = layer._modules["base_layer"]
    if not isinstance(base, nn.Embedding):
        return f"the base layer is a {type(base).__name__}, not nn.Embedding"
    if plan.hooked(base):
        return "hooks or a replaced forward on the base layer"
    if plan.hooks_everywhere():
        return "hooks registered for all modules"
    if base.__dict__.get("_hf_tp_plan") is not None or layer.input_fns or layer.output_fns:
        return "the layer is tensor parallel"
    if base.max_norm is not None or base.scale_grad_by_freq or base.sparse:
        return "an embedding with max_norm, scale_grad_by_freq or sparse gradients"
    W = base._parameters.get("weight")
    if not plan.plain(W):
        return "the base weight is not a plain dense tensor (quantized, sharded, parametrized)"
    if W.device.type not in plan.DEVICES:
        return f"the base weight is on {W.device.type}"
    scale = _scale(base, W)
    if type(scale) is str:
        return scale
    adapters = []
    for name in layer.active_adapters if names is None else names:
        if name not in layer.lora_embedding_A:
            continue
        if name in layer.lora_variant and type(layer.lora_variant[name]) is not variant:
            return f"{type(layer.lora_variant[name]).__name__} keeps PEFT's forward"
        A, B, scaling = layer.lora_embedding_A[name], layer.lora_embedding_B[name], layer.scaling[name]
        if not plan.plain(A) or not plan.plain(B):
            return "adapter weights are not plain dense tensors (sharded, parametrized)"
        if A.dtype is not B.dtype or A.dtype not in FLOATS or W.dtype not in FLOATS:
            return "a dtype other than float64, float32, bfloat16 and float16, or two in one adapter"
        if A.device != W.device or B.device != W.device:
            return "adapter and base weight are on different devices"
        if not 0 < A.shape[0] <= MAX_RANK:
            return f"the rank is above {MAX_RANK}"
        if not plan.number(scaling):
            return "the scaling is not a number or a 0-dimensional tensor without gradient"
        adapters.append(Adapter(A, B, scaling))
    if not adapters and names is None:
        return "no active adapter in this layer"
    return Plan(W, adapters, base.padding_idx, scale)


def refuse_input(ids: Tensor, found: Plan, few: bool = True) -> str:
    """Why these tokens are PEFT's: PEFT would raise, or there are few of them and ``few`` says that they count."""
    if type(ids) is not Tensor or ids.layout is not torch.strided or ids.dtype not in (torch.int32, torch.int64):
        return "the input is not a plain tensor of int32 or int64 tokens"
    if ids.device != found.W.device:
        return "input and base weight are on different devices"
    if few and ids.device.type == "cpu" and ids.numel() < settings.get().min_tokens:
        return "few tokens (PEFT_FAST_MIN_TOKENS): there is nothing to gain"
    return ""


def _scale(base: nn.Module, W: Tensor) -> float | Tensor | str | None:
    """What the base multiplies its vectors by: nothing, or its embed_scale as Gemma and BART do it."""
    kind = type(base)
    scale = getattr(base, "embed_scale", None)
    if kind.forward is nn.Embedding.forward and scale is None:
        return None
    if kind not in _forms and not torch.compiler.is_compiling():
        note(kind)
    how = _forms.get(kind, "")
    if how == "tensor" and isinstance(scale, Tensor) and scale.numel() == 1 and not scale.requires_grad:
        return scale
    # a number multiplies as it is, while PEFT rounds it to the weight's dtype for the adapter: both must be the same
    if how == "number" and type(scale) in (int, float):
        if W.dtype not in plan.NARROW or (math.frexp(scale)[0] * 256).is_integer():
            return float(scale)
    return f"the base layer is a {kind.__name__} with a forward of its own"


def known(base: nn.Embedding) -> bool:
    """Does its forward look vectors up, scale them by embed_scale, as PEFT scales the adapter's, and nothing else?"""
    kind = type(base)
    if kind.forward is nn.Embedding.forward:
        return getattr(base, "embed_scale", None) is None
    if kind not in _forms:
        note(kind)
    return bool(_forms[kind])


def note(kind: type) -> None:
    """Reads the forward of a class of embeddings, which compiled code cannot do."""
    _forms[kind] = _scaled_by(kind)


def _scaled_by(kind: type) -> str:
    """How a class's forward scales nn.Embedding's: by a "tensor", by a "number", or "" for anything else."""
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(kind.forward))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return ""
    body = [line for line in function.body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))]
    ids = function.args.args[-1].arg
    forms = {
        f"return super().forward({ids}) * self.embed_scale.to(self.weight.dtype)": "tensor",
        f"return super().forward({ids}) * self.embed_scale": "number",
    }
    plainly = kind.__bases__ == (nn.Embedding,) and len(function.args.args) == 2 and len(body) == 1
    return forms.get(ast.unparse(body[0]), "") if plainly else ""
