"""Sizes of the layers that are measured, tuned and summed up, as data."""

from __future__ import annotations

SQUARE = (2048, 2048, 2048)  # M, K, N: the shape the project's CPU targets are stated for
GPU_SQUARE = (8192, 4096, 4096)  # and the GPU ones, with r = 16
TINY = (48, 64, 96)
# sizes no tile divides, for --gate-only
AWKWARD = [((37, 127, 129), (2, 17)), ((131, 300, 70), (64, 256))]
# (M, K, N), ranks: BERT-base and a Llama with K/N as in TinyLlama's first billion, 512 tokens
LAYERS = {
    "bert-base": [((512, 768, 768), (8, 16, 64)), ((512, 768, 3072), (16,)), ((512, 3072, 768), (16,))],
    "llama-like": [((512, 1024, 1024), (16,)), ((512, 1024, 2816), (16,)), ((512, 2816, 1024), (16,))],
}
# what a GPU measures, the most important first: time may end anywhere
GPU_LAYERS = {
    "llama-3-8b": [
        ((8192, 4096, 14336), (16,)),
        ((8192, 14336, 4096), (16,)),
        ((8192, 4096, 1024), (16,)),
        ((2048, 4096, 4096), (16,)),
        ((512, 4096, 4096), (16,)),
        ((8192, 4096, 4096), (64, 8, 256)),
        ((16384, 4096, 4096), (16,)),
        ((4096, 4096, 4096), (16,)),
        ((1024, 4096, 4096), (16,)),
    ],
    "bert-base": [((8192, 768, 768), (16,)), ((8192, 768, 3072), (16,)), ((8192, 3072, 768), (16,))],
    "qwen2.5-7b": [
        ((8192, 3584, 18944), (16,)),
        ((8192, 18944, 3584), (16,)),
        ((8192, 3584, 3584), (16,)),
        ((8192, 3584, 512), (16,)),
    ],
}
# (K, N) of the same models: what `tune` looks at unless told otherwise
GPU_PAIRS = tuple(
    dict.fromkeys([GPU_SQUARE[1:], *(shape[1:] for layers in GPU_LAYERS.values() for shape, _ in layers)])
)
