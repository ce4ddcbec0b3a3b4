"""Sizes of the layers that are measured, tuned and summed up, as data."""

from __future__ import annotations

OPS = ("lora_group", "lora_mlp", "lora_embedding")  # beside lora_linear, each with a benchmark of its own
ALONE = ("lora_experts", "dora_linear", "lora_mixed")  # the same, of ops that have one plan
LAYER = "llama-3-8b-layer"  # of train_step
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
# M, K, N of each layer that reads one x: q/k/v, with grouped queries in the Llamas, and gate/up
GROUPS = {
    "bert-base": [(512, 768, (768, 768, 768)), (2048, 768, (768, 768, 768))],
    "llama-like": [(512, 1024, (1024, 512, 512)), (512, 1024, (2816, 2816)), (2048, 1024, (1024, 512, 512))],
    "llama-3-8b": [(512, 4096, (4096, 1024, 1024))],
}
GPU_GROUPS = {
    "llama-3-8b": [(8192, 4096, (4096, 1024, 1024)), (8192, 4096, (14336, 14336)), (512, 4096, (4096, 1024, 1024))],
    "bert-base": [(8192, 768, (768, 768, 768))],
}
TINY_GROUP = [(48, 64, (96, 32, 40))]
# M, K, inner, activation, kind, with adapters
MLPS = {
    "bert-base": [(512, 768, 3072, "gelu", "plain", True), (512, 768, 3072, "gelu", "plain", False)],
    "llama-like": [(512, 1024, 2816, "silu", "gated", True), (512, 1024, 2816, "silu", "gated", False)],
    "phi-3-like": [(512, 1024, 2816, "silu", "halved", True)],
    "gpt2": [(512, 768, 3072, "gelu_tanh", "plain", True)],
}
GPU_MLPS = {
    "llama-3-8b": [(8192, 4096, 14336, "silu", "gated", True), (512, 4096, 14336, "silu", "gated", True)],
    "bert-base": [(8192, 768, 3072, "gelu", "plain", True)],
}
TINY_MLP = [(48, 64, 96, "silu", "gated", True), (48, 64, 96, "gelu_tanh", "plain", False)]
# of dora_linear by name: what Conv1D has, whose W is (K, N), and an embedding: tokens, vocabulary, width
CONV1D = {"gpt2": [(512, 768, 2304), (512, 768, 3072), (512, 3072, 768)]}
DORA_EMBEDDING = (512, 32000, 1024)
# tokens, vocabulary, width, with Gemma's scale
EMBEDDINGS = {
    "bert-base": (512, 30522, 768, False),
    "llama-like": (512, 128256, 1024, False),
    "gemma-3": (512, 262144, 640, True),
}
GPU_EMBEDDINGS = {"llama-3-8b": (8192, 128256, 4096, False), "gemma-3": (8192, 262144, 1152, True)}
TINY_EMBEDDING = (48, 96, 64)
# tokens, width, an expert's width, experts, of which a token sees so many; -up, -down: that stack alone is adapted;
# one token: as in generation, without gradients
EXPERTS = {
    "qwen3-30b-a3b": (512, 2048, 768, 128, 8),
    "mixtral-like": (512, 1024, 1792, 8, 2),
    "mixtral-like-up": (512, 1024, 1792, 8, 2),
    "mixtral-like-down": (512, 1024, 1792, 8, 2),
    "qwen3-30b-a3b-token": (1, 2048, 768, 128, 8),
    "mixtral-like-token": (1, 1024, 1792, 8, 2),
}
GPU_EXPERTS = {"qwen3-30b-a3b": (8192, 2048, 768, 128, 8), "mixtral-8x7b": (8192, 4096, 14336, 8, 2)}
TINY_EXPERTS = (48, 64, 32, 6, 2)
# shapes of an image or a sequence, channels second, and the channels that a convolution of size 1 makes of it
CONVS = {
    "stable-diffusion-like": [((2, 320, 64, 64), 320), ((2, 640, 32, 32), 640)],
    "resnet-50-like": [((8, 256, 28, 28), 512), ((8, 1024, 14, 14), 256)],
    "conformer-like": [((8, 512, 200), 1024)],
}
TINY_CONV = ((2, 24, 6, 5), 40)
