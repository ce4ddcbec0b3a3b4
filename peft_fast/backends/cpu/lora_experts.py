"""lora_experts by the compiled operators: each result has one float32 accumulator and is rounded once."""

from __future__ import annotations

import torch

# a module, not its names: whoever imports it first imports this one halfway
from peft_fast.backends.torch import lora_experts as vendor


def forward(x, W, bias, A, B, routing, spec):
    """x (S, K), or (T, K) if tokens, W, bias (E, N) | None, A (E, R, K), B (N, R·E) -> y (S, N), H (S, R) float32."""
    return torch.ops.peft_fast.lora_experts(x, W, bias, A, vendor.by_expert(B, A.shape[0]), *_plain(routing, spec))


def infer(x, W, bias, adapters, routing, tokens, transposed, few):
    """The same without gradients, of A (E·r, K) and B (N, r·E) as they are kept: one call for all experts.

    W is read once, as it lies in memory, where no expert has more than ``few`` rows.
    """
    return torch.ops.peft_fast.lora_experts_infer.default(
        x,
        W,
        bias,
        [a.A for a in adapters],
        [a.B for a in adapters],
        routing.order,
        routing.counts,
        routing.k if tokens else 0,
        [a.scaling for a in adapters],
        transposed,
        few,
    )


def backward(g, x, W, bias, A, B, H, routing, spec, needs):
    """g (S, N) -> dx, dbias, dA, dB; None where ``needs`` (x, bias, A, B) says so."""
    wanted = [needs[0], needs[2], needs[3], needs[1]]
    grads = torch.ops.peft_fast.lora_experts_backward(
        g.to(x.dtype), x, W, A, vendor.by_expert(B, A.shape[0]), H, *_plain(routing, spec), wanted
    )
    dx, dA, dB, dbias = (grad if need else None for grad, need in zip(grads, wanted, strict=True))
    if needs[0] and spec.tokens:
        dx = vendor.summed(dx, routing, x.shape[0])
    return dx, None if dbias is None else dbias.to(bias.dtype), dA, None if dB is None else vendor.by_rank(dB)


def _plain(routing, spec):
    k = routing.k if spec.tokens else 0
    return routing.order, routing.counts, k, spec.ranks, spec.scalings, spec.transposed
