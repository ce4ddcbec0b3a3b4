"""An embedding with a DoRA adapter, PEFT's lora.Embedding: trained, and one token of inference. Rows of dora_linear.

A frozen embedding has no backward pass to compare with: trained, stock PEFT is what everything is a multiple of.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import dora, lora_embedding
from .blocks import RANK
from .criterion import Verdict, check
from .gate import magnitude, path
from .harness import Options, Provider
from .lora_linear import DTYPES, adapted, by_name, inference, live_plans, provider, takes


def providers(m: int, v: int, d: int, name: str, options: Options) -> list[Provider]:
    """stock and peft_fast, adapters in fp32 and in `name`; on a GPU and at toy sizes every backend.

    One token: without gradients, beside the frozen embedding, and inside DoraCaching too.
    """
    device, dtype = torch.device(options.device), DTYPES[name]
    torch.manual_seed(0)
    net = nn.Module()
    net.embed = nn.Embedding(v, d).to(device, dtype).requires_grad_(False)
    ids = torch.randint(v, (m,), device=device)
    g = torch.randn(m, d, device=device).to(dtype)
    one = m == 1
    rows = [inference("frozen", net.embed, ids, [net.embed.weight])] if one else []
    for fp32 in (True, False) if dtype != torch.float32 else (True,):
        end, made = "" if fp32 else f" {name}", partial(_layer, net, fp32)
        if one:
            ids_judged, truth = torch.randint(v, (dora.JUDGED,), device=device), partial(_forward, made(), wide=True)
            rows += dora.one_token(made, ids, ids_judged, truth, end)
            continue
        rows += [_row(f"stock{end}", made(), ids, g, fast=False), _row(f"peft_fast{end}", made(True), ids, g)]
    if not one and (device.type != "cpu" or options.scale == "tiny"):
        layer = _layer(net, fp32=True)
        for backend in dict.fromkeys(backend for backend, _ in live_plans(options.device, options.without)):
            if takes(backend, None, net.embed.weight, leaves(layer)[:2], net.embed.weight, "dora_embedding"):
                rows += [by_name(_row(f"peft_fast {backend}", layer, ids, g, run=_op(layer, backend)))]
    if device.type != "cpu":
        baseline = rows[0].name
        return [dataclasses.replace(row, optional=row.name != baseline) for row in rows]
    return rows


def _layer(net: nn.Module, fp32: bool, fast: bool = False) -> nn.Module:
    return adapted(net, ["embed"], RANK, 0.0, fp32, fast, dora=True).embed


def leaves(layer: nn.Module) -> list[Tensor]:
    """A (r,V), B (D,r) and m (D,)."""
    return [*lora_embedding.adapters(layer), magnitude(layer)]


def _row(name: str, layer: nn.Module, ids: Tensor, g: Tensor, fast: bool = True, run=None) -> Provider:
    run = run or layer
    verdicts = partial(_verdicts, layer, run, ids, g, fast)
    return provider(name, run, ids, g, list(layer.parameters()), leaves(layer), verdicts)


def _op(layer: nn.Module, backend: str):
    """The op by itself: no patch, no dispatch, the same arithmetic."""
    from peft_fast.ops import Adapter, dora_embedding

    A, B, m = leaves(layer)
    adapter = Adapter(A, B, layer.scaling["default"])
    return lambda ids: dora_embedding(ids, layer.base_layer.weight, adapter, m, backend=backend)


def _verdicts(layer: nn.Module, run, ids: Tensor, g: Tensor, fast: bool) -> dict[str, Verdict]:
    """y, dA, dB and dm against float64, no further from it than PEFT's own sequence of calls."""
    from peft_fast.ops import fast_calls

    before = fast_calls()
    y = run(ids)
    ours = [y.detach(), *torch.autograd.grad(y, leaves(layer), g)]
    ran = fast_calls() > before
    found = zip(("y", "dA", "dB", "dm"), ours, *(_formula(layer, ids, g, wide) for wide in (False, True)), strict=True)
    return {name: check(*three, dtype=g.dtype) for name, *three in found} | {"path": path(fast, ran)}


def _formula(layer: nn.Module, ids: Tensor, g: Tensor, wide: bool) -> list[Tensor]:
    low = [t.detach().to(torch.float64 if wide else t.dtype).requires_grad_() for t in leaves(layer)]
    y = _forward(layer, ids, low, wide)
    return [y.detach(), *torch.autograd.grad(y, low, g.to(y.dtype))]


def _forward(layer: nn.Module, ids: Tensor, low: list[Tensor] | None = None, wide: bool = False) -> Tensor:
    """PEFT's own sequence of calls on A, B and m; ``wide``: in float64."""
    W = layer.base_layer.weight
    A, B, m = leaves(layer) if low is None else low
    if wide:
        W, A, B, m = (t.double() for t in (W, A, B, m))
    s = layer.scaling["default"]
    c = m / torch.linalg.norm(W.T + s * (A.T @ B.T).T.detach(), dim=1)
    y = c * F.embedding(ids, W) + c * (F.embedding(ids, A.T) @ B.T) * s
    return y.to(W.dtype)
