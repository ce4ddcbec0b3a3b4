"""lora_experts by Triton kernels: one launch a product, whatever the routing, and nothing waits for the host.

Adapters are rounded to x's dtype; beside float16, which ends at 6e-8, low-rank rows and their products are float32.
"""

from __future__ import annotations

import torch

from peft_fast.backends.torch import lora_experts as otherwise
from peft_fast.backends.torch.lora_linear import dense_rows, no_autocast
from peft_fast.backends.triton import tuning
from peft_fast.backends.triton.guard import guarded
from peft_fast.backends.triton.lora_linear import MOST_ADAPTERS, takes_tf32


def run_forward(x, W, bias, A, B, routing, spec):
    """As torch/lora_experts.run_forward, on real or meta tensors."""
    x, tf32, tiles = dense_rows(x), takes_tf32(x), tuning.load(x.device.index or 0)
    low = _low(x, spec)
    sources = _sources(routing, spec)
    H = x.new_empty(routing.order.shape[0], 0, dtype=low)
    if spec.ranks:
        ranks, scales = tuple(spec.ranks), tuple(spec.scalings)
        H = kernels().shrink(x, A, routing.counts, sources, ranks, scales, low, tf32, tiles)
    W = W.transpose(1, 2) if spec.transposed else W  # (E, N, K)
    bias = bias if bias is None else dense_rows(bias)
    B = otherwise.by_expert(B.to(x.dtype), A.shape[0])
    return kernels().product(x, W, bias, H, B, routing.counts, sources, tf32, tiles), H


def run_backward(g, x, W, bias, A, B, H, routing, spec, needs):
    """What the operator does, on real or meta tensors; None for what is not needed."""
    g, tf32, tiles = dense_rows(g.to(x.dtype)), takes_tf32(x), tuning.load(x.device.index or 0)
    run, counts, (E, R, K), N = kernels(), routing.counts, A.shape, g.shape[1]
    D, dx, dbias, dA, dB = H, None, None, None, None
    if spec.ranks and (needs[0] or needs[2]):
        Bt = otherwise.by_expert(B.to(x.dtype), E).transpose(1, 2)  # (E, R, N)
        D = run.shrink(g, Bt, counts, None, tuple(spec.ranks), tuple(spec.scalings), H.dtype, tf32, tiles)
    if needs[0]:
        Wt = W if spec.transposed else W.transpose(1, 2)  # (E, K, N)
        dx = run.product(g, Wt, None, D, A.transpose(1, 2), counts, None, tf32, tiles)
        dx = run.collect(dx, routing.inverse, x.shape[0]) if spec.tokens else dx
    if needs[1]:
        dbias = torch.empty_like(bias, memory_format=torch.contiguous_format)
        # sums over rows are products with ones, exact but in TF32
        run.outer(g, g.new_ones(g.shape[0], 1), counts, None, dbias.unsqueeze(1), False, tiles)
    if needs[2]:
        dA = run.outer(dense_rows(x), D, counts, _sources(routing, spec), A.new_empty(E, R, K), tf32, tiles)
    if needs[3]:
        dB = B.new_empty(E, N, R)
        run.outer(g, H, counts, None, dB.transpose(1, 2), tf32, tiles)
    return dx, dbias, dA, None if dB is None else otherwise.by_rank(dB)


def kernels():
    """The kernels, imported at the first call."""
    from peft_fast.kernels import lora_experts

    return lora_experts


def _sources(routing, spec):
    """The row of x that each row reads, if x has one a token."""
    return routing.order // max(routing.k, 1) if spec.tokens else None


def _vendors(x, W, ranks):
    """Calls that need no kernel of ours: nothing to compute, or too many adapters."""
    return not (x.numel() and W.numel()) or len(ranks) > MOST_ADAPTERS


def _signature(what, x, W, A, spec):
    return what, x.device, x.dtype, A.dtype, tuple(W.shape), tuple(spec.ranks), spec.tokens, spec.transposed


def _forward(*tensors):
    x, W, _, A, _, _, spec = tensors
    with no_autocast(x.device.type):
        if _vendors(x, W, spec.ranks):
            return otherwise.run_forward(*tensors)
        return guarded(
            _signature("lora_experts' forward", x, W, A, spec),
            lambda: run_forward(*tensors),
            lambda: otherwise.run_forward(*tensors),
        )


def _backward(*tensors):
    _, x, W, _, A, _, _, _, spec, _ = tensors
    with no_autocast(x.device.type):
        if _vendors(x, W, spec.ranks):
            return otherwise.run_backward(*tensors)
        return guarded(
            _signature("lora_experts' backward", x, W, A, spec),
            lambda: run_backward(*tensors),
            lambda: otherwise.run_backward(*tensors),
        )


def _low(x, spec):
    return torch.float32 if x.dtype == torch.float16 else x.dtype


forward, backward = otherwise.define_as("triton", _forward, _backward, _low)
