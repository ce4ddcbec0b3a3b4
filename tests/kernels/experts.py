"""Every launcher of kernels/lora_experts.py by name, on meta tensors but for the counts, which kernels read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from peft_fast.kernels import lora_experts
from tests.kernels.launches import Results, empty


def launches(
    counts: Sequence[int],
    nobody: int,
    K: int,
    N: int,
    R: int,
    dtype: torch.dtype = torch.bfloat16,
    adapter: torch.dtype | None = None,
    tokens: int = 0,
    x: torch.Tensor | None = None,
) -> dict[str, Callable[[], Results]]:
    """Name -> the launch for experts with so many rows, and ``nobody`` rows of none; ``tokens`` rows of x, if not 0.

    ``x``, a view, stands for both x and g if it is given.
    """
    E, S, adapter = len(counts), sum(counts) + nobody, adapter or dtype
    low = torch.float32 if dtype == torch.float16 else dtype
    x, g = (empty(tokens or S, K, dtype=dtype), empty(S, N, dtype=dtype)) if x is None else (x, x)
    W, bias, H = empty(E, N, K, dtype=dtype), empty(E, N, dtype=dtype), empty(S, R, dtype=low)
    A, B = empty(E, R, K, dtype=adapter), empty(E, N, R, dtype=dtype)
    dA, dB, dbias = empty(E, R, K, dtype=adapter), empty(E, N, R, dtype=adapter), empty(E, 1, N, dtype=dtype)
    places, no_H, no_B, no_A = empty(S, dtype=torch.int64), H[:, :0], B[:, :, :0], A[:, :0].transpose(1, 2)
    sources, counts = places if tokens else None, torch.tensor(counts)
    ranks, scales = (R,), (2.0,)
    op = lora_experts
    return {
        "shrink": lambda: (op.shrink(x, A, counts, sources, ranks, scales, low),),
        "shrink of g": lambda: (op.shrink(g, B.transpose(1, 2), counts, None, ranks, scales, low),),
        "forward": lambda: (op.product(x, W, bias, H, B, counts, sources),),
        "backward": lambda: (op.product(g, W.transpose(1, 2), None, H, A.transpose(1, 2), counts, None),),
        "dA": lambda: (op.outer(x, H, counts, sources, dA),),
        "dB": lambda: (op.outer(g, H, counts, None, dB.transpose(1, 2)),),
        "dbias": lambda: (op.outer(g, empty(S, 1, dtype=dtype), counts, None, dbias),),
        "collect": lambda: (op.collect(empty(S, K, dtype=dtype), places, tokens or S),),
        "frozen forward": lambda: (op.product(x, W, bias, no_H, no_B, counts, sources),),
        "frozen backward": lambda: (op.product(g, W.transpose(1, 2), None, no_H, no_A, counts, None),),
    }
