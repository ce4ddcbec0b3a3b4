"""Few tokens and no gradients, as when generating: a LoRA layer as one pass over its weight.

Such a call takes a few microseconds beside that, so it cannot afford much thought. Nothing is remembered between
calls, though, that could be out of date: all that a call depends on is looked at, in one straight line. Whatever is
not the common case returns None and goes the long way by plan.py, which takes no less than what is taken here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_fast import settings
from peft_fast.ops import prepare
from peft_fast.ops.lora_decode import MOST, kernel
from peft_fast.patch import alike, ledger, plan

DTYPES = (torch.float32, torch.bfloat16)


def run(layer: nn.Module, x: Tensor) -> Tensor | None:
    """x (..., K) -> y (..., N) of a wanted layer that got nothing else, or None: the call is for others."""
    # where a training step ends
    if torch.is_grad_enabled() or type(x) is not Tensor or torch.is_autocast_enabled("cpu"):
        return None
    if type(layer) is not plan.Linear or layer._disable_adapters or layer.merged_adapters:
        return None
    modules = layer._modules
    base = modules["base_layer"]
    kind, tensors = type(base), base._parameters
    W, bias, transposed = tensors.get("weight"), tensors.get("bias"), kind is plan.Conv1D
    if not (transposed or alike.linear(kind)) or not plan.plain(W) or not (bias is None or plan.plain(bias)):
        return None
    dtype = W.dtype
    if x.dtype is not dtype or dtype not in DTYPES or not (bias is None or bias.dtype is dtype):
        return None
    if not (x.is_cpu and W.is_cpu) or x.layout is not torch.strided or x.is_nested or not x.dim():
        return None
    K, now = W.shape[0 if transposed else 1], settings.get()
    if x.shape[-1] != K or x.numel() > MOST * K or x.numel() >= now.min_tokens * K:
        return None
    if (transposed and not x.is_contiguous()) or plan.hooked(base) or base.__dict__.get("_hf_tp_plan") is not None:
        return None
    if plan.hooks_everywhere() or plan.refuse_call((), {}) or (run_kernel := kernel()) is None:
        return None
    As, Bs, biases, scalings = [], [], [], []
    loras_A, loras_B = modules["lora_A"]._modules, modules["lora_B"]._modules
    names = layer._active_adapter
    for name in (names,) if type(names) is str else names:
        if (lora_A := loras_A.get(name)) is None:
            continue
        lora_B, dropout, scaling = loras_B[name], modules["lora_dropout"]._modules[name], layer.scaling[name]
        if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear or name in layer.lora_variant:
            return None
        if plan.hooked(lora_A) or plan.hooked(lora_B) or plan.hooked(dropout) or plan.probability(dropout) != 0.0:
            return None
        A, B, low_bias = lora_A._parameters["weight"], lora_B._parameters["weight"], lora_B._parameters["bias"]
        low = A.dtype
        if not plan.plain(A) or not plan.plain(B) or lora_A._parameters["bias"] is not None or B.dtype is not low:
            return None
        if B.shape[1] != A.shape[0]:
            return None
        if not (low is dtype or (low is torch.float32 and layer.cast_input_dtype_enabled)):
            return None
        if not (A.is_cpu and B.is_cpu) or (As and As[0].dtype is not low):
            return None
        if low_bias is not None and not (plan.plain(low_bias) and low_bias.dtype is low):
            return None
        if type(scaling) is not float:
            if not plan.number(scaling):
                return None
            scaling = float(scaling)
        As.append(A)
        Bs.append(B)
        biases.append(low_bias)
        scalings.append(scaling)
    if not As:
        return None
    prepare.count_call()
    ledger.count(layer, None)
    return run_kernel(x, W, bias, As, Bs, biases, scalings, transposed)
