"""Every launcher of kernels/ by name, on meta tensors: what is compiled for each architecture and traced by address."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from peft_fast.kernels import (
    dora_linear,
    dropout,
    lora_decode,
    lora_embedding,
    lora_group,
    lora_linear,
    lora_mlp,
    nf4,
    skinny,
)

Results = tuple[torch.Tensor, ...]
# name -> the row of kernels/tiles.py it takes its tile from
OP_OF = {
    "shrink": "shrink",
    "shrink_outer": "shrink_outer",
    "outer": "outer",
    "expand": "expand",
    "forward": "fused",
    "backward": "fused",
    "group forward": "fused",
    "group backward": "fused",
    "embedding backward": "shrink_outer",
    "decode": "decode",
}
# these have one tile
ONE_TILE = (
    "activate",
    "activate backward",
    "gather",
    "embedding",
    "scatter",
    "dora mix",
    "dora scale",
    "drop",
    "nf4",
    "nf4 nested",
)
WITH_DROPOUT = ("shrink", "outer", "expand", "backward", "group backward", "activate", "activate backward", "drop")
# name -> the dtypes of x, W, H and of the adapters
KINDS = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "f16": (torch.float16, torch.float16),
    "f32": (torch.float32, torch.float32),
    "bf16_f32_adapters": (torch.bfloat16, torch.float32),
}


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
    """Name -> the launch; ``x``, a view, stands for both x (M, K) and g (M, N) if it is given.

    A group is three such layers, of which the second has a quarter of the columns; an embedding's vocabulary is N.
    """
    siblings = (N, N // 4 or 1, N) if x is None else (N,) * 3
    R, ranks, ps, adapter = sum(ranks), tuple(ranks), tuple(ps), adapter or dtype
    plain, scales = (0.0,) * len(ranks), (2.0,) * len(ranks)
    x, g = (empty(M, K, dtype=dtype), empty(M, N, dtype=dtype)) if x is None else (x, x)
    W, bias, H = empty(N, K, dtype=dtype), empty(N, dtype=dtype), empty(M, R, dtype=dtype)
    A, B, seed = empty(R, K, dtype=adapter), empty(N, R, dtype=adapter), empty(len(ranks), dtype=torch.int64)
    none = None, (), ()
    Ws = [empty(n, K, dtype=dtype) for n in siblings]
    biases, gs = [bias, None, bias], [g if n == N else empty(M, n, dtype=dtype) for n in siblings]
    Bs, all_A, all_H = [empty(n, R, dtype=adapter) for n in siblings], A.repeat(3, 1), H.repeat(1, 3)
    many = empty(3 * len(ranks), dtype=torch.int64), ranks * 3, ps * 3
    no_Bs = [B[:, :0] for B in Bs]
    ids, table, scale = empty(M, dtype=torch.int64), empty(N, K, dtype=dtype), empty(2, dtype=torch.float32)
    # an embedding's adapter, whose products are made in its own dtype
    tall, wide, low = empty(K, R, dtype=adapter), empty(R, N, dtype=adapter), empty(M, R, dtype=adapter)
    p = max(ps)
    y, factors = empty(M, N, dtype=dtype), empty(N, dtype=torch.float32)
    packed, code, blocks = empty(-(-N * K // 2), dtype=torch.uint8), empty(16, dtype=torch.float32), -(-N * K // 64)
    nested = empty(256, dtype=torch.float32), empty(-(-blocks // 256), dtype=torch.float32), code[:1], 256
    return {
        "shrink": lambda: (skinny.shrink(x, A, seed, ranks, scales, ps, **options),),
        "shrink_outer": lambda: skinny.shrink_outer(g, B, H, ranks, scales, adapter, **options),
        "outer": lambda: (skinny.outer(x, H, seed, ranks, ps, adapter, **options),),
        "expand": lambda: (lora_linear.expand(H, A, seed, ranks, ps, dtype, **options),),
        "mask": lambda: (dropout.dropout_mask(seed[0], M, K, 0.3),),
        "forward": lambda: (lora_linear.fused(x, W, bias, H, B, None, ranks, plain, dtype, **options),),
        "backward": lambda: (lora_linear.fused(g, W.t(), None, H, A.t(), seed, ranks, ps, dtype, **options),),
        "group forward": lambda: tuple(lora_group.forward(x, Ws, biases, all_H, Bs, **options)),
        "group backward": lambda: (lora_group.backward(gs, Ws, all_H, all_A, *many, dtype, **options),),
        "activate": lambda: (lora_mlp.activate(x, x, seed, "silu", p),),
        "activate backward": lambda: activate_backward(x, x, seed, "silu", p),
        "gather": lambda: (lora_embedding.gather(ids, wide),),
        "embedding": lambda: (lora_embedding.forward(ids, table, low, tall, scale, 2.0),),
        "embedding backward": lambda: skinny.shrink_outer(x, tall, low, (R,), (2.0,), torch.float32, **options),
        "scatter": lambda: (lora_embedding.scatter(ids, low, scale, N, -1, adapter),),
        "decode": lambda: (lora_decode.decode(x, W, bias, A, B, ranks, scales, **options),),
        "dora mix": lambda: (dora_linear.mix(y, y, H, B, factors, bias),),
        "dora scale": lambda: dora_linear.scale(g, y, factors, bias, True, True, True)[:1],
        "drop": lambda: (dora_linear.drop(x, seed[:1], p),),
        "nf4": lambda: (nf4.dequantize(packed, empty(blocks, dtype=torch.float32), code, 64, (N, K), dtype),),
        "nf4 nested": lambda: (nf4.dequantize(packed, packed[:blocks], code, 64, (N, K), dtype, nested),),
        "frozen group forward": lambda: tuple(lora_group.forward(x, Ws, biases, H[:, :0], no_Bs, **options)),
        "frozen group backward": lambda: (lora_group.backward(gs, Ws, None, A[:0], *none, dtype, **options),),
        "frozen forward": lambda: (lora_linear.fused(x, W, bias, None, B[:, :0], *none, dtype, **options),),
        "frozen backward": lambda: (lora_linear.fused(g, W.t(), None, None, A[:0].t(), *none, dtype, **options),),
    }


def activate_backward(dh: torch.Tensor, z: torch.Tensor, seed: torch.Tensor, activation: str, p: float) -> Results:
    """z stands for both operands of the product."""
    dz, du = (torch.empty(z.shape, dtype=z.dtype, device=z.device) for _ in range(2))
    lora_mlp.activate_backward(dh, z, z, dz, du, seed, activation, p)
    return dz, du
