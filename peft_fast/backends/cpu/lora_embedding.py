"""lora_embedding by the compiled operators; one call forward, one backward."""

from __future__ import annotations

import torch


def forward(ids, W, A, B, scale, spec):
    """ids (M,), W (V, D), A (r, V), B (D, r), scale (2,) | None -> y (M, D) in W's dtype, H (M, r) = A[:, ids]ᵀ."""
    try:
        return torch.ops.peft_fast.lora_embedding(ids, W, A, B, scale, spec.scaling)
    except RuntimeError as error:
        # the stable ABI has no other exception; F.embedding raises this one
        _, found, rest = str(error).partition("index out of range")
        if found:
            raise IndexError(found + rest.splitlines()[0]) from None
        raise


def backward(g, ids, A, B, H, scale, spec, needs):
    """g (M, D) -> dA (r, V), zero at padding_idx, and dB (D, r); None where ``needs`` (A, B) says so."""
    dA, dB = torch.ops.peft_fast.lora_embedding_backward(
        g, ids, A, B, H, scale, spec.scaling, spec.padding_idx, list(needs)
    )
    return dA if needs[0] else None, dB if needs[1] else None
