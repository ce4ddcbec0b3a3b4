"""lora_group by Triton kernels, in one of two plans; all A's are one skinny launch, whatever their masks.

`accumulate`: each y is the vendor's GEMM added into the adapter's output, dx a chain of them on what a kernel wrote.
`fused`: one launch makes every y, and one makes dx.
"""

from __future__ import annotations

import torch

from peft_fast.backends.operators import define, shaped, traced
from peft_fast.backends.torch import lora_group as otherwise
from peft_fast.backends.torch import lora_linear as vendor
from peft_fast.backends.triton import tuning
from peft_fast.backends.triton.guard import guarded
from peft_fast.backends.triton.lora_linear import MOST_ADAPTERS, expand_dx, skinny, takes_tf32
from peft_fast.ops.spec import GroupSpec

_SPEC = "int[] counts, int[] ranks, float[] scalings, float[] ps, bool[] transposed, str plan"
_FORWARD = f"(Tensor x, Tensor[] Ws, Tensor?[] biases, Tensor A, Tensor[] Bs, Tensor? seed, {_SPEC}) -> Tensor[]"
_BACKWARD = (
    "(Tensor[] gs, Tensor x, Tensor[] Ws, Tensor?[] biases, Tensor A, Tensor[] Bs, Tensor H, Tensor? seed,"
    f" {_SPEC}, ScalarType dx_dtype, bool[] needs) -> Tensor[]"
)


def forward(x, Ws, biases, A, Bs, seed, spec):
    """x (..., K), A (R, K), of each sibling W, bias (N,) | None, B (N, r) -> [y (..., N)], H (M, R) in x's dtype."""
    run = torch.ops.peft_fast.triton_lora_group if traced(x) else _forward_op
    *ys, H = run(x, Ws, biases, A, Bs, seed, *_plain(spec))
    return ys, H


def backward(gs, x, Ws, biases, A, Bs, H, seed, spec, needs):
    """gs [(..., N)] -> dx, dWs, dbiases, dA, dBs; None where ``needs`` (x, [W], [bias], A, [B]) says so."""
    run = torch.ops.peft_fast.triton_lora_group_backward if traced(x) else _backward_op
    wanted = _flat(*needs)
    grads = run(gs, x, Ws, biases, A, Bs, H, seed, *_plain(spec), spec.dx_dtype, wanted)
    return _nested([grad if need else None for grad, need in zip(grads, wanted, strict=True)], len(Ws))


def run_forward(x, Ws, biases, A, Bs, seed, spec):
    """What the operator does, on real or meta tensors."""
    x2, tf32, tiles = vendor.dense_rows(x), takes_tf32(x), tuning.load(x.device.index or 0)
    H = x.new_empty(x2.shape[0], 0)
    if spec.ranks:
        H = skinny().shrink(x2, A, seed, tuple(spec.ranks), tuple(spec.scalings), tuple(spec.ps), tf32, tiles)
    if spec.plan == "fused":
        biases = [bias if bias is None else bias.contiguous() for bias in biases]
        ys = group().forward(x2, _weights(x, Ws, spec), biases, H, Bs, tf32, tiles)
    else:
        parts = zip(H.split(spec.widths(), 1), Ws, biases, Bs, spec.transposed, strict=True)
        ys = [vendor.expand(x2, h, W, bias, B.to(x.dtype), t, spec.plan) for h, W, bias, B, t in parts]
    return [shaped(y, x) for y in ys], H


def run_backward(gs, x, Ws, biases, A, Bs, H, seed, spec, needs):
    """What the operator does, on real or meta tensors; None for what is not needed."""
    x2, gs = vendor.dense_rows(x), [vendor.dense_rows(g.to(x.dtype)) for g in gs]
    tf32, tiles = takes_tf32(x), tuning.load(x.device.index or 0)
    D = dx = dA = None
    dBs = [None] * len(gs)
    if spec.ranks and (needs[0] or needs[3] or any(needs[4])):
        # both also where one would do, which is rare: a gradient's bits do not hang on which others are wanted
        D, dBs = _skinny_gradients(gs, Bs, H, spec, tf32, tiles)
    if needs[0]:
        dx = shaped(_dx(gs, D, Ws, A, seed, spec, x, tf32, tiles), x)
    if needs[3] and spec.ranks:
        dA = skinny().outer(x2, D, seed, tuple(spec.ranks), tuple(spec.ps), A.dtype, tf32, tiles)
    parts = zip(gs, Ws, spec.transposed, needs[1], strict=True)
    dWs = [vendor.weight_gradient(x2, g, W, t) if need else None for g, W, t, need in parts]
    dbiases = [vendor.bias_gradient(g, b) if need else None for g, b, need in zip(gs, biases, needs[2], strict=True)]
    return dx, dWs, dbiases, dA, [dB if need else None for dB, need in zip(dBs, needs[4], strict=True)]


def group():
    """The kernels of a group, imported at the first call."""
    from peft_fast.kernels import lora_group

    return lora_group


