"""An adapted embedding, plain or with Gemma's scale: PEFT's lora.Embedding against one op.

A frozen embedding has no backward pass to compare with, so stock PEFT is what everything is a multiple of.
"""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import machine
from .blocks import RANK
from .criterion import Verdict, check
from .gate import path
from .harness import Case, Options, Provider
from .lora_linear import DTYPES, adapted, by_name, live_plans, provider, takes
from .shapes import EMBEDDINGS, GPU_EMBEDDINGS, TINY_EMBEDDING


def names(device: str) -> tuple[str, ...]:
    """What --model takes on this device."""
    return tuple(EMBEDDINGS if device == "cpu" else GPU_EMBEDDINGS)


def cases(options: Options) -> list[Case]:
    """The cases for this device and scale; there is no dropout."""
    gpu, tiny = options.device != "cpu", options.scale == "tiny"
    dtypes = options.dtypes or (("bf16", "fp32") if options.scale == "full" and not gpu else ("bf16",))
    threads = options.threads or (1 if gpu or tiny else machine.cores(),)
    shapes = GPU_EMBEDDINGS if gpu else EMBEDDINGS
    rows = []
    for model, dtype, t in itertools.product(options.models or tuple(shapes), dtypes, threads):
        shape = TINY_EMBEDDING + shapes[model][3:] if tiny else shapes[model]
        m, v, d, scale = shape
        words = f"{m} of {v} × {d}" + (", scaled" if scale else "")
        facts = {"model": model, "M": m, "r": RANK, "dtype": dtype, "p": 0.0, "shape": words}
        title = f"{model} {words} r={RANK} {dtype}" + ("" if gpu else f" threads={t}")
        make = partial(providers, shape, dtype, options)
        rows.append(Case(title, facts, make, t, seconds=3.0 if gpu else 12.0, baseline="stock"))
    return rows


class Scaled(nn.Embedding):
    """As Gemma's: what comes out is multiplied by a scalar that is no parameter."""

    def __init__(self, v: int, d: int) -> None:
        super().__init__(v, d)
        self.register_buffer("embed_scale", torch.tensor(d**0.5), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


def providers(shape: tuple[int, int, int, bool], name: str, options: Options) -> list[Provider]:
    """stock and the op, adapters in fp32 and in `name`; on a GPU and at toy sizes every backend by its name."""
    m, v, d, scale = shape
    device, dtype = torch.device(options.device), DTYPES[name]
    torch.manual_seed(0)
    net = nn.Module()
    net.embed = (Scaled if scale else nn.Embedding)(v, d).to(device, dtype).requires_grad_(False)
    ids = torch.randint(v, (m,), device=device)
    g = torch.randn(m, d, device=device).to(dtype)
    rows = []
    for fp32 in (True, False) if dtype != torch.float32 else (True,):
        end = "" if fp32 else f" {name}"
        stock, ours = (adapted(net, ["embed"], RANK, 0.0, fp32).embed for _ in range(2))
        rows += [_row(f"stock{end}", stock, stock, ids, g, fast=False)]
        rows += [_row(f"peft_fast{end}", ours, _op(ours), ids, g, fast=True)]
    if device.type != "cpu" or options.scale == "tiny":
        layer = adapted(net, ["embed"], RANK, 0.0, fp32=True).embed
        W, tensors = layer.base_layer.weight, list(layer.parameters())[1:]
        for backend in dict.fromkeys(backend for backend, _ in live_plans(options.device, options.without)):
            if takes(backend, None, W, tensors, W, "lora_embedding"):
                rows += [by_name(_row(f"peft_fast {backend}", layer, _op(layer, backend), ids, g, fast=True))]
    if device.type != "cpu":
        return [dataclasses.replace(row, optional=row.name != "stock") for row in rows]
    return rows


def _row(name: str, layer: nn.Module, run, ids: Tensor, g: Tensor, fast: bool) -> Provider:
    verdicts = partial(_verdicts, layer, run, ids, g, fast)
    return provider(name, run, ids, g, list(layer.parameters()), adapters(layer), verdicts)


def _op(layer: nn.Module, backend: str | None = None):
    from peft_fast.ops import Adapter, lora_embedding

    adapter = Adapter(*adapters(layer), layer.scaling["default"])
    scale = getattr(layer.base_layer, "embed_scale", None)
    return lambda ids: lora_embedding(ids, layer.base_layer.weight, [adapter], scale=scale, backend=backend)


def adapters(layer: nn.Module) -> list[Tensor]:
    """A (r,V) and B (D,r)."""
    return [layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]]


def _verdicts(layer: nn.Module, run, ids: Tensor, g: Tensor, fast: bool) -> dict[str, Verdict]:
    """y, dA and dB against float64, no further from it than PEFT's own sequence of calls."""
    from peft_fast.ops import fast_calls

    before = fast_calls()
    y = run(ids)
    ours = [y.detach(), *torch.autograd.grad(y, adapters(layer), g)]
    ran = fast_calls() > before
    stock, truth = (_formula(layer, ids, g, wide) for wide in (False, True))
    found = zip(("y", "dA", "dB"), ours, stock, truth, strict=True)
    return {name: check(*three, dtype=g.dtype) for name, *three in found} | {"path": path(fast, ran)}


def _formula(layer: nn.Module, ids: Tensor, g: Tensor, double: bool) -> list[Tensor]:
    """PEFT's own sequence of calls; in float64 with the two scales as the two dtypes round them."""
    W, leaves = layer.base_layer.weight, adapters(layer)
    scale = getattr(layer.base_layer, "embed_scale", None)
    scales = [1.0] * 2 if scale is None else [scale.to(t.dtype).double() for t in (W, leaves[0])]
    wide = torch.float64 if double else leaves[0].dtype
    A, B = (t.detach().to(wide).requires_grad_() for t in leaves)
    base = F.embedding(ids, W.double() if double else W) * scales[0]
    low = F.embedding(ids, A.T) @ B.T * layer.scaling["default"] * scales[1]
    y = base + low if double else (base.to(W.dtype) + low.to(wide)).to(W.dtype)
    return [y.detach(), *torch.autograd.grad(y, [A, B], g.to(y.dtype))]
