"""y = c∘scale·(W[ids] + s·A[:, ids]ᵀ·Bᵀ) with c = m/‖W + s·(B·A)ᵀ‖ of each column, with dA, dB, dm and dW."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_fast import dispatch
from peft_fast.backends import modules
from peft_fast.ops import prepare
from peft_fast.ops.checks import check_embedding
from peft_fast.ops.dora_linear import _factor, _of_norm, check_columns
from peft_fast.ops.dora_norm import dora_norm
from peft_fast.ops.function import Function
from peft_fast.ops.lora_embedding import _into_B, _scales
from peft_fast.ops.spec import Adapter, EmbeddingSpec
from peft_fast.reference import dora_embedding as reference

backends = modules("dora_embedding")


def dora_embedding(
    ids: Tensor,
    W: Tensor,
    adapter: Adapter,
    m: Tensor,
    *,
    padding_idx: int | None = None,
    scale: float | Tensor | None = None,
    norm: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """ids (...,) int32 or int64, W (V, D), an adapter of A (r, V) and B (D, r), m (D,) -> y (..., D) in W's dtype.

    ``norm`` (D,) is that of the columns where the caller has it, as in dora_linear; the rest is lora_embedding's.
    """
    check_embedding(ids, W, [adapter], padding_idx, scale)
    check_columns(m, "m", W, True)
    dtype = torch.promote_types(W.dtype, adapter.A.dtype)
    if isinstance(adapter.scaling, Tensor):
        adapter = _into_B(adapter)
    A, B, scaling, *_ = adapter
    padding_idx = -1 if padding_idx is None else padding_idx % W.shape[0]
    if scale is not None:
        scale = _scales(scale, W, [A.dtype])
    name, _, _ = dispatch.pick(W, W.dtype, W, [A, B], backend=backend, op="dora_embedding")
    if norm is None:
        norm = dora_norm(W, adapter, transposed=True, dtype=dtype, backend=_of_norm(name))
    else:
        check_columns(norm, "norm", W, True)
        norm = norm.detach()
    if name == "reference" or (scale is not None and scale.requires_grad):
        y = define(ids, W, adapter, m, norm, padding_idx, scale)
    else:
        y = DoraEmbedding.apply(ids, W, A, B, m, norm, scale, EmbeddingSpec(scaling, padding_idx, name))
    prepare.count_call()
    return y


class DoraEmbedding(Function):
    """Saves ids and H (M, r)."""

    @staticmethod
    def forward(ctx, ids, W, A, B, m, norm, scale, spec):
        y, H = backends[spec.backend].forward(ids.reshape(-1), W, A, B, _factor(m, norm), scale, spec)
        ctx.save_for_backward(ids, W, A, B, m, norm, H, scale)
        ctx.spec = spec
        return torch.ops.aten._unsafe_view(y, [*ids.shape, W.shape[1]])  # no view to autograd: callers write in place

    @staticmethod
    def backward(ctx, g):
        ids, W, A, B, m, norm, H, scale = ctx.saved_tensors
        needs, spec = ctx.needs_input_grad[1:5], ctx.spec
        if g is None:
            return (None,) * 8
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _differentiable_backward(g, ids, (W, A, B, m), norm, scale, spec, needs)
            return None, *grads, None, None, None
        ids, g = ids.reshape(-1), g.reshape(-1, W.shape[1])
        dW, dA, dB, dm = backends[spec.backend].backward(g, ids, W, A, B, _factor(m, norm), norm, H, scale, spec, needs)
        return None, dW, dA, dB, None if dm is None else dm.to(m.dtype), None, None, None


def define(
    ids: Tensor, W: Tensor, adapter: Adapter, m: Tensor, norm: Tensor, padding_idx: int, scale: Tensor | None
) -> Tensor:
    """The definition, differentiable."""
    with torch.autocast(W.device.type, enabled=False):
        wide = torch.float64 if W.dtype == torch.float64 else torch.float32
        padding = None if padding_idx < 0 else padding_idx
        return reference.forward(ids, W, adapter, m, padding, scale, wide, norm).to(W.dtype)


def _differentiable_backward(g, ids, tensors, norm, scale, spec, needs):
    """Gradients that can be differentiated again (create_graph=True): autograd through the definition."""
    W, A, B, m = tensors
    y = define(ids, W, Adapter(A, B, spec.scaling), m, norm, spec.padding_idx, scale)
    wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
    grads = iter(torch.autograd.grad(y, wanted, g, create_graph=True, allow_unused=True))
    return [next(grads) if need else None for need in needs]