def _skinny_gradients(gs, Bs, H, spec, tf32, tiles):
    """gs [(M, N)], Bs [(N, r)], H (M, R) -> D (M, R) = [s·g·B], dBs [(N, r)]: one pass over each g."""
    D, dBs, adapter = torch.empty_like(H), [], 0
    parts = zip(gs, Bs, H.split(spec.widths(), 1), D.split(spec.widths(), 1), spec.counts, strict=True)
    for g, B, h, d, count in parts:
        own = slice(adapter, adapter + count)
        adapter += count
        dB = None
        if count:
            ranks, scalings = tuple(spec.ranks[own]), tuple(spec.scalings[own])
            _, dB = skinny().shrink_outer(g, B, h, ranks, scalings, B.dtype, tf32, tiles, d)
        dBs.append(dB)
    return D, dBs


def _dx(gs, D, Ws, A, seed, spec, x, tf32, tiles):
    """gs [(M, N)], D (M, R) | None, Ws as stored, A (R, K) -> dx (M, K)."""
    if spec.plan == "fused":
        ranks, ps = tuple(spec.ranks), tuple(spec.ps)
        return group().backward(gs, _weights(x, Ws, spec), D, A, seed, ranks, ps, spec.dx_dtype, tf32, tiles)
    low = None if D is None else expand_dx(D, A, seed, spec, tf32, tiles)
    return vendor.add_base(low, zip(gs, Ws, spec.transposed, strict=True), spec.dx_dtype)


def _weights(x, Ws, spec):
    """Weights as stored -> [(N, K)] in x's dtype."""
    return [W.to(x.dtype).t() if t else W.to(x.dtype) for W, t in zip(Ws, spec.transposed, strict=True)]


def _plain(spec):
    return spec.counts, spec.ranks, spec.scalings, spec.ps, spec.transposed, spec.plan


def _flat(x, Ws, biases, A, Bs):
    """What backward's results are, one after another."""
    return [x, A, *Ws, *biases, *Bs]


def _nested(flat, n):
    dx, dA, *rest = flat
    return dx, rest[:n], rest[n : 2 * n], dA, rest[2 * n :]


def _vendors(x, Ws, ranks):
    """Calls that need no kernel of ours: nothing to compute, or too many adapters."""
    return not (x.numel() and all(W.numel() for W in Ws)) or len(ranks) > MOST_ADAPTERS


def _signature(what, x, Ws, A, spec):
    shapes = tuple(tuple(W.shape) for W in Ws)
    return what, spec.plan, x.device, x.dtype, A.dtype, shapes, tuple(spec.counts), tuple(spec.ranks), tuple(spec.ps)


def _forward_op(x, Ws, biases, A, Bs, seed, counts, ranks, scalings, ps, transposed, plan):
    spec = GroupSpec(counts, ranks, scalings, ps, x.dtype, transposed, False, "triton", plan)
    tensors, plain = (x, Ws, biases, A, Bs, seed), spec._replace(plan="accumulate")
    with vendor.no_autocast(x.device.type):
        if _vendors(x, Ws, ranks):
            ys, H = otherwise.forward(*tensors, plain)
        else:
            ys, H = guarded(
                _signature("lora_group's forward", x, Ws, A, spec),
                lambda: run_forward(*tensors, spec),
                lambda: otherwise.forward(*tensors, plain),
            )
    return [*ys, H]


def _backward_op(gs, x, Ws, biases, A, Bs, H, seed, counts, ranks, scalings, ps, transposed, plan, dx_dtype, needs):
    spec = GroupSpec(counts, ranks, scalings, ps, dx_dtype, transposed, False, "triton", plan)
    tensors, plain = (gs, x, Ws, biases, A, Bs, H, seed), spec._replace(plan="accumulate")
    nested = _nested(needs, len(Ws))
    with vendor.no_autocast(x.device.type):
        if _vendors(x, Ws, ranks):
            grads = otherwise.backward(*tensors, plain, nested)
        else:
            grads = guarded(
                _signature("lora_group's backward", x, Ws, A, spec),
                lambda: run_backward(*tensors, spec, nested),
                lambda: otherwise.backward(*tensors, plain, nested),
            )
    # an operator returns tensors only, and its fake promises contiguous ones
    return [x.new_empty(0) if grad is None else grad.contiguous() for grad in _flat(*grads)]


def _forward_fake(x, Ws, biases, A, Bs, seed, counts, ranks, scalings, ps, transposed, plan):
    ys = [x.new_empty(*x.shape[:-1], W.shape[1 if t else 0]) for W, t in zip(Ws, transposed, strict=True)]
    M = 1
    for size in x.shape[:-1]:
        M = M * size
    return [*ys, x.new_empty(M, A.shape[0])]


def _backward_fake(gs, x, Ws, biases, A, Bs, H, seed, counts, ranks, scalings, ps, transposed, plan, dx_dtype, needs):
    like = _flat(x, Ws, biases, A, Bs)
    return [
        x.new_empty(t.shape, dtype=dx_dtype if i == 0 else t.dtype) if need else x.new_empty(0)
        for i, (t, need) in enumerate(zip(like, needs, strict=True))
    ]


define("triton_lora_group", _FORWARD, _forward_op, _forward_fake)
define("triton_lora_group_backward", _BACKWARD, _backward_op, _backward_fake)
