"""A convolution of size 1 with an adapter: PEFT's lora.Conv2d or Conv1d, stock and accelerated, against a frozen one.

The gate judges rows of channels, one for each pixel, as a linear layer has them.
"""

from __future__ import annotations

import itertools
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import gate, machine
from .harness import Case, Options, Provider
from .lora_linear import DTYPES, lora_layer, provider
from .shapes import CONVS, TINY_CONV

RANK = 16
KINDS = {3: nn.Conv1d, 4: nn.Conv2d}
ORDERS = {False: "channels first", True: "channels last"}


def names(device: str) -> tuple[str, ...]:
    """What --model takes on this device."""
    return tuple(CONVS)


def cases(options: Options) -> list[Case]:
    """A case for each shape, order of memory, dtype and dropout that is not left to PEFT."""
    gpu, tiny = options.device != "cpu", options.scale == "tiny"
    dtypes = options.dtypes or (("bf16", "fp32") if options.scale == "full" and not gpu else ("bf16",))
    dropouts, threads = options.dropouts or (0.0, 0.05), options.threads or (1 if gpu or tiny else machine.cores(),)
    rows = []
    models = options.models or names(options.device)[: 1 if tiny else None]
    for model, dtype, p, t in itertools.product(models, dtypes, dropouts, threads):
        shapes = [TINY_CONV] if tiny else CONVS[model]
        for (shape, n), last in itertools.product(shapes, ORDERS):
            if len(shape) == 3 and last or not last and (gpu or dtype == "fp32" and p == 0):
                continue  # sequences have one order; in the other cases channels-first images are PEFT's
            words = f"{' × '.join(map(str, shape))} → {n}" + (f", {ORDERS[last]}" if len(shape) == 4 else "")
            m = shape[0] * torch.Size(shape[2:]).numel()
            facts = {"model": model, "M": m, "K": shape[1], "N": n, "r": RANK, "dtype": dtype, "p": p, "shape": words}
            title = f"{model} {words} r={RANK} {dtype} p={p:g}" + ("" if gpu else f" threads={t}")
            build = partial(providers, shape, n, last, dtype, p, torch.device(options.device))
            rows.append(Case(title, facts, build, t, seconds=3.0 if gpu else 8.0))
    return rows


def providers(shape: tuple[int, ...], n: int, last: bool, name: str, p: float, device: torch.device) -> list[Provider]:
    """frozen, full fine-tuning, stock and peft_fast; adapters in fp32 (PEFT's default) and in `name`."""
    dtype = DTYPES[name]
    torch.manual_seed(0)
    order = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(shape, device=device).to(dtype, memory_format=order).requires_grad_()
    g = torch.randn(shape[0], n, *shape[2:], device=device).to(dtype, memory_format=order)
    base = KINDS[len(shape)](shape[1], n, 1, bias=False, device=device, dtype=dtype).requires_grad_(False)
    nn.init.normal_(base.weight, std=shape[1] ** -0.5)
    if last:
        base.to(memory_format=order)
    full = KINDS[len(shape)](shape[1], n, 1, bias=False, device=device, dtype=dtype)
    full.load_state_dict(base.state_dict())
    plain = {"frozen": base, "full": full}.items()
    rows = [provider(title, conv, x, g, [conv.weight], [x, conv.weight]) for title, conv in plain]
    # what PEFT neither drops nor casts in channels-first order is left to it
    low = dtype != torch.float32 and (last or p > 0)
    for fp32 in (True, False) if low else (True,):
        for title in ("stock", "peft_fast"):
            fast = title == "peft_fast"
            layer = lora_layer(base, RANK, p, fp32, fast)
            verdicts = partial(_verdicts, layer, x, g, fast)
            leaves = [x, *layer.parameters()]
            title += "" if fp32 else f" {name}"
            rows.append(provider(title, layer, x, g, list(layer.parameters()), leaves, verdicts))
    return rows


def _verdicts(layer: nn.Module, x: Tensor, g: Tensor, fast: bool) -> dict[str, gate.Verdict]:
    """y, dx, dA and dB, row by row."""
    A, _ = gate.adapter(layer)

    def run(rows: Tensor) -> Tensor:
        return _rows(layer(_like(rows, x)))

    def torch_mask(rows: Tensor, p: float) -> Tensor:
        # nn.Dropout draws in the image's own order
        ones = torch.ones_like(x, dtype=A.dtype)
        return _rows(F.dropout(ones, p, training=True) != 0)

    mask = gate.our_mask if fast else torch_mask
    x_rows, g_rows = _rows(x.detach()).contiguous(), _rows(g).contiguous()
    return gate.check_op([layer], _formula, run, x_rows, [g_rows], gate.each(mask), fast)


def _formula(x: Tensor, ws: list[gate.Weights], keeps: list[Tensor | None]) -> list[Tensor]:
    """PEFT's own convolutions, of rows (M, C) as images of one pixel."""
    return [gate.lora(x, ws[0], keeps[0], _convolve)]


def _convolve(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x[..., None, None], W[..., None, None], bias).flatten(1)


def _rows(x: Tensor) -> Tensor:
    """(B, C, ...) -> (M, C)"""
    return x.movedim(1, -1).flatten(0, -2)


def _like(rows: Tensor, x: Tensor) -> Tensor:
    """(M, C) -> (B, C, ...) in x's order of memory."""
    image = rows.view(x.shape[0], *x.shape[2:], -1).movedim(-1, 1)
    return image if image.stride() == x.stride() else image.contiguous()
