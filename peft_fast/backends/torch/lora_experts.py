"""lora_experts by vendor GEMMs, expert by expert, each result rounded once: PEFT's W + s·B·A rounds no more than that.

In bfloat16 that is one GEMM of [x | H] and [W | B], whose right side is one expert's and stays in the caches; else the
base GEMM adds into what the adapter wrote, in float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from peft_fast.backends.operators import define, traced

# a module, not its names: whoever imports it first imports this one halfway
from peft_fast.backends.torch import lora_linear as vendor
from peft_fast.ops.spec import ExpertsSpec, Routing

_ROUTING = "Tensor order, Tensor inverse, Tensor counts, SymInt k"
_SPEC = "int[] ranks, float[] scalings, bool tokens, bool transposed, bool exact"
_FORWARD = f"(Tensor x, Tensor W, Tensor? bias, Tensor A, Tensor B, {_ROUTING}, {_SPEC}) -> (Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor g, Tensor x, Tensor W, Tensor? bias, Tensor A, Tensor B, Tensor H, {_ROUTING}, {_SPEC}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


def run_forward(x, W, bias, A, B, routing, spec):
    """x (S, K), or (T, K) if tokens, W, bias (E, N) | None, A (E, R, K), B (N, R·E) -> y (S, N), H (S, R).

    The counts are looked at, which compiled code cannot: to that it is an operator.
    """
    with vendor.no_autocast(x.device.type):
        low = low_dtype(x, spec)
        y = x.new_empty(routing.order.shape[0], B.shape[0])
        x, A, B = rows(x, routing, spec).to(low), A.to(low), by_expert(B.to(low), A.shape[0])
        H = x.new_empty(x.shape[0], A.shape[1])
        side = Side(W, low, not spec.transposed, A.shape[1])
        for e, a, b in spans(routing):
            shrink(x[a:b], A[e].t(), spec, H[a:b])
            side.multiply(e, x[a:b], H[a:b], B[e].t(), y[a:b], None if bias is None else bias[e])
        _mark(y, routing)
    return y, H


def run_backward(g, x, W, bias, A, B, H, routing, spec, needs):
    """g (S, N) -> dx, dbias, dA, dB; None where ``needs`` (x, bias, A, B) says so."""
    with vendor.no_autocast(x.device.type):
        low, tokens = low_dtype(x, spec), x.shape[0]
        dx = x.new_empty(g.shape[0], x.shape[1]) if needs[0] else None
        dbias = torch.zeros_like(bias) if needs[1] else None
        # experts without tokens have zeros
        dA = A.new_zeros(A.shape) if needs[2] else None
        dB = B.new_zeros(A.shape[0], B.shape[0], A.shape[1]) if needs[3] else None
        xs = rows(x, routing, spec).to(low) if needs[2] else None
        g, A, B = g.to(low), A.to(low), by_expert(B.to(low), A.shape[0])
        D = g.new_empty(g.shape[0], A.shape[1])
        side = Side(W, low, spec.transposed, A.shape[1])
        for e, a, b in spans(routing):
            ge, de = g[a:b], D[a:b]
            if needs[0] or needs[2]:
                shrink(ge, B[e], spec, de)
            if needs[0]:
                side.multiply(e, ge, de, A[e], dx[a:b])
            if needs[1]:
                dbias[e] = vendor.bias_gradient(ge, bias)
            if needs[2]:
                dA[e] = de.t() @ xs[a:b]
            if needs[3]:
                dB[e] = ge.t() @ H[a:b]
        if needs[0]:
            _mark(dx, routing)
        if needs[0] and spec.tokens:
            dx = summed(dx, routing, tokens)
    return dx, dbias, dA, None if dB is None else by_rank(dB)


class Side:
    """What the experts' rows are multiplied with: W[e], turned or not, and the other half of an adapter below it."""

    def __init__(self, W, low, turned, rank):
        self.W, self.low, self.turned = W, low, turned
        self.wide = None
        if low == torch.bfloat16 and rank:
            rows, columns = W.shape[1:]
            shape = (rows, columns + rank) if turned else (rows + rank, columns)
            self.wide = torch.empty(shape, dtype=low, device=W.device)

    def multiply(self, e, x, h, b, out, bias=None):
        """x (m, K), h (m, R), b (R, N), bias (N,) -> out (m, N) = x·W[e] + h·b + bias."""
        W, wide = self.W[e], self.wide
        if wide is None:
            W = W.to(self.low)
            W = W.t() if self.turned else W
            if not h.shape[1]:
                out.copy_(x @ W if bias is None else torch.addmm(bias.to(self.low), x, W))
                return
            y = h @ b if bias is None else torch.addmm(bias.to(self.low), h, b)
            out.copy_(y.addmm_(x, W))
            return
        if self.turned:
            wide[:, : W.shape[1]], wide[:, W.shape[1] :] = W, b.t()
            wide = wide.t()
        else:
            wide[: W.shape[0]], wide[W.shape[0] :] = W, b
        left = torch.cat((x, h), 1)
        torch.mm(left, wide, out=out) if bias is None else torch.addmm(bias, left, wide, out=out)


