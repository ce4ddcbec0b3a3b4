"""y[b] = base[b] + s·x[b]·Aᵀ·Bᵀ + s·b_B: rows of one batch with an adapter each, in one pass over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_fast import dispatch
from peft_fast.backends import modules
from peft_fast.errors import DtypeError, SettingsError, ShapeError, fail
from peft_fast.ops import prepare
from peft_fast.ops.checks import FLOATS, check_adapter, check_device, check_float, check_kinds
from peft_fast.ops.function import Function
from peft_fast.ops.spec import Adapter, MixedSpec
from peft_fast.reference import lora_mixed as reference

backends = modules("lora_mixed")
BASE = -1  # the owner of a row that keeps the base's output


def lora_mixed(
    x: Tensor,
    base: Tensor,
    adapters: Sequence[Adapter],
    owners: Sequence[int],
    *,
    padding_idx: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """x (b, ..., K), base (b, ..., N), adapters of A (r, K) and B (N, r), owners[b] -> y (b, ..., N) in base's dtype.

    ``base`` is what the frozen layer gave for the whole batch; it is written into where no gradient is recorded. Row b
    is adapted by ``adapters[owners[b]]``, or keeps the base's bits if owners[b] is -1. Integer x (b, ...) are tokens:
    then A (r, V) is gathered, and ``padding_idx`` has no gradient. Adapters differ in rank, scaling and dtype, are
    computed in their own dtype and float32 at least where sums are kept, and are not dropped (p = 0).
    Raises ShapeError, DtypeError, DeviceError or SettingsError (all PeftFastError).
    Source: PEFT's LoraLayer._mixed_batch_forward; one pass as in Punica (arXiv 2310.18547).
    """
    _check(x, base, adapters, owners, padding_idx)
    return run(x, base, adapters, owners, padding_idx, backend)


def run(
    x: Tensor,
    base: Tensor,
    adapters: Sequence[Adapter],
    owners: Sequence[int],
    padding_idx: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """lora_mixed for arguments that are known to fit."""
    rows: list[list[int]] = [[] for _ in adapters]
    for row, owner in enumerate(owners):
        if owner >= 0:
            rows[owner].append(row)
    adapters = [
        _into_B(a) if isinstance(a.scaling, Tensor) else a for a, own in zip(adapters, rows, strict=True) if own
    ]
    rows = [own for own in rows if own]
    prepare.count_call()
    if not adapters:
        return base
    if x.is_floating_point():
        dtype, _ = prepare.computed_dtype(x)
        x = x.to(dtype)  # autocast's, as the base's own product has it
    tensors = [t for a in adapters for t in (a.A, a.B)]
    # tokens are computed with in the dtype of what they gather
    like = x if x.is_floating_point() else base
    kinds = {t.dtype: t for t in tensors}.values()  # one of each dtype tells as much as all of a crowd
    name, _, _ = dispatch.pick(like, base.dtype, base, kinds, backend=backend, op="lora_mixed")
    order = [row for own in rows for row in own]
    padding_idx = -1 if padding_idx is None else padding_idx % tensors[0].shape[1]
    spec = MixedSpec(order, [len(own) for own in rows], [a.scaling for a in adapters], padding_idx, name)
    As, Bs, biases = ([a[i] for a in adapters] for i in (0, 1, 4))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, base, *tensors, *biases) if t is not None):
        if torch.compiler.is_compiling():  # whose backward no compiler traces
            return _define(x, base, adapters, spec).to(base.dtype)
        return LoraMixed.apply(x, base, spec, *As, *Bs, *biases)
    y = base if base.is_contiguous() else base.contiguous()
    _write(y, x, As, Bs, biases, spec)
    return y


class LoraMixed(Function):
    """For a batch that is differentiated, which is none of inference: exact, through the definition, not fast."""

    @staticmethod
    def forward(ctx, x, base, spec, *tensors):
        y = base.clone(memory_format=torch.contiguous_format)
        n = len(spec.counts)
        _write(y, x, tensors[:n], tensors[n : 2 * n], tensors[2 * n :], spec)
        ctx.save_for_backward(x, *tensors)
        ctx.spec = spec
        return y

    @staticmethod
    def backward(ctx, g):
        (x, *tensors), spec, needs = ctx.saved_tensors, ctx.spec, ctx.needs_input_grad
        n = len(spec.counts)
        leaves = [t for t, need in zip((x, *tensors), (needs[0], *needs[3:]), strict=True) if need]
        grads = iter(())
        if leaves:
            again = torch.is_grad_enabled()
            with torch.enable_grad():
                parts = zip(tensors[:n], tensors[n : 2 * n], spec.scalings, tensors[2 * n :], strict=True)
                adapters = [Adapter(A, B, s, 0.0, bias) for A, B, s, bias in parts]
                low = _define(x, torch.zeros_like(g), adapters, spec)
                grads = iter(torch.autograd.grad(low, leaves, g.to(low.dtype), create_graph=again))
        dx = next(grads) if needs[0] else None
        return dx, g if needs[1] else None, None, *(next(grads) if need else None for need in needs[3:])


def _write(y, x, As, Bs, biases, spec):
    """Adds to y (b, ..., N), contiguous, what its rows' adapters give."""
    if not y.numel():
        return
    if spec.backend == "reference":
        with torch.no_grad():
            adapters = [Adapter(A, B, s, 0.0, c) for A, B, s, c in zip(As, Bs, spec.scalings, biases, strict=True)]
            y.copy_(_define(x, y, adapters, spec))
        return
    tokens = y.shape[1:-1].numel()
    x = x.reshape(y.shape[0], tokens, *x.shape[y.dim() - 1 :])
    backends[spec.backend].forward(y.view(y.shape[0], tokens, y.shape[-1]), x, As, Bs, biases, spec)


