"""lora_embedding by Triton kernels: r-vectors gathered, y in one pass over W's rows, dA summed by sorted token.

The low-rank products are made in A's dtype, which is PEFT's. No atomics: two runs give the same bits.
"""

from __future__ import annotations

import torch

from peft_fast.backends.operators import define, traced
from peft_fast.backends.torch import lora_embedding as otherwise
from peft_fast.backends.torch.lora_linear import dense_rows, no_autocast
from peft_fast.backends.triton import tuning
from peft_fast.backends.triton.guard import guarded
from peft_fast.backends.triton.lora_linear import skinny, takes_tf32
from peft_fast.ops.spec import EmbeddingSpec

_FORWARD = "(Tensor ids, Tensor W, Tensor A, Tensor B, Tensor? scale, float scaling) -> (Tensor, Tensor)"
_BACKWARD = (
    "(Tensor g, Tensor ids, Tensor A, Tensor B, Tensor H, Tensor? scale, float scaling, SymInt padding_idx,"
    " bool[] needs) -> (Tensor, Tensor)"
)


def forward(ids, W, A, B, scale, spec):
    """ids (M,), W (V, D), A (r, V), B (D, r), scale (2,) | None -> y (M, D) in W's dtype, H (M, r) = A[:, ids]ᵀ."""
    run = torch.ops.peft_fast.triton_lora_embedding if traced(W) else _forward_op
    return run(ids, W, A, B, scale, spec.scaling)


def backward(g, ids, A, B, H, scale, spec, needs):
    """g (M, D) -> dA (r, V), zero at padding_idx, and dB (D, r); None where ``needs`` (A, B) says so."""
    run = torch.ops.peft_fast.triton_lora_embedding_backward if traced(g) else _backward_op
    grads = run(g, ids, A, B, H, scale, spec.scaling, spec.padding_idx, list(needs))
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def run_forward(ids, W, A, B, scale, spec):
    """What the operator does, on real or meta tensors."""
    ids = ids.contiguous()
    H = kernels().gather(ids, A)
    return kernels().forward(ids, W, H, B, scale, spec.scaling, takes_tf32(H)), H


def run_backward(g, ids, A, B, H, scale, spec, needs):
    """What the operator does, on real or meta tensors; None for what is not needed."""
    tf32, tiles, ranks = takes_tf32(H), tuning.load(g.device.index or 0), (A.shape[0],)
    # a scale is a number of the device: it multiplies sums, before they are rounded
    D, dB = skinny().shrink_outer(dense_rows(g), B, H, ranks, (spec.scaling,), torch.float32, tf32, tiles)
    factor = spec.scaling if scale is None else scale[1] * spec.scaling
    dB = (dB * factor).to(B.dtype) if needs[1] else None
    dA = kernels().scatter(ids, D, scale, A.shape[1], spec.padding_idx, A.dtype) if needs[0] else None
    return dA, dB


def kernels():
    """The kernels, imported at the first call."""
    from peft_fast.kernels import lora_embedding

    return lora_embedding


def _signature(what, dtype, A, B):
    return what, A.device, dtype, A.dtype, tuple(A.shape), tuple(B.shape)


def _forward_op(ids, W, A, B, scale, scaling):
    spec = EmbeddingSpec(scaling, -1, "triton")
    with no_autocast(W.device.type):
        return guarded(
            _signature("lora_embedding's forward", W.dtype, A, B),
            lambda: run_forward(ids, W, A, B, scale, spec),
            lambda: otherwise.forward(ids, W, A, B, scale, spec),
        )


def _backward_op(g, ids, A, B, H, scale, scaling, padding_idx, needs):
    spec = EmbeddingSpec(scaling, padding_idx, "triton")
    with no_autocast(g.device.type):
        grads = guarded(
            _signature("lora_embedding's backward", g.dtype, A, B),
            lambda: run_backward(g, ids, A, B, H, scale, spec, needs),
            lambda: otherwise.backward(g, ids, A, B, H, scale, spec, needs),
        )
    # an operator returns tensors only, and its fake promises contiguous ones
    return tuple(g.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


def _forward_fake(ids, W, A, B, scale, scaling):
    return W.new_empty(ids.shape[0], W.shape[1]), A.new_empty(ids.shape[0], A.shape[0])


def _backward_fake(g, ids, A, B, H, scale, scaling, padding_idx, needs):
    return tuple(t.new_empty(t.shape) if need else g.new_empty(0) for t, need in zip((A, B), needs, strict=True))


define("triton_lora_embedding", _FORWARD, _forward_op, _forward_fake)
define("triton_lora_embedding_backward", _BACKWARD, _backward_op, _backward_fake)