def low_dtype(x, spec):
    """The dtype of all products: float16 ends at 6e-8, so float32 stands for it."""
    return x.dtype if x.dtype == torch.bfloat16 and not spec.exact else torch.promote_types(x.dtype, torch.float32)


def by_expert(B, E):
    """B (N, R·E), rank after rank, -> (E, N, R)."""
    # as a transpose of two dimensions, for which torch has a kernel
    return B.reshape(B.numel() // E, E).t().contiguous().view(E, B.shape[0], B.shape[1] // E)


def by_rank(dB):
    """dB (E, N, R) -> (N, R·E)."""
    E, N, R = dB.shape
    return dB.view(E, N * R).t().contiguous().view(N, R * E)


def rows(x, routing, spec):
    """x as the experts read it, (S, K)."""
    return x.index_select(0, routing.order // routing.k) if spec.tokens else x


def summed(dx, routing, tokens):
    """dx (S, K) of the pairs -> (T, K), the sum over a token's, in float32 at least."""
    return dx.index_select(0, routing.inverse).view(tokens, routing.k, dx.shape[1]).sum(1)


def _mark(t, routing):
    """Rows of no expert, which a routing on a GPU may have, are NaN."""
    t[routing.counts.sum() :].fill_(torch.nan)


def spans(routing):
    """(expert, its first row, its last + 1) of those that have rows."""
    a = 0
    for e, n in enumerate(routing.counts.tolist()):
        if n:
            yield e, a, a + n
        a += n


def shrink(x, A, spec, out):
    """x (m, K), A (K, R) -> out (m, R) = s·x·A."""
    if not spec.scalings:
        return
    scale = spec.scalings[0]
    if spec.scalings.count(scale) == len(spec.scalings):
        # alpha scales the float32 accumulator: one rounding where a product and a multiplication would have two
        torch.addmm(out, x, A, beta=0, alpha=scale, out=out)
        return
    parts = zip(A.split(spec.ranks, 1), out.split(spec.ranks, 1), spec.scalings, strict=True)
    for a, o, s in parts:
        o.copy_(vendor.mm(x, a, s))


def define_as(backend: str, run: Callable, run_back: Callable, low_of: Callable) -> tuple[Callable, Callable]:
    """A backend's forward and backward: run and run_back, or in compiled code the operators that are made of them."""
    name = f"{backend}_lora_experts"

    def spec_of(options):
        return ExpertsSpec(*options, backend)

    def forward_op(x, W, bias, A, B, order, inverse, counts, k, *options):
        return run(x, W, bias, A, B, Routing(order, inverse, counts, k), spec_of(options))

    def backward_op(g, x, W, bias, A, B, H, order, inverse, counts, k, *options):
        *options, needs = options
        grads = run_back(g, x, W, bias, A, B, H, Routing(order, inverse, counts, k), spec_of(options), needs)
        # an operator returns tensors only, and its fake promises contiguous ones
        return tuple(x.new_empty(0) if grad is None else grad.contiguous() for grad in grads)

    def forward_fake(x, W, bias, A, B, order, inverse, counts, k, *options):
        S, low = order.shape[0], low_of(x, spec_of(options))
        return x.new_empty(S, B.shape[0]), x.new_empty(S, A.shape[1], dtype=low)

    def backward_fake(g, x, W, bias, A, B, H, order, inverse, counts, k, *options):
        wanted = zip((x, bias, A, B), options[-1], strict=True)
        return tuple(t.new_empty(t.shape) if need else x.new_empty(0) for t, need in wanted)

    define(name, _FORWARD, forward_op, forward_fake)
    define(f"{name}_backward", _BACKWARD, backward_op, backward_fake)

    def plain(spec):
        return spec.ranks, spec.scalings, spec.tokens, spec.transposed, spec.exact

    def forward(x, W, bias, A, B, routing, spec):
        if traced(x):
            return getattr(torch.ops.peft_fast, name)(x, W, bias, A, B, *routing, *plain(spec))
        return run(x, W, bias, A, B, routing, spec)

    def backward(g, x, W, bias, A, B, H, routing, spec, needs):
        if traced(x):
            operator = getattr(torch.ops.peft_fast, f"{name}_backward")
            grads = operator(g, x, W, bias, A, B, H, *routing, *plain(spec), list(needs))
            return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
        return run_back(g, x, W, bias, A, B, H, routing, spec, needs)

    return forward, backward


forward, backward = define_as("torch", run_forward, run_backward, low_dtype)
