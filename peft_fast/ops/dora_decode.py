"""dora_linear for few tokens and no gradients, as when generating: W is read once, the norm is given."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from peft_fast import dispatch, native
from peft_fast.backends import modules
from peft_fast.ops import prepare
from peft_fast.ops.checks import check, check_kinds
from peft_fast.ops.dora_linear import check_columns, dora_linear
from peft_fast.ops.lora_decode import differentiable
from peft_fast.ops.spec import Adapter

backends = modules("dora_decode")


def dora_decode(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    adapter: Adapter,
    m: Tensor,
    norm: Tensor,
    *,
    transposed: bool = False,
    backend: str | None = None,
) -> Tensor:
    """x (..., K), W (N, K) or (K, N) if ``transposed``, bias, m, norm (N,) -> y (..., N) in x's dtype (autocast's).

    Adapters are multiplied in their own dtype, everything is summed in float32 and rounded once. Where no kernel of
    its own runs (other devices and dtypes, dropout, a gradient that is wanted) this is dora_linear, of which it has
    the errors and the source.
    """
    check_kinds(x, W, bias, [adapter])
    dtype, _ = prepare.computed_dtype(x)
    check(x, dtype, W, bias, [adapter], transposed)
    for given, name in (m, "m"), (norm, "norm"):
        check_columns(given, name, W, transposed)
    wanted = differentiable(x, W, bias, [adapter]) or (torch.is_grad_enabled() and m.requires_grad)
    if not wanted and adapter.p == 0 and adapter.bias is None and backend not in ("torch", "reference"):
        others = prepare.tensors_beside_W([adapter], bias)
        name, *_ = dispatch.pick(x, dtype, W, others, backend=backend, op="dora_decode")
        if name in backends and m.dtype in dispatch.CPU_DTYPES:
            prepare.count_call()
            (adapter,) = prepare.number_scalings([adapter])
            return backends[name].forward(x.to(dtype), W.to(dtype), bias, adapter, m, norm, None, transposed)[0]
    return dora_linear(x, W, bias, adapter, m, norm=norm, transposed=transposed, backend=backend)


@functools.lru_cache(maxsize=256)
def probe(K: int) -> Tensor:
    """(K,) in float32, exact in bfloat16: a token whose product tells W + s·B·A from any other.

    It is one token more of a pass that waits for W anyway. Elements of 1 to 2 with signs of their own: what changes
    an element of W by so little that the float32 sum of its row keeps its bits changes the row's norm by less than
    that is rounded. Changes of several elements that cancel in it are not seen: no constant is one of these.
    """
    with torch.inference_mode(False):
        of = torch.Generator("cpu").manual_seed(K)
        size = torch.randint(64, 128, (K,), generator=of, dtype=torch.float32, device="cpu") / 64
        token = size * (torch.randint(0, 2, (K,), generator=of, dtype=torch.float32, device="cpu") * 2 - 1)
        token[0] *= 1 if token.sum() else -1
        return token


def alone(W: Tensor, A: Tensor, B: Tensor, scaling: float, transposed: bool) -> Tensor:
    """What the probe gives by itself, (N,) in float32: by the same kernel, whatever W and the adapter are."""
    N, K = B.shape[0], A.shape[1]
    kind = {"dtype": torch.float32, "device": "cpu"}
    none, m = torch.empty(0, K, **kind), torch.ones(N, **kind)
    run = torch.ops.peft_fast.dora_decode.default
    return run(none, W, None, A, B, scaling, m, m, probe(K), transposed)[1]


def probed(
    x: Tensor, W: Tensor, bias: Tensor | None, adapter: Adapter, m: Tensor, norm: Tensor, transposed: bool
) -> tuple[Tensor, Tensor]:
    """The compiled kernel, for who has looked at every tensor himself -> y, and what the probe gives beside x, (N,)."""
    return backends["cpu"].forward(x, W, bias, adapter, m, norm, probe(x.shape[-1]), transposed)


def keep(layer: object, tokens: int, low: torch.dtype, norm: Tensor, check: Tensor, K: int) -> None:
    """From now on the compiled call of a layer (csrc/call.h) has its norm, until the probe does not give ``check``.

    ``low`` is the dtype of its adapter.
    """
    native.keep(layer, tokens, low is torch.bfloat16, norm, probe(K), check)


def fresh(B: Tensor) -> bool:
    """Is an adapter in float32 or bfloat16 one that was not trained?"""
    return torch.ops.peft_fast.all_zero.default([B])
