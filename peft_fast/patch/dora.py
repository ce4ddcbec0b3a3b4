"""DoRA layers: lora.Linear and lora.Embedding with one active adapter that has a magnitude run dora_linear and
dora_embedding; what is not read here stays with PEFT's own forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peft_fast import dispatch, settings
from peft_fast.ops import Adapter, Sibling, dora_embedding, dora_linear, dora_norm
from peft_fast.ops.checks import FLOATS
from peft_fast.ops.dora_decode import dora_decode, fresh
from peft_fast.patch import ledger, norms, plan

# fingerprint of what is stood in for -> the PEFT releases that have it, read line by line
KNOWN = {"2580636e9d33cc0d": "0.19.0 to 0.21.2", "218234e7fed27992": "0.19.0 to 0.21.2, Embedding"}
NORM = "peft_fast-norm"  # in PEFT's own cache of a DoRA layer
FEW = 32  # tokens whose product torch makes about as fast as the compiled kernels

# PEFT's module of DoRA layers, and its variants
_dora = _variants = None


class Plan(NamedTuple):
    """A DoRA layer: what it would be without its magnitude, and that."""

    linear: Sibling
    magnitude: nn.Module

    @property
    def m(self) -> Tensor:
        """(N,)"""
        return self.magnitude._parameters["weight"]


class EmbeddingPlan(NamedTuple):
    """A DoRA embedding as dora_embedding takes it."""

    W: Tensor
    adapter: Adapter
    magnitude: nn.Module
    padding_idx: int | None
    scale: float | Tensor | None


def load() -> None:
    """Imports PEFT's DoRA; must have run before anything else here is called."""
    global _dora, _variants
    if _dora is None:
        from peft.tuners.lora import dora, variants

        _dora, _variants = dora, variants


def active(layer: nn.Module) -> str:
    """The active adapter that has a magnitude; empty if none has."""
    variants = layer.lora_variant
    if not variants or layer._disable_adapters or layer.merged_adapters:
        return ""
    kinds = _variants.DoraLinearVariant, _variants.DoraEmbeddingVariant
    # one with a forward of its own is not what its class is
    known = {name for name, variant in variants.items() if type(variant) in kinds and not vars(variant)}
    return next((name for name in layer.active_adapters if name in known), "")


def plan_of(layer: nn.Module) -> Plan | str:
    """A lora.Linear with an active DoRA adapter -> what dora_linear needs, or why PEFT keeps it; "" without one."""
    if not (name := active(layer)):
        return ""
    found = plan.plan_of(layer, variant=_variants.DoraLinearVariant)
    if type(found) is str:
        return found
    if len(found.adapters) > 1:
        return "several active adapters, one of them DoRA"
    magnitude = layer.lora_magnitude_vector[name]
    N = found.W.shape[1 if found.transposed else 0]
    if found.adapters[0].bias is not None:
        return "lora_B has a bias beside a magnitude"
    if magnitude.fan_in_fan_out is not found.transposed:
        return "the magnitude's fan_in_fan_out is not the base layer's"
    if why := _refuse(magnitude, _dora.DoraLinearLayer, "Linear", N, found.W, found.adapters[0]):
        return why
    if not layer.training:  # PEFT asks the layer, which need not be what its dropout is
        found = found._replace(adapters=[found.adapters[0]._replace(p=0.0)])
    return Plan(found, magnitude)


def run(layer: nn.Module, x: Tensor, found: Plan) -> Tensor:
    """x (..., K) -> y (..., N), by PEFT's own forward where the input is not for dora_linear."""
    # PEFT builds B·A for every token there is, so few of them are no reason
    reason = plan.refuse_input(layer, x, found.linear, few=False)
    if not reason and x.dim() == 1:
        reason = "a single vector: PEFT makes a row of it"
    ledger.count(layer, reason or None)
    if reason:
        return plan.stock_linear(layer, x)
    W, bias, (adapter,), transposed = found.linear
    norm, backend, kept = None, None, norms.pays(layer, W, adapter)
    if not kept or found.magnitude._dora_cache:  # PEFT's own cache is needed only where ours is not, or full by now
        norm = _cached(found.magnitude, W, adapter, transposed, None)
    if kept and norms.few(layer, x, W, adapter, found.m, transposed) and not fresh(adapter.B):
        if norm is not None:
            return dora_decode(x, W, bias, adapter, found.m, norm, transposed=transposed)
        return norms.decode(layer, x, W, bias, adapter, found.m, transposed)
    if kept and norm is None:
        norm = norms.of(layer, W, adapter, transposed)
    if _as_the_base_alone(x, adapter):
        backend, norm = "torch", dora_norm(W, adapter, transposed=transposed) if norm is None else norm
    options = {"transposed": transposed, "exact": settings.get().exact, "backend": backend}
    return dora_linear(x, W, bias, adapter, found.m, norm=norm, **options)


def decode(
    layer: nn.Module, x: Tensor, W: Tensor, bias: Tensor | None, low: tuple[list, ...], m: Tensor
) -> Tensor | None:
    """x (..., K) -> y (..., N) for few tokens, of what decode.py has looked at; the next calls are the compiled one's.

    None: for run().
    """
    (A,), (B,), _, (scaling,) = low
    adapter = Adapter(A, B, scaling)
    if known("Linear") or m.shape != W.shape[:1] or not norms.pays(layer, W, adapter) or fresh(B):
        return None
    ledger.count(layer, None)
    return norms.decode(layer, x, W, bias, adapter, m, False)


