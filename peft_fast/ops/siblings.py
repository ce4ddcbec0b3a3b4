"""Linear layers with one x: checked, made alike, laid flat for autograd, stacked for a backend, run there and back.

"Flat" tensors are every W, every bias, every A, every B, sibling after sibling: each gets its own gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peft_fast.backends import modules
from peft_fast.errors import SettingsError, fail
from peft_fast.ops import prepare
from peft_fast.ops.checks import check_kinds
from peft_fast.ops.spec import Adapter, GroupSpec, Sibling

# torch.compile traces a plain attribute; import_module at the call would break the graph
_lora_group, _lora_linear = modules("lora_group"), modules("lora_linear")


def check_siblings(x: Tensor, siblings: Sequence[Sibling]) -> None:
    """At least one sibling, each of the right kind."""
    if hasattr(siblings, "adapters") or len(siblings) == 0:
        given = "one sibling by itself" if len(siblings) else "no siblings"
        fail(SettingsError, given, "a list of siblings", "pass [Sibling(W, bias, adapters, transposed), …]")
    for s in siblings:
        if not hasattr(s, "adapters"):
            given = f"a sibling of type {type(s).__name__}"
            fail(SettingsError, given, "a peft_fast.ops.Sibling", "pass Sibling(W, bias, adapters, transposed)")
        check_kinds(x, s.W, s.bias, s.adapters)


def alike(siblings: Sequence[Sibling], dtype: torch.dtype) -> tuple[list[Sibling], list[Tensor], bool]:
    """Siblings as a backend takes them, W's of one dtype, A's and B's of one; tensors beside W's; is there dropout?"""
    kinds = {s.W.dtype for s in siblings}
    siblings = [
        s._replace(W=s.W if len(kinds) == 1 else s.W.to(dtype), adapters=prepare.number_scalings(s.adapters))
        for s in siblings
    ]
    adapters = [a for s in siblings for a in s.adapters]
    if len({a.A.dtype for a in adapters}) > 1:
        wide = torch.float64 if any(a.A.dtype == torch.float64 for a in adapters) else torch.float32
        siblings = [
            s._replace(adapters=[a._replace(A=a.A.to(wide), B=a.B.to(wide)) for a in s.adapters]) for s in siblings
        ]
    others = [t for s in siblings for t in prepare.tensors_beside_W(s.adapters, s.bias)]
    return siblings, others, any(a.p > 0 for a in adapters)


def spec_of(siblings: Sequence[Sibling], dx_dtype: torch.dtype, exact: bool, backend: str, plan: str) -> GroupSpec:
    """What a backend needs beside the tensors."""
    adapters = [a for s in siblings for a in s.adapters]
    return GroupSpec(
        [len(s.adapters) for s in siblings],
        [a.A.shape[0] for a in adapters],
        [a.scaling for a in adapters],
        [a.p for a in adapters],
        dx_dtype,
        [s.transposed for s in siblings],
        exact,
        backend,
        plan,
    )


def flat(siblings: Sequence[Sibling]) -> list[Tensor | None]:
    """Every W, every bias with those of the adapters, every A, every B: what the functions below call tensors."""
    adapters = [a for s in siblings for a in s.adapters]
    biases = [prepare.merge_bias(s.bias, s.adapters) for s in siblings]
    return [*(s.W for s in siblings), *biases, *(a.A for a in adapters), *(a.B for a in adapters)]


def run(x: Tensor, tensors: Sequence, seed: Tensor | None, spec: GroupSpec) -> tuple[list[Tensor], Tensor]:
    """x (..., K) -> [y (..., N)] and H (M, R)."""
    Ws, biases, A, Bs = _stacked(x, tensors, spec)
    if len(Ws) == 1:
        y, H = _lora_linear[spec.backend].forward(x, Ws[0], biases[0], A, Bs[0], seed, spec.one())
        return [y], H
    return _lora_group[spec.backend].forward(x, Ws, biases, A, Bs, seed, spec)


def run_backward(
    gs: Sequence,
    x: Tensor,
    tensors: Sequence,
    H: Tensor,
    seed: Tensor | None,
    spec: GroupSpec,
    needs: Sequence[bool],
    needs_x: bool,
    run: Callable | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """gs [(..., N) | None] -> dx and the gradient of each of ``tensors``, None where it is not needed.

    ``run`` stands in for the backward of the only sibling; what it gives for dx is handed on.
    """
    if any(g is None for g in gs):
        return _without_undefined(gs, x, tensors, H, seed, spec, needs, needs_x)
    n, m = len(spec.counts), len(spec.ranks)
    if not m and not any(needs[:n]):
        x = x.new_empty(x.shape)  # its values are not read, and values_of() may have kept none
    Ws, biases, A, Bs = _stacked(x, tensors, spec)
    at = _starts(spec)
    needs_A, needs_B = any(needs[2 * n : 2 * n + m]), needs[2 * n + m :]
    wanted = needs_x, needs[:n], needs[n : 2 * n], needs_A, [any(needs_B[a:b]) for a, b in at]
    if n == 1:
        one = (wanted[0], wanted[1][0], wanted[2][0], needs_A, wanted[4][0])
        run = run or _lora_linear[spec.backend].backward
        dx, dW, dbias, dA, dB = run(gs[0], x, Ws[0], biases[0], A, Bs[0], H, seed, spec.one(), one)
        dWs, dbiases, dBs = [dW], [dbias], [dB]
    else:
        dx, dWs, dbiases, dA, dBs = _lora_group[spec.backend].backward(gs, x, Ws, biases, A, Bs, H, seed, spec, wanted)
    dAs = dA.split(spec.ranks) if needs_A else [None] * m
    split = [
        [dB] * (b - a) if dB is None or b - a == 1 else dB.split(spec.ranks[a:b], 1)
        for dB, (a, b) in zip(dBs, at, strict=True)
        if b > a
    ]
    grads = [*dWs, *dbiases, *dAs, *(d for parts in split for d in parts)]
    return dx, [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def values_of(x: Tensor, spec: GroupSpec, tensors: Sequence) -> Tensor:
    """x, or a tensor of its shape without memory: only adapters and trainable weights need its values in backward."""
    if spec.ranks or any(W.requires_grad for W in tensors[: len(spec.counts)]):
        return x
    return x.new_empty(()).expand(x.shape)


def siblings_of(tensors: Sequence, spec: GroupSpec) -> list[Sibling]:
    """The siblings that flat() laid flat, with one bias each."""
    n, m = len(spec.counts), len(spec.ranks)
    adapters = [
        Adapter(A, B, s, p)
        for A, B, s, p in zip(tensors[2 * n : 2 * n + m], tensors[2 * n + m :], spec.scalings, spec.ps, strict=True)
    ]
    parts = zip(tensors[:n], tensors[n : 2 * n], _starts(spec), spec.transposed, strict=True)
    return [Sibling(W, bias, adapters[a:b], transposed) for W, bias, (a, b), transposed in parts]


def places_of(some: Sequence[int], spec: GroupSpec) -> tuple[list[int], list[int]]:
    """Where the flat tensors of some siblings are, and which adapters theirs are."""
    n, m, at = len(spec.counts), len(spec.ranks), _starts(spec)
    adapters = [j for i in some for j in range(*at[i])]
    places = [*some, *(n + i for i in some), *(2 * n + j for j in adapters), *(2 * n + m + j for j in adapters)]
    return places, adapters


def _starts(spec):
    """(first, last + 1) adapter of each sibling."""
    ends = [sum(spec.counts[: i + 1]) for i in range(len(spec.counts))]
    return [(end - count, end) for end, count in zip(ends, spec.counts, strict=True)]


def _stacked(x, tensors, spec):
    """Flat tensors -> Ws, biases, A (R, K) and, of each sibling, B (N, r), as backends take them."""
    n, m = len(spec.counts), len(spec.ranks)
    As, Bs = tensors[2 * n : 2 * n + m], tensors[2 * n + m :]
    if m == 1:
        A = As[0]
    else:
        A = torch.cat(As) if m else x.new_empty(0, x.shape[-1])
    wide = []
    for W, transposed, (a, b) in zip(tensors[:n], spec.transposed, _starts(spec), strict=True):
        if b - a == 1:
            wide.append(Bs[a])
        else:
            wide.append(torch.cat(Bs[a:b], 1) if b > a else A.new_empty(W.shape[1 if transposed else 0], 0))
    return tensors[:n], tensors[n : 2 * n], A, wide


def _without_undefined(gs, x, tensors, H, seed, spec, needs, needs_x):
    """run_backward for the siblings whose output has a gradient."""
    kept = [i for i, g in enumerate(gs) if g is not None]
    places, adapters = places_of(kept, spec)
    grads = [None] * len(tensors)
    if not kept:
        return None, grads
    columns = H.split(spec.ranks, 1) if spec.ranks else ()
    H = torch.cat([columns[j] for j in adapters], 1) if adapters else H[:, :0]
    seed = None if seed is None or not adapters else torch.stack([seed[j] for j in adapters])
    spec = spec._replace(
        counts=[spec.counts[i] for i in kept],
        ranks=[spec.ranks[j] for j in adapters],
        scalings=[spec.scalings[j] for j in adapters],
        ps=[spec.ps[j] for j in adapters],
        transposed=[spec.transposed[i] for i in kept],
    )
    gs, tensors = [gs[i] for i in kept], [tensors[i] for i in places]
    dx, some = run_backward(gs, x, tensors, H, seed, spec, [needs[i] for i in places], needs_x)
    for i, grad in zip(places, some, strict=True):
        grads[i] = grad
    return dx, grads


def differentiate(
    define: Callable, gs: Sequence, x: Tensor, tensors: Sequence, needs: Sequence, needs_x: bool
) -> tuple:
    """define(x) -> ys: dx and the gradients of ``tensors`` with a graph of their own (create_graph=True)."""
    if needs_x and not x.requires_grad:  # saved without its values, on which no gradient hangs
        x = x.detach().requires_grad_()
    defined = [(y, g) for y, g in zip(define(x), gs, strict=True) if g is not None and y.requires_grad]
    inputs, wanted = [x, *tensors], [needs_x, *needs]
    leaves = [t for t, need in zip(inputs, wanted, strict=True) if need]
    if not defined or not leaves:
        return None, [None] * len(tensors)
    ys, gs = zip(*defined, strict=True)
    grads = iter(torch.autograd.grad(ys, leaves, gs, create_graph=True, allow_unused=True))
    dx, *others = [next(grads) if need else None for need in wanted]
    return dx, others
