"""Every launcher of kernels/ by name, on meta tensors: what is compiled for each architecture and traced by address."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from peft_fast.kernels import dropout, lora_linear, skinny

Results = tuple[torch.Tensor, ...]
# name -> the row of kernels/tiles.py it takes its tile from
OP_OF = {
    "shrink": "shrink",
    "shrink_outer": "shrink_outer",
    "outer": "outer",
    "expand": "expand",
    "forward": "fused",
    "backward": "fused",
}
WITH_DROPOUT = ("shrink", "outer", "expand", "backward")


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(
    M: int,
    K: int,
    N: int,
    ranks: Sequence[int],
    ps: Sequence[float],
    dtype: torch.dtype = torch.bfloat16,
    adapter: torch.dtype | None = None,
    x: torch.Tensor | None = None,
    **options: object,
) -> dict[str, Callable[[], Results]]:
    """Name -> the launch; ``x``, a view, stands for both x (M, K) and g (M, N) if it is given."""
    R, ranks, ps, adapter = sum(ranks), tuple(ranks), tuple(ps), adapter or dtype
    plain, scales = (0.0,) * len(ranks), (2.0,) * len(ranks)
    x, g = (empty(M, K, dtype=dtype), empty(M, N, dtype=dtype)) if x is None else (x, x)
    W, bias, H = empty(N, K, dtype=dtype), empty(N, dtype=dtype), empty(M, R, dtype=dtype)
    A, B, seed = empty(R, K, dtype=adapter), empty(N, R, dtype=adapter), empty(len(ranks), dtype=torch.int64)
    none = None, (), ()
    return {
        "shrink": lambda: (skinny.shrink(x, A, seed, ranks, scales, ps, **options),),
        "shrink_outer": lambda: skinny.shrink_outer(g, B, H, ranks, scales, adapter, **options),
        "outer": lambda: (skinny.outer(x, H, seed, ranks, ps, adapter, **options),),
        "expand": lambda: (lora_linear.expand(H, A, seed, ranks, ps, dtype, **options),),
        "mask": lambda: (dropout.dropout_mask(seed[0], M, K, 0.3),),
        "forward": lambda: (lora_linear.fused(x, W, bias, H, B, None, ranks, plain, dtype, **options),),
        "backward": lambda: (lora_linear.fused(g, W.t(), None, H, A.t(), seed, ranks, ps, dtype, **options),),
        "frozen forward": lambda: (lora_linear.fused(x, W, bias, None, B[:, :0], *none, dtype, **options),),
        "frozen backward": lambda: (lora_linear.fused(g, W.t(), None, None, A[:0].t(), *none, dtype, **options),),
    }