def classes() -> tuple[type, type]:
    """PEFT's variant of linear layers, and its module."""
    return _variants.DoraLinearVariant, _dora.DoraLinearLayer


def _as_the_base_alone(x: Tensor, adapter: Adapter) -> bool:
    """Is the base's product to be torch's own? With few tokens in float32 a fresh adapter is compared with none."""
    few = x.dtype is torch.float32 and adapter.p == 0 and x.is_cpu and not torch.is_autocast_enabled("cpu")
    return few and not torch.compiler.is_compiling() and x.shape[:-1].numel() <= FEW


def _cached(magnitude, W, adapter, transposed, dtype):
    """The norm where PEFT was asked to keep it, peft.helpers.DoraCaching, for as long as PEFT does; else None."""
    if not _dora.ENABLE_DORA_CACHING or magnitude.training or torch.compiler.is_compiling():
        if magnitude._dora_cache and not torch.compiler.is_compiling():
            magnitude._cache_clear()
        return None
    norm = magnitude._cache_get(NORM, None)
    if norm is None:
        norm = dora_norm(W, adapter, transposed=transposed, dtype=dtype)
        magnitude._cache_store(NORM, norm)
    return norm


def _refuse(magnitude, kind, name, N, W, adapter) -> str:
    """Why PEFT keeps a layer with this magnitude."""
    if type(magnitude) is not kind or plan.hooked(magnitude):
        return "hooks, a replaced forward or another class of the magnitude"
    m = magnitude._parameters.get("weight")
    if not plan.plain(m) or m.shape != (N,) or m.dtype not in FLOATS:
        return "the magnitude is not a plain dense vector (sharded, parametrized)"
    if m.device != W.device:
        return "magnitude and base weight are on different devices"
    if m.dtype is torch.float64 and W.dtype is not torch.float64:
        return "a magnitude of float64 beside a base that is not"
    return known(name)


def known(name: str) -> str:
    """Why the installed PEFT's DoRA is not one that was read; empty if it is. ``name``: "Linear" or "Embedding"."""
    return _known(name)


# compiled code takes the answer as it is
known._dynamo_marked_constant = True


def embedding_plan_of(layer: nn.Module, plain: Callable) -> EmbeddingPlan | str:
    """A lora.Embedding with an active DoRA adapter -> what dora_embedding needs, or why PEFT keeps it; "" without one.

    ``plain`` is embedding.plan_of, which has the rest of the layer.
    """
    if not (name := active(layer)):
        return ""
    base = plain(layer, variant=_variants.DoraEmbeddingVariant)
    if type(base) is str:
        return base
    if len(base.adapters) > 1:
        return "several active adapters, one of them DoRA"
    magnitude = layer.lora_magnitude_vector[name]
    D = base.W.shape[1]
    if why := _refuse(magnitude, _dora.DoraEmbeddingLayer, "Embedding", D, base.W, base.adapters[0]):
        return why
    return EmbeddingPlan(base.W, base.adapters[0], magnitude, base.padding_idx, base.scale)


def run_embedding(layer: nn.Module, ids: Tensor, found: EmbeddingPlan) -> Tensor:
    """ids (...,) -> y (..., D)."""
    W, adapter, magnitude, padding_idx, scale = found
    dtype = torch.promote_types(W.dtype, adapter.A.dtype)
    norm = _cached(magnitude, W, adapter, True, dtype)
    if norm is None and norms.pays(layer, W, adapter):
        norm = norms.of(layer, W, adapter, True, dtype)
    m = magnitude._parameters["weight"]
    return dora_embedding(ids, W, adapter, m, padding_idx=padding_idx, scale=scale, norm=norm)


def found(layer: nn.Module, plain: Callable) -> Plan | EmbeddingPlan | str:
    """plan_of() or embedding_plan_of(), whatever the layer is; "" for one that is neither."""
    if type(layer) is plan.Linear:
        return plan_of(layer)
    return embedding_plan_of(layer, plain) if type(layer) is plan.Embedding else ""


def choice(found: Plan | EmbeddingPlan) -> dispatch.Choice:
    """What would run the layer on inputs of its base's dtype."""
    if type(found) is EmbeddingPlan:
        W, (A, B, *_), *_ = found
        return dispatch.pick(W, W.dtype, W, [A, B], op="dora_embedding")
    W, bias, (adapter,), _ = found.linear
    others = [adapter.A] if bias is None else [bias, adapter.A]
    exact = settings.get().exact or dispatch.must_be_exact(W.dtype, [adapter.A])
    return dispatch.pick(W, W.dtype, W, others, exact, op="dora_linear")


@functools.cache
def _known(name):
    from peft_fast.patch.known import fingerprint, peft_version

    layer, variant = getattr(_dora, f"Dora{name}Layer"), getattr(_variants, f"Dora{name}Variant")
    functions = variant.forward, layer.forward, layer.get_lora_weight, layer.get_weight_norm, _dora.cache_decorator
    try:
        source = fingerprint(functions)
    except (OSError, TypeError) as error:
        return f"the source of PEFT's {layer.__name__} cannot be read ({error})"
    if source in KNOWN:
        return ""
    return f"PEFT {peft_version()} has a {layer.__name__} that peft_fast does not know ({source})"
