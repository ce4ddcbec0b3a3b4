"""y = x·Wᵀ + bias + (c−1)∘drop(x)·Wᵀ + c∘s·drop(x)·Aᵀ·Bᵀ, c = m/‖W + s·B·A‖, with dx, dA, dB, dm, dbias, dW.

Without dropout that is y = c∘(x·Wᵀ + s·x·Aᵀ·Bᵀ) + bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_fast import dispatch
from peft_fast.backends import modules
from peft_fast.errors import DeviceError, DtypeError, SettingsError, ShapeError, fail
from peft_fast.ops import prepare
from peft_fast.ops.checks import FLOATS, check, check_kinds
from peft_fast.ops.dora_norm import dora_norm
from peft_fast.ops.dropout import draw_seed
from peft_fast.ops.function import Function
from peft_fast.ops.spec import Adapter, Sibling, Spec
from peft_fast.reference import dora_linear as reference

backends = modules("dora_linear")


def dora_linear(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    adapter: Adapter,
    m: Tensor,
    *,
    norm: Tensor | None = None,
    transposed: bool = False,
    exact: bool = False,
    backend: str | None = None,
) -> Tensor:
    """x (..., K), W (N, K) or (K, N) if ``transposed``, bias (N,), m (N,) -> y (..., N) in x's dtype (autocast's).

    ``norm`` (N,) is that of the rows of W + s·B·A where the caller has it. It is a constant to autograd, and rounds to
    the dtype of adapters below float32: a fresh adapter, whose m is that norm, then changes nothing bit for bit.
    Dtypes, ``exact`` and errors are lora_linear's.
    Source: Liu et al., "DoRA" (arXiv 2402.09353), eq. 5 and section 4.3, and PEFT's DoraLinearVariant for dropout.
    """
    check_kinds(x, W, bias, [adapter])
    dtype, autocast = prepare.computed_dtype(x)
    check(x, dtype, W, bias, [adapter], transposed)
    check_columns(m, "m", W, transposed)
    if adapter.bias is not None:
        fail(SettingsError, "an adapter with a bias", "one without, as PEFT's with use_dora", "leave it out")
    exact = exact or (not autocast and dispatch.must_be_exact(dtype, [adapter.A]))
    others = prepare.tensors_beside_W([adapter], bias)
    dropout = adapter.p > 0
    name, plan, _ = dispatch.pick(x, dtype, W, others, exact, backend, op="dora_linear")
    seed = draw_seed(1, x.device) if dropout else None
    if norm is None:
        norm = dora_norm(W, adapter, transposed=transposed, backend=_of_norm(name))
    else:
        check_columns(norm, "norm", W, transposed)
        norm = norm.detach()
    (adapter,) = prepare.number_scalings([adapter])
    if name == "reference":
        y = _reference(x.to(dtype), Sibling(W, bias, [adapter], transposed), m, norm, seed)
    else:
        spec = Spec([adapter.A.shape[0]], [adapter.scaling], [adapter.p], x.dtype, transposed, exact, name, plan)
        x, uncast = prepare.narrowed(x, dtype)
        # asked here, as a Function runs without gradients: m.requires_grad alone would keep P in every evaluation
        keep = torch.is_grad_enabled() and m.requires_grad
        y = DoraLinear.apply(x, W, bias, adapter.A, adapter.B, m, norm, seed, spec, uncast, keep)
    prepare.count_call()
    return y


class DoraLinear(Function):
    """Saves x, H (M, r) and, for a magnitude that trains, P (M, N), which its scale is applied to."""

    @staticmethod
    def forward(ctx, x, W, bias, A, B, m, norm, seed, spec, uncast, keep):
        c = _factor(m, norm)
        y, H, P = backends[spec.backend].forward(x, W, bias, A, B, c, seed, spec, keep)
        ctx.save_for_backward(x, W, bias, A, B, m, norm, H, P, seed)
        ctx.spec = spec
        return y

    @staticmethod
    def backward(ctx, g):
        x, W, bias, A, B, m, norm, H, P, seed = ctx.saved_tensors
        needs, spec = ctx.needs_input_grad, ctx.spec
        if g is None:
            return (None,) * 11
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _differentiable_backward(g, (x, W, bias, A, B, m), needs, norm, seed, spec)
            return *grads, None, None, None, None, None
        wanted = (needs[0] or needs[9], *needs[1:6])
        c = _factor(m, norm)
        dx, *grads, dm = backends[spec.backend].backward(g, x, W, bias, A, B, c, H, P, norm, seed, spec, wanted)
        dx, uncast = prepare.dx_of(dx, needs[9])
        return dx, *grads, None if dm is None else dm.to(m.dtype), None, None, None, uncast, None


def check_columns(t: Tensor, name: str, W: Tensor, transposed: bool) -> None:
    """m, or the norm, fits W."""
    N = W.shape[1 if transposed else 0]
    if not isinstance(t, Tensor) or t.shape != (N,):
        given = f"{name} {tuple(t.shape)}" if isinstance(t, Tensor) else f"{name} of type {type(t).__name__}"
        fail(ShapeError, given, f"a tensor ({N},)", "pass the weight of PEFT's lora_magnitude_vector")
    if t.dtype not in FLOATS:
        fail(DtypeError, f"{name} of {t.dtype}", "float64, float32, bfloat16 or float16", f"cast {name}")
    if t.device != W.device:
        fail(DeviceError, f"{name} on {t.device}, W on {W.device}", "one device for both", "move them together")


def _of_norm(backend):
    """The backend of the norm of who runs the rest: no GPU's plan is asked for, and its own is not named by name."""
    return backend if backend in ("torch", "reference") else None


def _factor(m, norm):
    """c = m/norm (N,), in float32 at least."""
    return m.to(torch.promote_types(m.dtype, norm.dtype)) / norm


def _reference(x, sibling, m, norm, seed):
    with torch.autocast(x.device.type, enabled=False):
        mask = prepare.masks(x, seed, [sibling.adapters[0].p])[0]
        W, bias, (adapter,), transposed = prepare.widened(sibling, x.dtype)
        wide = prepare.at_least_float32(x.dtype)
        m, norm = m.to(wide), norm.to(wide)
        return reference.forward(x.to(wide), W, bias, adapter, m, mask, transposed, norm).to(x.dtype)


def _differentiable_backward(g, inputs, needs, norm, seed, spec):
    """Gradients that can be differentiated again (create_graph=True): autograd through the definition."""
    x, W, bias, A, B, m = inputs
    adapter = Adapter(A, B, spec.scalings[0], spec.ps[0])
    y = _reference(x, Sibling(W, bias, [adapter], spec.transposed), m, norm, seed)
    wanted = [t for t, need in zip(inputs, needs, strict=False) if need]
    grads = iter(torch.autograd.grad(y, wanted, g, create_graph=True, allow_unused=True))
    return [next(grads) if need else None for need in needs[:6]]
