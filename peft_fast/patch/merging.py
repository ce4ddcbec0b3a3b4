"""merged(model): adapters merged into the base weights for the length of a block, and those back bit for bit after it.

PEFT's unmerge subtracts what merge added, which bfloat16 does not undo. Here each adapted layer gets a parameter of its
own that is merged, and its old one back: what shares a weight with it, the optimizer, and the adapters see no change.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_fast.errors import UnsupportedError, fail
from peft_fast.patch import alike, embedding, plan
from peft_fast.patch.known import require_peft
from peft_fast.patch.marks import innermost
from peft_fast.patch.summary import some_lora_layers

# variants whose merge() computes what their forward does and leaves nothing else changed
MERGEABLE = {
    "DoraLinearVariant", "DoraEmbeddingVariant", "DoraConv1dVariant", "DoraConv2dVariant", "DoraConv3dVariant",
    "MiCALinearVariant", "MiCAEmbeddingVariant", "BdLoraLinearVariant", "VeloraLinearVariant",
}  # fmt: skip


class Swap(NamedTuple):
    """A parameter of a base layer that is another one inside the block."""

    layer: nn.Module
    base: nn.Module
    name: str
    before: nn.Parameter


# base layer -> its parameters as they were, while a block is open
_open: weakref.WeakKeyDictionary[nn.Module, dict[str, nn.Parameter]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the ``with`` block the active adapters of ``model`` are merged into its weights, for evaluation.

    After it every base weight is the same parameter with the same bits as before, also if the block raised. It costs a
    copy of the adapted weights while it lasts, and what PEFT's merge costs once. May be nested, and used with
    accelerate() or without. state_dict() and what is saved inside have the weights from before; loading into them is
    refused. Raises UnsupportedError, before anything has changed, for a layer that cannot be merged exactly.
    """
    require_peft()
    plan.load()
    layers = some_lora_layers(model)
    todo = {layer: _targets(layer) for layer in _mergeable(layers)}
    swaps: list[Swap] = []
    hooks: list[Any] = []
    states = {layer: (list(layer.merged_adapters), dict(layer._caches)) for layer in todo}
    try:
        for layer, names in todo.items():
            _merge(layer, names, swaps, hooks)
        yield model
    finally:
        for hook in hooks:
            hook.remove()
        there = set(model.modules())
        for swap in reversed(swaps):
            _open.pop(swap.base, None)
            if swap.layer in there:  # else merge_and_unload() has kept what it merged
                _give_back(swap)
        for layer, (adapters, caches) in states.items():
            layer.merged_adapters[:] = adapters
            layer._caches.clear()
            layer._caches.update(caches)


def _mergeable(layers: dict[str, nn.Module]) -> list[nn.Module]:
    """The layers whose adapters have to be merged; raises if one of them cannot be."""
    found, wrong = [], {}
    for name, layer in layers.items():
        if type(layer).__name__ == "MultiheadAttention":  # merges itself in every forward
            continue
        if any(name.startswith(f"{outer}.") for outer in _attentions(layers)):
            continue
        if layer.merged_adapters or layer.disable_adapters or not _active(layer):  # runs its base layer as it is
            continue
        if why := _why_not(layer):
            wrong[name] = why
        found.append(layer)
    if wrong:
        name, why = next(iter(wrong.items()))
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        need = "LoRA layers that can be merged and restored bit for bit"
        fail(UnsupportedError, f"{name}{more}: {why}", need, "evaluate the model as it is, without merged()")
    return found


def _attentions(layers: dict[str, nn.Module]) -> list[str]:
    return [name for name, layer in layers.items() if type(layer).__name__ == "MultiheadAttention"]


def _active(layer: nn.Module) -> list[str]:
    """The active adapters that this layer has."""
    own = layer.lora_embedding_A if type(layer).__name__ == "Embedding" else layer.lora_A
    return [name for name in layer.active_adapters if name in own]


