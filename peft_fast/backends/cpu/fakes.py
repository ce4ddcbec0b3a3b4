"""Shapes and dtypes of the compiled operators, for torch.compile, export and meta tensors."""

from __future__ import annotations

import functools

import torch


@functools.cache
def register() -> None:
    """Registers the fake kernels; needs the operators to be loaded."""
    torch.library.register_fake("peft_fast::lora_linear", _lora_linear)
    torch.library.register_fake("peft_fast::lora_linear_backward", _lora_linear_backward)
    torch.library.register_fake("peft_fast::dropout_mask", _dropout_mask)


def _lora_linear(x, W, bias, A, B, seed, ranks, scalings, ps, transposed, packed=None):
    N = W.shape[1] if transposed else W.shape[0]
    M = 1
    for size in x.shape[:-1]:
        M = M * size
    return x.new_empty(*x.shape[:-1], N), x.new_empty(M, A.shape[0], dtype=torch.float32)


def _lora_linear_backward(g, x, W, A, B, H, seed, ranks, scalings, ps, transposed, needs, wide_dx, packed=None):
    dx = x.new_empty(x.shape if needs[0] else (0,), dtype=torch.float32 if wide_dx else x.dtype)
    dA = A.new_empty(A.shape if needs[3] else (0,))
    dB = B.new_empty(B.shape if needs[4] else (0,))
    dbias = x.new_empty((g.shape[-1] if needs[2] else 0,), dtype=torch.float32)
    return dx, dA, dB, dbias


def _dropout_mask(seed, M, K, p):
    return seed.new_empty(M, K, dtype=torch.bool)
