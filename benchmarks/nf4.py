"""A four-bit weight made dense: our kernel beside bitsandbytes' dequantize_4bit, the stock one. Rows of quantized."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from .criterion import Verdict, check
from .harness import Options, Provider
from .lora_linear import DTYPES

KINDS = ("nf4", "nf4-double")  # of bases, plain and with scales that are quantized themselves
SHAPES = [(1024, 2816), (4096, 4096)]  # K, N


def providers(
    quantized: Callable[[nn.Linear], nn.Module], k: int, n: int, name: str, options: Options
) -> list[Provider]:
    """bitsandbytes' function and ours on the weight of one of its layers."""
    import bitsandbytes as bnb

    from peft_fast.patch import packed

    device, dtype = torch.device(options.device), DTYPES[name]
    torch.manual_seed(0)
    base = nn.Linear(k, n, bias=False, device=device, dtype=dtype)
    nn.init.normal_(base.weight, std=k**-0.5)
    layer = quantized(base).requires_grad_(False)
    packed.settle(layer, torch.empty(1, k, device=device, dtype=dtype))
    W, values, state = packed.base_of(layer).W, layer.weight.data, layer.weight.quant_state
    kept = [values, W.absmax]

    def stock() -> torch.Tensor:
        return bnb.functional.dequantize_4bit(values, state)

    def ours() -> torch.Tensor:
        return W.dense(dtype)

    return [
        Provider("stock", {"forward": stock}, kept),
        Provider("peft_fast", {"forward": ours}, kept, partial(_verdicts, stock, ours, W)),
    ]


def _verdicts(stock: Callable, ours: Callable, W) -> dict[str, Verdict]:
    """Every value against float64's, no further from it than bitsandbytes'."""
    from peft_fast.ops.nf4 import dequantize

    return {"W": check(ours(), stock(), dequantize(W, torch.float64, backend="reference"))}
