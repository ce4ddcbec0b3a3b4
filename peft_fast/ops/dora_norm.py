"""‖W + s·B·A‖ of each row, which DoRA's magnitudes are divided by; B·A is never built."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_fast import dispatch
from peft_fast.backends import modules
from peft_fast.ops import prepare
from peft_fast.ops.spec import Adapter
from peft_fast.reference import dora_norm as reference

backends = modules("dora_norm")


def dora_norm(
    W: Tensor,
    adapter: Adapter,
    *,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """W (N, K), or (K, N) if ``transposed``, A (r, K), B (N, r) -> (N,) in float32 at least, without a gradient.

    ``dtype`` is the one that PEFT holds the norm in, A's if none is named: one below float32 rounds it.

    W's own row norms are not kept from step to step: A has changed, so that W is read for W·Aᵀ, and the sum of its
    squares is one more of the r + 1 sums over what was read.
    """
    given = adapter.A.dtype if dtype is None else dtype
    ((A, B, scaling, *_),) = prepare.number_scalings([adapter])
    with torch.no_grad(), torch.autocast(W.device.type, enabled=False):
        wide = torch.promote_types(prepare.at_least_float32(W.dtype), A.dtype)
        if backend not in ("torch", "reference"):
            backend = dispatch.pick(W, W.dtype, W, [A, B], backend=backend, op="dora_norm").backend
        if backend == "reference":
            norm = reference.forward(W.to(wide), A.to(wide), B.to(wide), scaling, transposed)
        else:
            norm = backends[backend].norm(W, A, B, scaling, transposed)
        return norm.to(given).to(wide) if given.itemsize < 4 else norm