def _define(x, base, adapters, spec):
    """The definition, at least float32 throughout."""
    owners = [BASE] * base.shape[0]
    begin = 0
    for i, count in enumerate(spec.counts):
        for row in spec.order[begin : begin + count]:
            owners[row] = i
        begin += count
    with torch.autocast(base.device.type, enabled=False):
        wide = prepare.at_least_float32(base.dtype)
        adapters = [
            Adapter(a.A.to(wide), a.B.to(wide), a.scaling, 0.0, None if a.bias is None else a.bias.to(wide))
            for a in adapters
        ]
        x = x.to(wide) if x.is_floating_point() else x
        padding_idx = None if spec.padding_idx < 0 else spec.padding_idx
        return reference.forward(x, base.to(wide), adapters, owners, padding_idx)


def _into_B(adapter):
    # in float32, so that its value never becomes a constant
    wide = prepare.at_least_float32(adapter.B.dtype)
    bias = None if adapter.bias is None else adapter.bias.to(wide) * adapter.scaling
    return Adapter(adapter.A.to(wide), adapter.B.to(wide) * adapter.scaling, 1.0, adapter.p, bias)


def _check(x, base, adapters, owners, padding_idx):
    check_kinds(x, base, None, adapters)
    floats = x.is_floating_point()
    if x.dtype not in (*FLOATS, torch.int32, torch.int64):
        fail(DtypeError, f"x of {x.dtype}", "float64, float32, bfloat16, float16, or tokens", "convert x")
    check_float("base", base)
    if base.dim() < 2 or x.shape[: x.dim() - floats] != base.shape[:-1]:
        given, need = f"x {tuple(x.shape)}, base {tuple(base.shape)}", "x (b, ..., K) or ids (b, ...), base (b, ..., N)"
        fail(ShapeError, given, need, "pass the base layer's output for x")
    N, K = base.shape[-1], x.shape[-1] if floats else (adapters[0].A.shape[-1] if adapters else 0)
    if len(owners) != base.shape[0] or any(not BASE <= owner < len(adapters) for owner in owners):
        given = f"{len(owners)} owners for {base.shape[0]} rows and {len(adapters)} adapters"
        fail(ShapeError, given, "the number of an adapter, or -1, for each row", "count adapters from 0")
    check_device("x", x, "base", base)
    for a in adapters:
        check_adapter(a, K, N, "layer", ("base", base))
        if a.bias is not None and a.bias.dtype != a.A.dtype:
            fail(DtypeError, f"A {a.A.dtype}, bias {a.bias.dtype}", "one dtype for A, B and bias", "cast the adapter")
        if a.p:
            fail(SettingsError, f"p={a.p}", "p=0: mixed batches are for inference", "call eval() on the model")
    if padding_idx is not None and (floats or not -K <= padding_idx < K):
        fail(ShapeError, f"padding_idx={padding_idx}", f"a token from {-K} to {K - 1}", "pass the embedding's own")
