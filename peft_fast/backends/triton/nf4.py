"""nf4 by one Triton kernel."""

from __future__ import annotations

import torch

from peft_fast.backends.operators import define, traced
from peft_fast.backends.torch import nf4 as otherwise
from peft_fast.backends.triton.guard import guarded

_SCHEMA = (
    "(Tensor data, Tensor absmax, Tensor code, SymInt size, SymInt N, SymInt K, Tensor? inner, Tensor? outer,"
    " Tensor? offset, SymInt inner_size, ScalarType dtype) -> Tensor"
)


def dequantize(W, dtype):
    """Packed -> (N, K) in ``dtype``: float32, bfloat16 or float16."""
    data, nested = W.data.reshape(-1).view(torch.uint8), W.nested or (None, None, None, 1)
    run = torch.ops.peft_fast.triton_nf4 if traced(data) else _op
    return run(data, W.absmax.reshape(-1), W.code, W.blocksize, *W.shape, *nested, dtype)


def kernels():
    """The kernels, imported at the first call."""
    from peft_fast.kernels import nf4

    return nf4


def _op(data, absmax, code, size, N, K, inner, outer, offset, inner_size, dtype):
    from peft_fast.ops.nf4 import Nested, Packed

    nested = None if inner is None else Nested(inner.contiguous(), outer.contiguous(), offset, inner_size)
    W = Packed(data.contiguous(), absmax.contiguous(), code.contiguous(), size, (N, K), nested)
    return guarded(
        ("nf4", data.device, dtype, size, inner_size),
        lambda: kernels().dequantize(*W[:4], W.shape, dtype, nested),
        lambda: otherwise.dequantize(W, dtype),
    )


def _fake(data, absmax, code, size, N, K, inner, outer, offset, inner_size, dtype):
    return code.new_empty(N, K, dtype=dtype)


define("triton_nf4", _SCHEMA, _op, _fake)