def _why_not(layer: nn.Module) -> str:
    """Why this layer cannot be merged and restored; empty if it can."""
    from peft.tuners.lora import layer as lora
    from peft.tuners.tuners_utils import BaseTunerLayer

    if type(layer) not in (lora.Linear, lora.Embedding, lora.Conv1d, lora.Conv2d, lora.Conv3d, lora.ParamWrapper):
        return f"a {type(layer).__name__} rounds its weight anew when it is merged, or cannot be merged"
    base = layer._modules["base_layer"]
    if isinstance(base, BaseTunerLayer) and type(base) is not lora.ParamWrapper:
        return f"it adapts what a {type(base).__name__} of another method adapts"
    base, names = innermost(layer), _active(layer)
    for name in names:
        variant = layer.lora_variant.get(name)
        if variant is not None and type(variant).__name__ not in MERGEABLE:
            return f"{type(variant).__name__} cannot be merged into one weight"
        if layer.lora_bias.get(name) and base._parameters.get("bias") is None:
            return "lora_bias=True beside a base layer without a bias"
    if isinstance(base, nn.modules.conv._ConvNd) and (why := _unlike_its_adapter(base)):
        return why
    for name in _targets(layer):
        parameter = base._parameters.get(name)
        if not isinstance(parameter, nn.Parameter) or not plan.plain(parameter) or not parameter.is_floating_point():
            return f"its {name} is not a plain dense parameter (quantized, sharded, parametrized)"
        if parameter.is_meta:
            return f"its {name} is offloaded"
    if type(layer) is not lora.ParamWrapper and not _linear_in_its_weight(base):
        return f"its {type(base).__name__} may do more to a weight than multiply by it"
    return ""


def _unlike_its_adapter(base: nn.modules.conv._ConvNd) -> str:
    """Why no one kernel is a convolution and PEFT's adapter of it, which has its kernel size, stride and padding."""
    if base.groups > 1:
        return "PEFT does not merge convolutions with groups"
    wide = any(size > 1 for size in base.kernel_size)
    if wide and any(step > 1 for step in base.dilation):
        return "the adapter of a dilated convolution is not dilated"
    padded = wide if base.padding == "same" else base.padding != "valid" and any(base.padding)
    if padded and base.padding_mode != "zeros":
        return f"the adapter pads with zeros, the convolution by {base.padding_mode}"
    if isinstance(base, nn.Conv3d) and base.kernel_size[:2] == (1, 1):
        return "PEFT does not merge kernels of 1 × 1 × n"
    return ""


def _linear_in_its_weight(base: nn.Module) -> bool:
    """Does the base layer's result for W + ΔW add what the adapter adds? Its class may do more to the weight."""
    kind = type(base)
    if isinstance(base, nn.Embedding):
        return base.max_norm is None and embedding.known(base)
    if isinstance(base, nn.modules.conv._ConvNd):
        return kind.forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    return kind is plan.Conv1D or alike.inherits(kind) or alike.linear(kind)


def _targets(layer: nn.Module) -> list[str]:
    """The parameters of its base layer that merging writes to."""
    if type(layer).__name__ == "ParamWrapper":
        return [layer.parameter_name]
    return ["weight", "bias"] if any(layer.lora_bias.get(name) for name in _active(layer)) else ["weight"]


def _merge(layer: nn.Module, names: list[str], swaps: list[Swap], hooks: list) -> None:
    base = innermost(layer)
    # nothing made here may be an inference tensor, and autocast would round the adapters
    with torch.inference_mode(False), torch.no_grad(), contextlib.ExitStack() as stack:
        for kind in {base._parameters[name].device.type for name in names}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        for name in names:
            before = base._parameters[name]
            swaps.append(Swap(layer, base, name, before))
            base._parameters[name] = nn.Parameter(before.detach().clone(), requires_grad=False)
            _open.setdefault(base, {})[name] = before
        hooks.append(base.register_state_dict_post_hook(_as_before))
        hooks.append(base.register_load_state_dict_pre_hook(_refuse_to_load))
        layer.merge(adapter_names=_active(layer))


def _give_back(swap: Swap) -> None:
    """The old parameter; in the dtype and on the device that the model has been moved to meanwhile."""
    now, before = swap.base._parameters.get(swap.name), swap.before
    if isinstance(now, Tensor) and (now.dtype, now.device) != (before.dtype, before.device):
        before.data = before.data.to(now.device, now.dtype)
    swap.base._parameters[swap.name] = swap.before


def _as_before(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict) -> None:
    for name, parameter in _open.get(module, {}).items():
        if (key := prefix + name) in state:
            state[key] = parameter if isinstance(state[key], nn.Parameter) else parameter.detach()


def _refuse_to_load(module: nn.Module, state: dict[str, Any], prefix: str, *_) -> None:
    for name in _open.get(module, ()):
        if prefix + name in state:
            need = "a model outside of `with peft_fast.merged(model)`"
            fail(UnsupportedError, f"a state dict with {prefix}{name}", need, "load it before or after the block")
