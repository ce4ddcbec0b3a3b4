"""Few tokens and no gradients, as when generating: a LoRA layer as one pass over its weight.

Such a call takes a few microseconds beside that, so it cannot afford much thought. Nothing is remembered between
calls, though, that could be out of date: all that a call depends on is looked at, in one straight line, and where
csrc/layer.h remembers what a layer's modules are, it proves first that none of them has changed. Whatever is not the
common case returns None and goes the long way by plan.py, which takes no less than what is taken here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from peft_fast import settings
from peft_fast.ops import Sibling, prepare
from peft_fast.ops.lora_decode import MOST, TURNED, address, direct, kernel, look, most, whole
from peft_fast.patch import alike, dora, ledger, marks, plan
from peft_fast.patch.marks import wanted

DTYPES = (torch.float32, torch.bfloat16)
LATE = ("cuda",)
KINDS = (nn.Linear, nn.Identity, nn.Dropout, nn.Parameter, torch.strided)


@functools.cache
def _around() -> tuple:
    """What the compiled look at a whole layer (csrc/call.h) asks and compares with."""
    linear, *others, strided = KINDS
    asked = torch.is_autocast_enabled, torch._C._get_tracing_state
    asked += torch._C._functorch.maybe_current_level, torch.compiler.is_exporting
    named = vars(forward_ad), vars(nn.modules.module), marks.state
    modes = torch._C._len_torch_function_stack, torch._C._len_torch_dispatch_stack, torch.autograd._profiler_enabled
    common = plan.Linear, linear, alike.torchs, *others, Tensor, strided, *DTYPES, *asked, *named
    return *common, *modes, vars(settings), TURNED, plan.MAX_RANK, address(), *dora.classes()


def run(layer: nn.Module, x: Tensor) -> Tensor | None:
    """x (..., K) -> y (..., N) of a layer that is to be fast and got nothing else, or None: the call is for others."""
    # where a training step ends
    if torch.is_grad_enabled():
        return None
    if (call := direct()) is not None and (y := call(layer, x, _around())) is not None:
        return y
    if (common := whole()) is not None and (found := common(layer, x, _around())) is not None:
        W, bias, low, tokens, rank, m = found
        transposed = False
    elif (found := _found(layer, x)) is not None:
        (W, bias, low, tokens, rank, transposed), m = found, None
    else:
        return None
    now = settings.get()
    if now.disable or tokens >= now.min_tokens or (tokens > MOST and tokens > most(x.dtype)):
        return None
    if tokens > TURNED and tokens > most(x.dtype, transposed, rank):
        return None
    if rank > plan.MAX_RANK and any(A.shape[0] > plan.MAX_RANK for A in low[0]):
        return None
    if (compiled := kernel()) is None:
        return None
    if m is not None:
        return dora.decode(layer, x, W, bias, low, m) if tokens <= TURNED else None
    prepare.count_call()
    ledger.count(layer, None)
    return compiled(x, W, bias, *low, transposed)


def _found(layer, x):
    """(W, bias, adapters, tokens of x (..., K), ranks together, transposed), or None."""
    if not wanted(layer) or (found := base_of(layer, x)) is None:
        return None
    W, bias, transposed = found
    names = layer._active_adapter
    if (low := adapters(layer, (names,) if type(names) is str else names, W.dtype)) is None or not low[0]:
        return None
    return W, bias, low, x.shape[:-1].numel(), sum(A.shape[0] for A in low[0]), transposed


def base_of(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None, bool] | None:
    """(W, bias, transposed) of a layer whose compiled kernels take x (..., K), or None."""
    # where a training step ends
    if torch.is_grad_enabled() or type(x) is not Tensor or torch.is_autocast_enabled("cpu"):
        return None
    if type(layer) is not plan.Linear or layer._disable_adapters or layer.merged_adapters:
        return None
    base = layer._modules["base_layer"]
    kind, tensors = type(base), base._parameters
    W, bias, transposed = tensors.get("weight"), tensors.get("bias"), kind is plan.Conv1D
    if not (transposed or alike.linear(kind)) or not plan.plain(W) or not (bias is None or plan.plain(bias)):
        return None
    dtype = W.dtype
    if x.dtype is not dtype or dtype not in DTYPES or not (bias is None or bias.dtype is dtype):
        return None
    if not (x.is_cpu and W.is_cpu) or x.layout is not torch.strided or x.is_nested or not x.dim():
        return None
    if x.shape[-1] != W.shape[0 if transposed else 1] or (transposed and not x.is_contiguous()):
        return None
    if plan.hooked(base) or base.__dict__.get("_hf_tp_plan") is not None:
        return None
    if plan.hooks_everywhere() or plan.refuse_call((), {}) or kernel() is None:
        return None
    return W, bias, transposed


def adapters(layer: nn.Module, names: Iterable[str], dtype: torch.dtype) -> tuple[list, list, list, list] | None:
    """(As, Bs, biases of B, scalings) of those of ``names`` that a layer of ``dtype`` has, or None."""
    modules, variants, scaling_of = layer._modules, layer.lora_variant, layer.scaling
    loras_A, loras_B = modules["lora_A"]._modules, modules["lora_B"]._modules
    dropouts = modules["lora_dropout"]._modules
    # a batch may name dozens: the compiled look at them asks the same, and takes what needs no second thought
    if not variants and (common := look()) is not None:
        found = common(loras_A, loras_B, dropouts, scaling_of, names, KINDS)
        if found is not None and (not found[0] or _computed(found[0][0].dtype, dtype, layer)):
            return found
    As, Bs, biases, scalings, kind = [], [], [], [], None
    for name in names:
        if (lora_A := loras_A.get(name)) is None:
            continue
        lora_B, dropout, scaling = loras_B[name], dropouts[name], scaling_of[name]
        if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear or name in variants:
            return None
        if plan.hooked(lora_A) or plan.hooked(lora_B) or plan.hooked(dropout) or plan.probability(dropout) != 0.0:
            return None
        of_A, of_B = lora_A._parameters, lora_B._parameters
        A, B, low_bias = of_A["weight"], of_B["weight"], of_B["bias"]
        if not plan.plain(A) or not plan.plain(B) or of_A["bias"] is not None:
            return None
        if A.dtype is not kind:
            # adapters have one dtype: the first one's
            kind = A.dtype if kind is None else None
            if not _computed(kind, dtype, layer):
                return None
        if B.dtype is not kind or B.shape[1] != A.shape[0] or not (A.is_cpu and B.is_cpu):
            return None
        if low_bias is not None and not (plan.plain(low_bias) and low_bias.dtype is kind):
            return None
        if type(scaling) is not float:
            if not plan.number(scaling):
                return None
            scaling = float(scaling)
        As.append(A)
        Bs.append(B)
        biases.append(low_bias)
        scalings.append(scaling)
    return As, Bs, biases, scalings


def _computed(kind: torch.dtype | None, dtype: torch.dtype, layer: nn.Module) -> bool:
    """Are adapters of ``kind`` computed as they are behind a base of ``dtype``?"""
    return kind is dtype or (kind is torch.float32 and layer.cast_input_dtype_enabled)


def late(x: Tensor, own: Sibling) -> bool:
    """Is a call for lora_decode of a layer that plan.py has looked at? So it is on a GPU, where the host has time."""
    few = x.device.type in LATE and not torch.is_grad_enabled() and x.shape[:-1].numel() <= MOST
    return few and not settings.get().exact and all(a.p == 0 for a in own.adapters)
