"""One layer with a DoRA adapter: PEFT's lora.Linear with use_dora, stock and accelerated, against a frozen one.

"lora" is the same layer without its magnitude, accelerated: what DoRA costs beyond it. By name also Conv1D, an
embedding, and single tokens as in generation, without gradients; "cached" is a layer inside PEFT's DoraCaching.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from . import dora, dora_embedding, gate, machine
from .harness import Case, Options, Provider
from .lora_linear import DTYPES, by_name, inference, live_plans, lora_layer, provider, takes
from .shapes import AWKWARD, CONV1D, DORA_EMBEDDING, GPU_LAYERS, LAYERS, TINY, TINY_EMBEDDING

RANK = 16
TOKEN = "-token"


def names(device: str) -> tuple[str, ...]:
    """What --model takes on this device."""
    usual = _layers(device)
    return (*usual, *CONV1D, "embedding", *(f"{model}{TOKEN}" for model in (*usual, *CONV1D, "embedding")))


def _layers(device: str) -> dict[str, list]:
    return LAYERS if device == "cpu" else GPU_LAYERS


def cases(options: Options) -> list[Case]:
    """A case for each layer, dtype and dropout; float32 for each model's first layer unless it is asked for."""
    gpu, full, tiny = options.device != "cpu", options.scale == "full", options.scale == "tiny"
    dtypes = options.dtypes or (("bf16", "fp32") if full and not gpu else ("bf16",))
    dropouts = options.dropouts or (0.0, 0.05)
    threads = options.threads or (1 if gpu or tiny else machine.cores(),)
    models = options.models or tuple(_layers(options.device))[: 1 if tiny else None]
    rows = []
    for model, dtype in itertools.product(models, dtypes):
        ps = dropouts if model in _layers(options.device) or model in CONV1D else (0.0,)
        for p, t in itertools.product(ps, threads):
            end = f"{dtype} p={p:g}" + ("" if gpu else f" threads={t}")
            for r, sizes, words, build in _rows(model, dtype, p, options):
                title = f"{model} {words} r={r} {end}"
                facts = {"model": model, **sizes, "r": r, "dtype": dtype, "p": p}
                baseline = "stock" if model == "embedding" else "frozen"
                how = {"seconds": 3.0 if gpu else 10.0, "baseline": baseline, "as_used": model.endswith(TOKEN)}
                rows.append(Case(title, facts, build, t, **how))
    if gpu:  # each shape once with dropout first: time may end anywhere
        rows.sort(key=lambda case: case.settings["p"] != dropouts[-1])
    return rows


def _rows(model: str, dtype: str, p: float, options: Options) -> list[tuple[int, dict, str, Callable]]:
    """(rank, sizes, words for the title, how its providers are made) of each row of a model."""
    one, of = model.endswith(TOKEN), model.removesuffix(TOKEN)
    if of == "embedding":
        m, v, d = TINY_EMBEDDING if options.scale == "tiny" else DORA_EMBEDDING
        m = 1 if one else m
        words = f"{m} of {v} × {d}"
        return [(RANK, {"M": m, "shape": words}, words, partial(dora_embedding.providers, m, v, d, dtype, options))]
    shapes = CONV1D[of] if of in CONV1D else [shape for shape, _ in _layers(options.device)[of]]
    if options.scale == "tiny":
        shapes = [TINY]
    elif options.scale != "full" or (dtype == "fp32" and not options.dtypes):
        shapes = shapes[:1]
    ranked = [(shape, RANK) for shape in dict.fromkeys((1, *s[1:]) if one else s for s in shapes)]
    if options.gate_only and not one:
        ranked += [(shape, r) for shape, ranks in AWKWARD for r in ranks]
    rows = []
    for (m, k, n), r in ranked:
        sizes = {"M": m, "K": k, "N": n, "shape": f"{m} × {k} × {n}"}
        words = "Conv1D " * (of in CONV1D) + f"M={m} K={k} N={n}"
        build = partial(one_token, k, n, dtype) if one else partial(providers, (m, k, n), r, dtype, p)
        rows.append((r, sizes, words, partial(build, options, of in CONV1D)))
    return rows


def providers(
    shape: tuple[int, int, int], r: int, name: str, p: float, options: Options, conv1d: bool = False
) -> list[Provider]:
    """frozen, stock, lora and peft_fast, adapters in fp32 and in `name`; on a GPU and at toy sizes every backend."""
    m, k, n = shape
    device, dtype = torch.device(options.device), DTYPES[name]
    base = _base(k, n, device, dtype, conv1d)
    x = torch.randn(m, k, device=device).to(dtype).requires_grad_()
    g = torch.randn(m, n, device=device).to(dtype)
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


def one_token(k: int, n: int, name: str, options: Options, conv1d: bool = False) -> list[Provider]:
    """frozen, stock, lora and peft_fast, adapters in fp32 and in `name`; stock and peft_fast inside DoraCaching too."""
    device, dtype = torch.device(options.device), DTYPES[name]
    base = _base(k, n, device, dtype, conv1d)
    x, xs = (torch.randn(m, k, device=device).to(dtype) for m in (1, dora.JUDGED))
    rows = [inference("frozen", base, x, list(base.parameters()))]
    for fp32 in (True, False) if dtype != torch.float32 else (True,):
        made = partial(lora_layer, base, RANK, 0.0, fp32)
        exact = gate.in_float64(gate.weights(made(dora=True), dtype))
        truth = partial(_truth, exact)
        rows += dora.one_token(partial(made, dora=True), x, xs, truth, "" if fp32 else f" {name}")
        if fp32:
            lora = made(fast=True).eval()
            rows += [inference("lora", lora, x, list(lora.parameters()))]
    if device.type != "cpu":
        return [dataclasses.replace(row, optional=row.name != "frozen") for row in rows]
    return rows


def _truth(w: gate.Weights, xs: Tensor) -> Tensor:
    return gate.lora(xs.double(), w, None)


def _base(k: int, n: int, device: torch.device, dtype: torch.dtype, conv1d: bool) -> nn.Module:
    """A frozen layer of W (N,K), or (K,N) of Conv1D."""
    torch.manual_seed(0)
    if conv1d:
        from transformers.pytorch_utils import Conv1D

        base = Conv1D(n, k).to(device, dtype)
    else:
        base = nn.Linear(k, n, bias=False, device=device, dtype=dtype)
    nn.init.normal_(base.weight, std=k**-0.5)
    return base.requires_grad_(False)


def _row(name: str, layer: nn.Module, x: Tensor, g: Tensor, fast: bool, run=None) -> Provider:
    A, _ = gate.adapter(layer)
    mask = gate.our_mask if fast else gate.torch_mask(A.dtype)
    verdicts = partial(gate.check_layer, layer, x, g, mask, run, fast)
    return provider(name, run or layer, x, g, list(layer.parameters()), [x, *layer.parameters()], verdicts)


def _op(layer: nn.Module, backend: str):
    """The op by itself: no patch, no dispatch, the same arithmetic."""
    from peft_fast.ops import Adapter, dora_linear

    w, W = gate.weights(layer, torch.float32), layer.base_layer.weight
    adapter = Adapter(*gate.adapter(layer), w.scaling, w.p)
    options = {"transposed": not isinstance(layer.base_layer, nn.Linear), "backend": backend}
    return lambda x: dora_linear(x, W, w.bias, adapter, gate.magnitude(layer), **options)
