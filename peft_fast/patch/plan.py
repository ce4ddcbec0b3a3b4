"""What a PEFT layer is to the ops, or why PEFT keeps it: a refusal is a sentence for the user.

load() imports PEFT and must have run before anything else here is called.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from peft_fast import settings
from peft_fast.ops import Adapter, Sibling
from peft_fast.ops.checks import FLOATS, MAX_RANK
from peft_fast.ops.dropout import native_mask
from peft_fast.patch import alike
from peft_fast.patch.marks import state

DEVICES = ("cpu", "cuda")
NARROW = (torch.bfloat16, torch.float16)

# PEFT's lora.Linear and lora.Embedding with the forwards PEFT gave them, and transformers' Conv1D
Linear = Embedding = Conv1D = stock_linear = stock_embedding = None


def load() -> None:
    """Imports PEFT and remembers its forwards, once."""
    global Linear, Embedding, Conv1D, stock_linear, stock_embedding
    if Linear is None:
        from peft.tuners.lora import layer

        stock_linear, stock_embedding = layer.Linear.forward, layer.Embedding.forward
        Linear, Embedding, Conv1D = layer.Linear, layer.Embedding, layer.Conv1D


def refuse_call(args: tuple, kwargs: dict) -> str:
    """Why this call is PEFT's whatever the layer; empty if it is not."""
    if args or kwargs:
        if kwargs.get("adapter_names") is not None:
            return "adapter_names was given: several adapters in one batch"
        return "extra arguments reached the layer"
    if state.paused:
        return "inside `with peft_fast.disabled()`"
    if settings.get().disable:
        return "PEFT_FAST_DISABLE is set"
    if torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None:
        return "the model is being traced or exported"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is on"
    if torch._C._functorch.maybe_current_level() is not None:
        return "a torch.func transform is on"
    return ""


def plan_of(
    layer: nn.Module, bare: bool = False, names: Sequence[str] | None = None, variant: type | None = None
) -> Sibling | str:
    """A PEFT layer -> what the ops need to run it, or why PEFT keeps it.

    ``bare``: also without an adapter; ``names``: with these adapters, not the active ones; ``variant``: the one
    kind of them that need not be vanilla.
    """
    if type(layer) is not Linear:
        return f"{type(layer).__name__} is not PEFT's plain lora.Linear"
    if reason := out_of_use(layer):
        return reason
    plan = frozen(layer._modules["base_layer"])
    if type(plan) is str:
        return plan
    adapters = adapters_of(layer, plan.W.device, names, variant)
    if type(adapters) is str:
        return adapters
    if not adapters and not bare:
        return "no active adapter in this layer"
    return Sibling(plan.W, plan.bias, adapters, plan.transposed)


def out_of_use(layer: nn.Module) -> str:
    """Why none of a layer's adapters takes part in its forward; empty where they do."""
    if layer._disable_adapters:
        return "the adapters are disabled"
    return "the adapter is merged into the base weight" if layer.merged_adapters else ""


def adapters_of(
    layer: nn.Module, device: torch.device, names: Sequence[str] | None = None, variant: type | None = None
) -> list[Adapter] | str:
    """The active adapters of a PEFT linear layer, or those of ``names``, on any base, or why PEFT keeps them."""
    modules, adapters = layer._modules, []
    loras_A, loras_B = modules["lora_A"]._modules, modules["lora_B"]._modules
    dropouts = modules["lora_dropout"]._modules
    for name in layer.active_adapters if names is None else names:
        if name not in loras_A:
            continue
        if name in layer.lora_variant and type(layer.lora_variant[name]) is not variant:
            return f"{type(layer.lora_variant[name]).__name__} keeps PEFT's forward"
        adapter = adapter_of(loras_A[name], loras_B[name], dropouts[name], layer.scaling[name])
        if type(adapter) is str:
            return adapter
        if adapter.A.device != device or adapter.B.device != device:
            return "adapter and base weight are on different devices"
        if adapters and adapter.A.dtype is not adapters[0].A.dtype:
            return "active adapters have different dtypes"
        adapters.append(adapter)
    return adapters


def frozen(base: nn.Module) -> Sibling | str:
    """A linear layer by itself -> Sibling without adapters, or why it is left alone."""
    kind = type(base)
    if kind is not Conv1D and not alike.linear(kind):
        return f"the base layer is a {kind.__name__}, not nn.Linear or Conv1D"
    if hooked(base):
        return "hooks or a replaced forward on the base layer"
    if base.__dict__.get("_hf_tp_plan") is not None:
        return "the layer is tensor parallel"
    W, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if not plain(W) or not (bias is None or plain(bias)):
        return "the base weight is not a plain dense tensor (quantized, sharded, parametrized)"
    if hooks_everywhere():
        return "hooks registered for all modules"
    if bias is not None and bias.dtype is not W.dtype:
        return "the base weight and its bias have different dtypes"
    if W.device.type not in DEVICES:
        return f"the base weight is on {W.device.type}"
    return Sibling(W, bias, (), kind is Conv1D)


