"""yᵢ = x·Wᵢᵀ + biasᵢ + Σ s·drop(x)·Aᵀ·Bᵀ for each of the linear layers that read one x, the definition."""

from __future__ import annotations

from peft_fast.reference import lora_linear


def forward(x, siblings, masks):
    """x (..., K), siblings of (W, bias, adapters, transposed) -> [y (..., N)] each.

    ``masks`` has the keep-masks of all adapters, sibling after sibling.
    """
    masks = iter(masks)
    return [
        lora_linear.forward(x, W, bias, adapters, [next(masks) for _ in adapters], transposed)
        for W, bias, adapters, transposed in siblings
    ]
