"""dora_linear by the compiled operators; one call forward, one backward.

With dropout the second base product is the first without what was dropped, a few rows of Wᵀ for each token; where more
is dropped than that pays for, both products run, one after the other from one packed W.
"""

from __future__ import annotations

import torch

from peft_fast.backends.torch.lora_linear import rows, weight_gradient
from peft_fast.ops.dropout import dropped
from peft_fast.ops.packing import packed


def forward(x, W, bias, A, B, c, seed, spec, keep):
    """x (..., K), W, bias (N,) | None, A (r, K), B (N, r), c (N,) -> y (..., N), H (M, r), Z (M, N) | None."""
    weight = packed(W, x, spec.transposed, False)
    y, H, Z = torch.ops.peft_fast.dora_linear(x, W, bias, A, B, c, seed, *_plain(spec), keep, weight)
    return y, H, Z if keep else None


def backward(g, x, W, bias, A, B, c, H, Z, norm, seed, spec, needs):
    """g (..., N) -> dx, dW, dbias, dA, dB, dm; None where ``needs`` (x, W, bias, A, B, m) says so."""
    g = g.to(x.dtype)
    weight = packed(W, x, spec.transposed, True) if needs[0] else None
    wanted = [needs[i] for i in (0, 2, 3, 4, 5)]
    dx, dA, dB, dbias, dm = torch.ops.peft_fast.dora_linear_backward(
        g, x, W, A, B, c, H, H if Z is None else Z, seed, *_plain(spec), wanted, spec.dx_dtype == torch.float32, weight
    )
    return (
        dx if needs[0] else None,
        _weight_gradient(rows(x), rows(g), W, c, seed, spec) if needs[1] else None,
        dbias.to(bias.dtype) if needs[2] else None,
        dA if needs[3] else None,
        dB if needs[4] else None,
        dm / norm if needs[5] else None,
    )


def _weight_gradient(x2, g2, W, c, seed, spec):
    if spec.ps[0] == 0:
        return weight_gradient(x2, (g2 * c).to(x2.dtype), W, spec.transposed)
    through = (g2 * (c - 1)).to(x2.dtype)
    dW = weight_gradient(dropped(x2, seed[0], spec.ps[0]), through, W, spec.transposed)
    return dW + weight_gradient(x2, g2, W, spec.transposed)


def _plain(spec):
    return spec.scalings[0], spec.ps[0], spec.transposed
