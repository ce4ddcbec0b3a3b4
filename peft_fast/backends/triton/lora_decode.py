"""lora_decode by Triton kernels: two launches, of which the first reads W and A once."""

from __future__ import annotations

import torch

from peft_fast.backends.operators import define, shaped, traced
from peft_fast.backends.torch import lora_linear as vendor
from peft_fast.backends.triton import tuning
from peft_fast.backends.triton.guard import guarded
from peft_fast.backends.triton.lora_linear import MOST_ADAPTERS, takes_tf32
from peft_fast.ops.prepare import merge_bias
from peft_fast.ops.spec import Spec

_SCHEMA = "(Tensor x, Tensor W, Tensor? bias, Tensor A, Tensor B, int[] ranks, float[] scalings, bool transposed)"


def forward(x, W, bias, adapters, transposed):
    """x (..., K), adapters whose scaling is a number -> y (..., N), rounded once; no gradients."""
    bias = merge_bias(bias, adapters)
    if len(adapters) == 1:
        A, B = adapters[0].A, adapters[0].B
    elif adapters:
        A, B = torch.cat([a.A for a in adapters]), torch.cat([a.B for a in adapters], 1)
    else:
        A, B = x.new_empty(0, x.shape[-1]), x.new_empty(W.shape[1 if transposed else 0], 0)
    run = torch.ops.peft_fast.triton_lora_decode if traced(x) else _op
    return run(x, W, bias, A, B, [a.A.shape[0] for a in adapters], [a.scaling for a in adapters], transposed)


def run_forward(x, W, bias, A, B, ranks, scalings, transposed):
    """What the operator does, on real or meta tensors."""
    A = A.to(torch.promote_types(A.dtype, x.dtype))  # a copy only where x is the wider one
    Wn = W.to(x.dtype).t() if transposed else W.to(x.dtype)  # (N, K)
    bias = bias if bias is None else bias.contiguous()
    tiles = tuning.load(x.device.index or 0)
    y = kernels().decode(vendor.dense_rows(x), Wn, bias, A, B, ranks, scalings, takes_tf32(x), tiles)
    return shaped(y, x)


def kernels():
    """The kernels, imported at the first call."""
    from peft_fast.kernels import lora_decode

    return lora_decode


def _op(x, W, bias, A, B, ranks, scalings, transposed):
    def otherwise():
        spec = Spec(ranks, scalings, [0.0] * len(ranks), x.dtype, transposed, True, "torch", "accumulate")
        return vendor.forward(x, W, bias, A, B, None, spec)[0]

    with vendor.no_autocast(x.device.type):
        if not (x.numel() and W.numel()) or len(ranks) > MOST_ADAPTERS:
            return otherwise()
        return guarded(
            ("lora_decode", x.device, x.dtype, A.dtype, tuple(W.shape), transposed, tuple(ranks)),
            lambda: run_forward(x, W, bias, A, B, ranks, scalings, transposed),
            otherwise,
        )


def _fake(x, W, bias, A, B, ranks, scalings, transposed):
    return x.new_empty(*x.shape[:-1], W.shape[1 if transposed else 0])


define("triton_lora_decode", f"{_SCHEMA} -> Tensor", _op, _fake)
