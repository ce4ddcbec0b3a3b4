"""y_e = x_e·W_eᵀ + bias_e + Σ s·x_e·A_eᵀ·B_eᵀ for the tokens x_e of each expert e of a mixture, with dx, dA, dB.

W + s·B·A is never built and no gradient has W's size: what an expert without tokens costs is the zeros in dA and dB.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_fast import dispatch, native
from peft_fast.backends import modules
from peft_fast.errors import ShapeError, fail
from peft_fast.ops import prepare
from peft_fast.ops.checks import check_adapter, check_device, check_float, check_kinds
from peft_fast.ops.function import Function
from peft_fast.ops.spec import Adapter, ExpertsSpec, Routing
from peft_fast.reference import lora_experts as reference

backends = modules("lora_experts")
FEW = 16  # rows of an expert from which on a product with packed operands is as fast
MORE = {"amx": 64}  # and where more were measured, by instruction set, of W (E, N, K)


def route_experts(experts: Tensor, count: int) -> Routing:
    """experts (T, k) int, the numbers below ``count`` of the experts that see each token -> Routing.

    Another number is refused on the CPU; elsewhere nothing waits to look, and its row of lora_experts is NaN. Compiled
    code cannot look: there the kernels of the CPU refuse such rows, and the others give NaN.
    """
    if experts.dim() != 2 or experts.dtype not in (torch.int32, torch.int64):
        given = f"experts {tuple(experts.shape)} of {experts.dtype}"
        fail(ShapeError, given, "(T, k) of int64 or int32", "pass the router's choice")
    ids = experts.reshape(-1)
    looks = ids.device.type == "cpu" and not torch.compiler.is_compiling()
    if not looks:  # where looking at values would have to wait for them, or nobody can
        ids = torch.where((ids < 0) | (ids >= count), count, ids)
    ids, order = torch.sort(ids, stable=True)
    if looks and ids.numel() and not 0 <= ids[0] <= ids[-1] < count:
        given = f"experts from {int(ids[0])} to {int(ids[-1])}"
        fail(ShapeError, given, f"numbers from 0 to {count - 1}", "pass the router's choice of these experts")
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    begins = torch.searchsorted(ids, torch.arange(count + 1, dtype=ids.dtype, device=ids.device))
    return Routing(order, inverse, begins.diff(), experts.shape[1])


def lora_experts(
    x: Tensor,
    W: Tensor,
    routing: Routing,
    bias: Tensor | None = None,
    adapters: Sequence[Adapter] = (),
    *,
    tokens: bool = False,
    transposed: bool = False,
    exact: bool = False,
    backend: str | None = None,
) -> Tensor:
    """x (S, K), expert after expert as ``routing`` has them, or (T, K) if ``tokens``; W (E, N, K) or (E, K, N) if
    ``transposed``, bias (E, N), adapters of A (E·r, K) expert after expert and B (N, r·E) rank after rank, which is
    PEFT's layout -> y (S, N) in W's dtype, in which all is computed, autocast or not: so does torch's grouped_mm.

    Adapters may be float32 beside bfloat16 or float16 W, as in lora_linear; they are neither dropped nor biased.
    Source: Hu et al., "LoRA" (arXiv 2106.09685), eq. 3, and PEFT's lora.ParamWrapper for the layout.
    """
    _check(x, W, routing, bias, adapters, tokens, transposed)
    adapters = prepare.number_scalings(list(adapters))
    exact = exact or dispatch.must_be_exact(W.dtype, [a.A for a in adapters])
    others = prepare.tensors_beside_W(adapters, bias)
    name, _, _ = dispatch.pick(x, W.dtype, W, others, exact, backend, "accumulate", op="lora_experts")
    x = x.to(W.dtype)
    if name == "reference" or (W.requires_grad and torch.is_grad_enabled()):
        y = _define(x, W, bias, adapters, routing, tokens, transposed)
    elif name == "cpu" and not _differentiable(x, bias, adapters):
        y = backends[name].infer(x, W, bias, adapters, routing, tokens, transposed, few(transposed))
    else:
        As = [a.A.reshape(W.shape[0], -1, x.shape[1]) for a in adapters]
        if len(As) > 1:
            A, B = torch.cat(As, 1), torch.cat([a.B for a in adapters], 1)
        elif As:
            A, B = As[0], adapters[0].B
        else:  # a stack that no adapter is on
            E, N, K = W.shape[0], W.shape[2 if transposed else 1], x.shape[1]
            A, B = W.new_empty(E, 0, K), W.new_empty(N, 0)
        spec = ExpertsSpec([a.shape[1] for a in As], [a.scaling for a in adapters], tokens, transposed, exact, name)
        y = LoraExperts.apply(x, W, bias, A, B, *routing[:3], spec, routing.k)
    prepare.count_call()
    return y


def few(transposed: bool) -> int:
    """Rows of an expert up to which the compiled kernel reads W as it lies, where nothing wants a gradient."""
    return FEW if transposed else MORE.get(native.isa(), FEW)


def _differentiable(x, bias, adapters):
    tensors = [x, bias, *(t for a in adapters for t in a[:2])]
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class LoraExperts(Function):
    """A (E, R, K), B (N, R·E) rank after rank; saves x as it came, if R > 0, H (S, R) and the routing."""

    @staticmethod
    def forward(ctx, x, W, bias, A, B, order, inverse, counts, spec, k):
        routing = Routing(order, inverse, counts, k)
        y, H = backends[spec.backend].forward(x, W, bias, A, B, routing, spec)
        # without adapters backward asks x for no more than its shape
        kept = x if spec.ranks else x.new_zeros(()).expand(x.shape)
        ctx.save_for_backward(kept, W, bias, A, B, H, order, inverse, counts)
        ctx.spec, ctx.k = spec, k
        return y

    @staticmethod
    def backward(ctx, g):
        x, W, bias, A, B, H, *routing = ctx.saved_tensors
        needs, spec, routing = ctx.needs_input_grad, ctx.spec, Routing(*routing, ctx.k)
        if g is None:
            return (None,) * 10
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return *_differentiable_backward(g, (x, W, bias, A, B), needs, routing, spec), *[None] * 5
        wanted = (needs[0], needs[2], needs[3], needs[4])
        dx, dbias, dA, dB = backends[spec.backend].backward(g, x, W, bias, A, B, H, routing, spec, wanted)
        return dx, None, dbias, dA, dB, *[None] * 5


def combine_experts(z: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """z (S, N) as lora_experts gives it, weights (T, k) -> y (T, N) = Σ_j weights[t, j]·z of the pair, in the promoted
    dtype of both: products round to it, their sum is taken in float32 at least."""
    return Combine.apply(z, weights, routing.order, routing.inverse)


class Combine(Function):
    """Rows are gathered in backward too, where autograd would scatter into zeros."""

    @staticmethod
    def forward(ctx, z, weights, order, inverse):
        ctx.save_for_backward(z, weights, order, inverse)
        return reference.combine(z, weights, inverse)

    @staticmethod
    def backward(ctx, g):
        z, weights, order, inverse = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            y = reference.combine(z, weights, inverse)
            wanted = [t for t, need in zip((z, weights), needs, strict=True) if need]
            grads = iter(torch.autograd.grad(y, wanted, g, create_graph=True, allow_unused=True))
            return *[next(grads) if need else None for need in needs], None, None
        rows = g.index_select(0, order // weights.shape[1]) if any(needs) else None  # (S, N)
        dz = dweights = None
        if needs[0]:
            dz = (rows * weights.reshape(-1)[order].unsqueeze(1)).to(z.dtype)
        if needs[1]:
            dweights = (rows * z).sum(1)[inverse].view(weights.shape).to(weights.dtype)
        return dz, dweights, None, None


def _define(x, W, bias, adapters, routing, tokens, transposed):
    with torch.autocast(x.device.type, enabled=False):
        wide = prepare.at_least_float32(x.dtype)
        adapters = [Adapter(a.A.to(wide), a.B.to(wide), a.scaling) for a in adapters]
        rows = (x[routing.order // routing.k] if tokens else x).to(wide)
        bias, W = None if bias is None else bias.to(wide), W.to(wide)
        run = _every_expert if torch.compiler.is_compiling() else _own_expert
        return run(rows, W, bias, adapters, routing, transposed).to(x.dtype)


def _own_expert(rows, W, bias, adapters, routing, transposed):
    return reference.forward(rows, W, bias, adapters, routing.counts.tolist(), transposed)


def _every_expert(rows, W, bias, adapters, routing, transposed):
    """The same where no counts are known: all rows go to every expert, those of others as zeros."""
    E, S = W.shape[0], rows.shape[0]
    owner = torch.searchsorted(routing.counts.cumsum(0), torch.arange(S, device=rows.device), right=True)
    y = torch.full_like(rows[:, :1], torch.nan)  # rows of no expert
    for e in range(E):
        mine = (owner == e).unsqueeze(1)
        some = [a._replace(A=a.A.unflatten(0, (E, -1))[e], B=a.B[:, e::E]) for a in adapters]
        own = W[e : e + 1], None if bias is None else bias[e : e + 1], some
        y = torch.where(mine, reference.forward(rows.where(mine, 0.0), *own, [S], transposed), y)
    return y


def _differentiable_backward(g, inputs, needs, routing, spec):
    """Gradients that can be differentiated again (create_graph=True): autograd through the definition."""
    x, W, bias, A, B = inputs
    adapters = []
    if spec.ranks:
        splits = A.split(spec.ranks, 1), B.split([r * A.shape[0] for r in spec.ranks], 1)
        adapters = [Adapter(a.flatten(0, 1), b, s) for a, b, s in zip(*splits, spec.scalings, strict=True)]
    else:  # linear in x: its gradient is that at any other
        x = x.detach().requires_grad_(needs[0])
        inputs = x, W, bias, A, B
    y = _define(x, W, bias, adapters, routing, spec.tokens, spec.transposed)
    wanted = [t for t, need in zip(inputs, needs, strict=False) if need]
    grads = iter(torch.autograd.grad(y, wanted, g, create_graph=True, allow_unused=True))
    return [next(grads) if need else None for need in needs[:5]]


def _check(x, W, routing, bias, adapters, tokens, transposed):
    check_kinds(x, W, bias, adapters)
    if W.dim() != 3 or x.dim() != 2 or x.shape[1] != W.shape[1 if transposed else 2]:
        given = f"x {tuple(x.shape)} with W {tuple(W.shape)}, transposed={transposed}"
        fail(ShapeError, given, "x (S, K) and W (E, N, K), or (E, K, N) if transposed", "pass the stack of experts")
    E, N, K = W.shape[0], W.shape[2 if transposed else 1], x.shape[1]
    S = routing.order.shape[0]
    if x.shape[0] != (S // routing.k if tokens and routing.k else S) or routing.counts.shape[0] != E:
        given = f"x of {x.shape[0]} rows, tokens={tokens}, a routing of {S} rows to {routing.counts.shape[0]} experts"
        fail(
            ShapeError,
            given,
            f"as many rows, and {E} experts",
            "pass route_experts(experts, W.shape[0]) of these tokens",
        )
    if bias is not None and bias.shape != (E, N):
        fail(ShapeError, f"bias {tuple(bias.shape)}", f"({E}, {N})", "pass the biases of the same stack as W")
    for label, t in (("x", x), ("W", W), ("bias", bias)):
        if t is not None:
            check_float(label, t)
            check_device(label, t, "x", x)
    check_device("routing", routing.order, "x", x)
    for a in adapters:
        check_adapter(a, K, N, "stack", ("x", x), E, "lora.ParamWrapper")