def adapter_of(lora_A, lora_B, dropout, scaling, kind: type = nn.Linear) -> Adapter | str:
    """One adapter's modules of class ``kind`` -> Adapter, or why PEFT keeps it."""
    if type(lora_A) is not kind or type(lora_B) is not kind:
        return f"lora_A or lora_B is not a plain nn.{kind.__name__}"
    if hooked(lora_A) or hooked(lora_B) or hooked(dropout):
        return "hooks or a replaced forward on lora_A, lora_B or lora_dropout"
    A, B = lora_A._parameters.get("weight"), lora_B._parameters.get("weight")
    bias = lora_B._parameters.get("bias")
    if not plain(A) or not plain(B) or not (bias is None or plain(bias)):
        return "adapter weights are not plain dense tensors (sharded, parametrized)"
    if lora_A._parameters.get("bias") is not None:
        return "lora_A has a bias"
    if A.dtype is not B.dtype or not (bias is None or bias.dtype is A.dtype):
        return "lora_A and lora_B have different dtypes"
    if A.shape[0] > MAX_RANK:
        return f"the rank is above {MAX_RANK}"
    if B.shape[1] != A.shape[0]:
        return "lora_A and lora_B are of different ranks"
    p = probability(dropout)
    if type(p) is str:
        return p
    if type(scaling) is not float and not number(scaling):
        return "the scaling is not a number or a 0-dimensional tensor without gradient"
    return Adapter(A, B, scaling, p, bias)


def probability(dropout: nn.Module) -> float | str:
    """The p in effect of a dropout module, or why it is none of ours."""
    if type(dropout) is nn.Dropout:
        p = dropout.p if dropout.training else 0.0
        return p if p < 1 and not dropout.inplace else "dropout with p = 1 or in place"
    return 0.0 if type(dropout) is nn.Identity else f"lora_dropout is a {type(dropout).__name__}, not nn.Dropout"


def refuse_input(layer: nn.Module, x: Tensor, plan: Sibling, few: bool = True) -> str:
    """Why this input of a plannable layer is PEFT's: PEFT would raise, or mix dtypes in its own way.

    ``few``: few tokens are PEFT's too.
    """
    W = plan.W
    if not plain(x) or x.is_nested or x.dim() == 0:
        return "the input is not a plain dense tensor"
    if x.device != W.device:
        return "input and base weight are on different devices"
    if x.shape[-1] != W.shape[0 if plan.transposed else 1]:
        return "the input's last dimension does not fit the base weight"
    if plan.transposed and not x.is_contiguous():
        return "Conv1D views its input, which is not contiguous"
    if few and x.device.type == "cpu" and x.shape[:-1].numel() < settings.get().min_tokens:
        return "few tokens (PEFT_FAST_MIN_TOKENS): reading the weight is all the time there is"
    if any(a.p > 0 for a in plan.adapters) and not native_mask(x.device):
        return "dropout, and no compiled kernel to draw its mask on this device"
    return refuse_dtypes(layer, x.dtype, plan)


def refuse_dtypes(layer: nn.Module, given: torch.dtype, plan: Sibling) -> str:
    """Why PEFT mixes the dtypes of an input and this layer in its own way; empty where ours is the same."""
    base = plan.W.dtype
    low = plan.adapters[0].A.dtype if plan.adapters else base
    if given not in FLOATS or base not in FLOATS or low not in FLOATS:
        return "a dtype other than float64, float32, bfloat16 and float16"
    device_type = plan.W.device.type
    if torch.is_autocast_enabled(device_type):
        cast = torch.get_autocast_dtype(device_type)
        usual = (torch.float32, cast)
        if cast not in NARROW or given not in usual or base not in usual or low not in usual:
            return "autocast with dtypes other than float32 and its own"
    elif given is not base:
        return "input and base weight have different dtypes"
    elif low is not given and (low is not torch.float32 or given not in NARROW):
        return "adapters of lower precision than the base, or of float64 beside it"
    if low is not given and plan.adapters and not layer.cast_input_dtype_enabled:
        return "PEFT's input cast is switched off"
    return ""


def number(scaling: object) -> bool:
    """A number, or the 0-d tensor that prepare_model_for_compiled_hotswap makes of one?"""
    if isinstance(scaling, Tensor):
        return scaling.dim() == 0 and not scaling.requires_grad and scaling.is_floating_point()
    return isinstance(scaling, (float, int))


def plain(tensor: Tensor | None) -> bool:
    """A dense tensor and no subclass of one?"""
    kind = type(tensor)
    return (kind is nn.Parameter or kind is Tensor) and tensor.layout is torch.strided


def hooked(module: nn.Module) -> bool:
    """Would calling the module do more than its class's forward?"""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def hooks_everywhere() -> bool:
    """Are there hooks that every module's call runs?"""
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )
