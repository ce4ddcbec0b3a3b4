"""One layer with a DoRA adapter: PEFT's lora.Linear with use_dora, stock and accelerated, against a frozen one.

"lora" is the same layer without its magnitude, accelerated: what DoRA costs beyond it.
"""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import torch
from torch import Tensor, nn

from . import gate, machine
from .harness import Case, Options, Provider
from .lora_linear import DTYPES, by_name, live_plans, lora_layer, provider, takes
from .shapes import AWKWARD, GPU_LAYERS, LAYERS, TINY

RANK = 16


def names(device: str) -> tuple[str, ...]:
    """What --model takes on this device."""
    return tuple(LAYERS if device == "cpu" else GPU_LAYERS)


def cases(options: Options) -> list[Case]:
    """A case for each layer, dtype and dropout; float32 for each model's first layer unless it is asked for."""
    gpu, full, tiny = options.device != "cpu", options.scale == "full", options.scale == "tiny"
    dtypes = options.dtypes or (("bf16", "fp32") if full and not gpu else ("bf16",))
    dropouts = options.dropouts or (0.0, 0.05)
    threads = options.threads or (1 if gpu or tiny else machine.cores(),)
    models = options.models or names(options.device)[: 1 if tiny else None]
    rows = []
    for model, dtype, p, t in itertools.product(models, dtypes, dropouts, threads):
        shapes = [shape for shape, _ in (GPU_LAYERS if gpu else LAYERS)[model]]
        if tiny:
            shapes = [TINY]
        elif not full or (dtype == "fp32" and not options.dtypes):
            shapes = shapes[:1]
        ranked = [(shape, RANK) for shape in dict.fromkeys(shapes)]
        if options.gate_only:
            ranked += [(shape, r) for shape, ranks in AWKWARD for r in ranks]
        for (m, k, n), r in ranked:
            facts = {
                "model": model,
                "M": m,
                "K": k,
                "N": n,
                "r": r,
                "dtype": dtype,
                "p": p,
                "shape": f"{m} × {k} × {n}",
            }
            facts["shape"] = f"{m} × {k} × {n}"
            title = f"{model} M={m} K={k} N={n} r={r} {dtype} p={p:g}" + ("" if gpu else f" threads={t}")
            build = partial(providers, (m, k, n), r, dtype, p, options)
            rows.append(Case(title, facts, build, t, seconds=3.0 if gpu else 10.0))
    if gpu:  # each shape once with dropout first: time may end anywhere
        rows.sort(key=lambda case: case.settings["p"] != dropouts[-1])
    return rows


def providers(shape: tuple[int, int, int], r: int, name: str, p: float, options: Options) -> list[Provider]:
    """frozen, stock, lora and peft_fast, adapters in fp32 and in `name`; on a GPU and at toy sizes every backend."""
    m, k, n = shape
    device, dtype = torch.device(options.device), DTYPES[name]
    torch.manual_seed(0)
    x = torch.randn(m, k, device=device).to(dtype).requires_grad_()
    g = torch.randn(m, n, device=device).to(dtype)
    base = nn.Linear(k, n, bias=False, device=device, dtype=dtype).requires_grad_(False)
    nn.init.normal_(base.weight, std=k**-0.5)
    rows = [provider("frozen", base, x, g, [base.weight], [x, base.weight])]
    for fp32 in (True, False) if dtype != torch.float32 else (True,):
        end = "" if fp32 else f" {name}"
        made = partial(lora_layer, base, r, p, fp32)
        stock, lora, ours = made(dora=True), made(fast=True), made(fast=True, dora=True)
        rows += [_row(f"stock{end}", stock, x, g, fast=False)]
        rows += [_row("lora", lora, x, g, fast=True)] if fp32 else []
        rows += [_row(f"peft_fast{end}", ours, x, g, fast=True)]
    if device.type != "cpu" or options.scale == "tiny":
        layer = lora_layer(base, r, p, fp32=name != "fp16", dora=True)
        for backend in dict.fromkeys(backend for backend, _ in live_plans(options.device, options.without)):
            if takes(backend, None, base.weight, gate.adapter(layer), x, "dora_linear"):
                rows += [by_name(_row(f"peft_fast {backend}", layer, x, g, fast=True, run=_op(layer, backend)))]
    if device.type != "cpu":
        return [dataclasses.replace(row, optional=row.name != "frozen") for row in rows]
    return rows


def _row(name: str, layer: nn.Module, x: Tensor, g: Tensor, fast: bool, run=None) -> Provider:
    A, _ = gate.adapter(layer)
    mask = gate.our_mask if fast else gate.torch_mask(A.dtype)
    verdicts = partial(gate.check_layer, layer, x, g, mask, run, fast)
    return provider(name, run or layer, x, g, list(layer.parameters()), [x, *layer.parameters()], verdicts)


def _op(layer: nn.Module, backend: str):
    """The op by itself: no patch, no dispatch, the same arithmetic."""
    from peft_fast.ops import Adapter, dora_linear

    w = gate.weights(layer, torch.float32)
    adapter = Adapter(*gate.adapter(layer), w.scaling, w.p)
    return lambda x: dora_linear(x, w.W, w.bias, adapter, gate.magnitude(layer), backend=backend)
