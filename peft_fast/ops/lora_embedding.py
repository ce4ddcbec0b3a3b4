"""y = scale·(W[ids] + Σ s·A[:, ids]ᵀ·Bᵀ): the adapter's vectors are gathered, and dA alone has its size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_fast import dispatch
from peft_fast.backends import modules
from peft_fast.ops import prepare
from peft_fast.ops.checks import check_embedding
from peft_fast.ops.function import Function
from peft_fast.ops.spec import Adapter, EmbeddingSpec
from peft_fast.reference import lora_embedding as reference

backends = modules("lora_embedding")


def lora_embedding(
    ids: Tensor,
    W: Tensor,
    adapters: Sequence[Adapter],
    *,
    padding_idx: int | None = None,
    scale: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """ids (...,) int32 or int64, W (V, D), adapters of A (r, V) and B (D, r) -> y (..., D) in W's dtype.

    Adapters are computed in float32 at least, and are neither dropped nor biased, as in PEFT; ``padding_idx`` is the
    token without gradients in W and A, ``scale`` Gemma's, a number or a tensor of one element.
    """
    check_embedding(ids, W, adapters, padding_idx, scale)
    adapters = [_into_B(a) if isinstance(a.scaling, Tensor) else a for a in adapters]
    padding_idx = -1 if padding_idx is None else padding_idx % W.shape[0]
    dtypes = [t.dtype for a in adapters for t in (a.A, a.B)]
    if scale is not None:
        scale = _scales(scale, W, dtypes)
    tensors = [t for a in adapters for t in (a.A, a.B)]
    name, _, _ = dispatch.pick(W, W.dtype, W, tensors, backend=backend, op="lora_embedding")
    if name == "reference" or len(adapters) != 1 or (scale is not None and scale.requires_grad):
        # several adapters side by side would be a copy of size R·V; a scale that trains is nobody's yet
        y = define(ids, W, adapters, padding_idx, scale)
    else:
        ((A, B, scaling, *_),) = adapters
        y = LoraEmbedding.apply(ids, W, A, B, scale, EmbeddingSpec(scaling, padding_idx, name))
    prepare.count_call()
    return y


class LoraEmbedding(Function):
    """Saves ids and H (M, r)."""

    @staticmethod
    def forward(ctx, ids, W, A, B, scale, spec):
        y, H = backends[spec.backend].forward(ids.reshape(-1), W, A, B, scale, spec)
        ctx.save_for_backward(ids, W, A, B, H, scale)
        ctx.spec = spec
        return torch.ops.aten._unsafe_view(y, [*ids.shape, W.shape[1]])  # no view to autograd: callers write in place

    @staticmethod
    def backward(ctx, g):
        ids, W, A, B, H, scale = ctx.saved_tensors
        needs, spec = ctx.needs_input_grad, ctx.spec
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return None, *_differentiable_backward(g, ids, (W, A, B), scale, spec, needs[1:4]), None, None
        ids, g = ids.reshape(-1), g.reshape(-1, W.shape[1])
        dW = None
        if needs[1]:
            scaled = g if scale is None else (g * scale[0]).to(g.dtype)
            dW = torch.ops.aten.embedding_dense_backward(scaled, ids, W.shape[0], spec.padding_idx, False)
        dA, dB = backends[spec.backend].backward(g, ids, A, B, H, scale, spec, needs[2:4])
        return None, dW, dA, dB, None, None


def define(ids: Tensor, W: Tensor, adapters: Sequence[Adapter], padding_idx: int, scale: Tensor | None) -> Tensor:
    """The definition, differentiable."""
    with torch.autocast(W.device.type, enabled=False):
        wide = torch.float64 if W.dtype == torch.float64 else torch.float32
        padding = None if padding_idx < 0 else padding_idx
        return reference.forward(ids, W, adapters, padding, scale, wide).to(W.dtype)


def _into_B(adapter):
    return adapter._replace(B=adapter.B.to(prepare.at_least_float32(adapter.B.dtype)) * adapter.scaling, scaling=1.0)


def _scales(scale, W, dtypes):
    """(2,): the scale as the base's dtype rounds it, and as the adapters' does; a number is the base's in both."""
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=W.dtype, device=W.device)
    wide = prepare.at_least_float32(W.dtype)
    scale = scale.reshape(())
    return torch.stack([scale.to(W.dtype).to(wide), scale.to(dtypes[0] if dtypes else W.dtype).to(wide)])


def _differentiable_backward(g, ids, tensors, scale, spec, needs):
    """Gradients that can be differentiated again (create_graph=True): autograd through the definition."""
    W, A, B = tensors
    y = define(ids, W, [Adapter(A, B, spec.scaling)], spec.padding_idx, scale)
    wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
    grads = iter(torch.autograd.grad(y, wanted, g, create_graph=True, allow_unused=True))
    return [next(grads) if need else None for need in needs]
