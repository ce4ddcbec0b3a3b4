"""lora_mixed by Triton kernels: two launches for all adapters of a batch, their weights stacked by one copy each."""

from __future__ import annotations

import torch

from peft_fast.backends.torch import lora_mixed as otherwise
from peft_fast.backends.torch.lora_linear import dense_rows, no_autocast
from peft_fast.backends.triton.guard import guarded


def forward(y, x, As, Bs, biases, spec):
    """y (b, T, N) += s·x·Aᵀ·Bᵀ + s·b_B of each row's adapter, x (b, T, K) or ids (b, T)."""
    ranks = tuple(A.shape[0] for A in As)
    signature = "lora_mixed", y.device, y.dtype, x.dtype, As[0].dtype, As[0].shape[1], y.shape[-1], max(ranks)
    with no_autocast(y.device.type):
        guarded(
            signature,
            lambda: run(y, x, As, Bs, biases, spec, ranks),
            lambda: otherwise.forward(y, x, As, Bs, biases, spec),
        )


def run(y, x, As, Bs, biases, spec, ranks):
    """What forward does by kernels; nothing is written to y before the last of them."""
    made = kernels().batch(spec.order, spec.counts, ranks, spec.scalings, y.shape[1])
    made = made._replace(table=made.table.to(y.device, non_blocking=True))
    # adapters of several dtypes meet in the wider one
    A, B = torch.cat(As), torch.cat(Bs, 1)
    tf32 = A.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    if x.is_floating_point():
        H = kernels().shrink(dense_rows(x), A, made, tf32)
    else:
        H = kernels().gather(x.reshape(-1).contiguous(), A, made)
    kernels().expand_(y.flatten(0, 1), H, B, _stacked(biases, B), made, tf32)


def kernels():
    """The kernels, imported at the first call."""
    from peft_fast.kernels import lora_mixed

    return lora_mixed


def _stacked(biases, B):
    """Biases (N,) | None -> (adapters, N), zero for those that have none; None where none has."""
    if all(bias is None for bias in biases):
        return None
    return torch.stack([B.new_zeros(B.shape[0]) if bias is None else bias.to(B.dtype) for bias in biases])
