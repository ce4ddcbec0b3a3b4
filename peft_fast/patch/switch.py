"""accelerate, restore, enable, disable, disabled: put guards on classes, mark layers, and undo both.

A class's attribute forward, of PEFT's lora.Linear and lora.Embedding and of MLP blocks, is the one place of five
tried that survives pickle, adapters added later, merging, hotswapping, DDP, FSDP2 and offload hooks. Whom the guards
serve is a mark on the *base* layers: every later adapter wraps one of those, so nobody has to walk the model again.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from peft_fast import settings
from peft_fast.patch import (
    alike,
    blocks,
    conv,
    embedding,
    experts,
    groups,
    guard,
    ledger,
    places,
    plan,
    quantized,
    steps,
)
from peft_fast.patch.known import forward_known, require_peft
from peft_fast.patch.marks import MARK, innermost, marked, state
from peft_fast.patch.summary import lora_layers, report, some_lora_layers

_lock = threading.Lock()


def accelerate(model: nn.Module) -> nn.Module:
    """Makes the LoRA layers of ``model`` fast, present and future ones; the same object comes back.

    Prints what is fast and what is not, and why (report(model) says it again later). Adapters, state dict,
    saved files and repr stay PEFT's. Calling it twice changes nothing; restore(model) undoes it. A model
    under torch.compile is to be accelerated before its first call: compiled code does not see it.
    """
    settings.get()  # a wrong variable must raise before anything is patched
    require_peft()
    layers = some_lora_layers(model)
    if _known():
        _install()
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, plan.Conv1D, *conv.BASES)) or experts.adaptable(module):
                innermost(module).__dict__[MARK] = True
            if isinstance(module, nn.Linear):
                alike.note(type(module))
            if isinstance(module, nn.Embedding):
                embedding.note(type(module))
        for layer in layers.values():
            innermost(layer).__dict__[MARK] = True  # bases of classes that are no nn.Linear
        places.walk(model)
    if not settings.get().quiet and _first_rank():
        print(report(model))
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes accelerate(model): PEFT's own forward and no mark left; the same object comes back.

    The class attribute goes back once no accelerated model is left. Under enable() the model stays fast.
    """
    layers = lora_layers(model)
    for module in model.modules():
        module.__dict__.pop(MARK, None)
    ledger.forget(model.modules())
    groups.forget(layers.values())
    conv.forget(model.modules())
    places.forget(model)
    if not state.everywhere and not _in_use():
        _uninstall()
    return model


def enable() -> None:
    """Makes every PEFT LoRA layer of this process fast, whichever model it is in, now or later."""
    settings.get()  # a wrong variable must raise before anything is patched
    require_peft()
    if _known():
        _install()
        state.everywhere = True


def disable() -> None:
    """Gives every layer of this process back to PEFT, accelerated models included.

    enable() or the next accelerate() switches on again, then also models that were accelerated before.
    """
    state.everywhere = False
    state.off = True
    _uninstall()


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """PEFT's own forward inside the ``with`` block, in every thread; may be nested.

    Keep a forward and its backward on the same side: checkpointing runs the forward again in backward.
    """
    with _lock:
        state.paused += 1
    try:
        yield
    finally:
        with _lock:
            state.paused -= 1


def _known() -> bool:
    known, why = forward_known()
    if not known:
        _warn(why)
    return known


@functools.cache
def _warn(why: str) -> None:
    # cached: once a process for each cause, however many models are accelerated
    warnings.warn(f"peft_fast leaves every layer to PEFT: {why}", stacklevel=4)


def _install() -> None:
    plan.Linear.forward = guard.forward
    if forward_known("Embedding")[0]:
        plan.Embedding.forward = embedding.forward
    if forward_known("_ConvNd")[0]:
        conv.ConvNd.forward = conv.forward
    if forward_known("ParamWrapper")[0]:
        experts.ParamWrapper.forward = experts.forward
    quantized.install()
    blocks.install()
    steps.install()
    state.off = False


def _uninstall() -> None:
    # another library may have wrapped a guard since: then it stays, and passes everything on
    if plan.Linear is not None and plan.Linear.forward is guard.forward:
        plan.Linear.forward = plan.stock_linear
    if plan.Embedding is not None and plan.Embedding.forward is embedding.forward:
        plan.Embedding.forward = plan.stock_embedding
    if conv.ConvNd is not None and conv.ConvNd.forward is conv.forward:
        conv.ConvNd.forward = conv.stock
    if experts.ParamWrapper is not None and experts.ParamWrapper.forward is experts.forward:
        experts.ParamWrapper.forward = experts.stock
    conv.forget()
    quantized.uninstall()
    blocks.uninstall()
    steps.uninstall()


def _in_use() -> bool:
    """Is a marked layer alive anywhere? Copies are marked but registered nowhere: only the collector knows them."""
    gc.collect()
    kinds = plan.Linear, plan.Embedding, *conv.kinds, experts.ParamWrapper, *quantized.kinds()
    kinds = tuple(kind for kind in kinds if kind is not None)  # nothing is loaded before the first accelerate()
    return any(issubclass(type(o), kinds) and marked(o) for o in gc.get_objects())


def _first_rank() -> bool:
    dist = torch.distributed
    return not (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0)
