"""An op over several layers as harness cases: the frozen layers, stock PEFT, ours layer by layer, and the op."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peft_fast import settings

from . import gate, machine
from .harness import Case, Options, Provider
from .lora_linear import DTYPES, adapted, alone, by_name, live_plans, provider, takes

RANK = 16


class Block(NamedTuple):
    """x (M,K), gs (M,N) for each result; `net` of frozen layers, those of `layers` adapted, in the order they drop."""

    x: Tensor
    gs: list[Tensor]
    net: nn.Module
    layers: list[str]
    formula: gate.Formula  # over `layers`: what net computes
    op: Callable  # x, a Sibling for each of `layers`, backend=, plan= -> what net computes
    name: str  # of the op


Build = Callable[..., Block]  # dtype, device, *shape


def cases(options: Options, shapes: dict[str, Sequence[tuple]], tiny: Sequence, build: Build, title: Callable) -> list:
    """A case for each shape, dtype and dropout; float32 once a model, with dropout; `title` puts a shape in words."""
    gpu, full = options.device != "cpu", options.scale == "full"
    dtypes = options.dtypes or (("bf16", "fp32") if full and not gpu else ("bf16",))
    dropouts = options.dropouts or (0.0, 0.05)
    threads = options.threads or (1 if gpu or options.scale == "tiny" else machine.cores(),)
    models = options.models or tuple(shapes)[: 1 if options.scale == "tiny" else None]
    rows = []
    for model, dtype, p, t in itertools.product(models, dtypes, dropouts, threads):
        once = dtype == "fp32" and not options.dtypes
        if once and p != dropouts[-1]:
            continue
        chosen = tiny if options.scale == "tiny" else shapes[model] if full and not once else shapes[model][:1]
        for shape in chosen:
            facts = {"model": model, "M": shape[0], "r": RANK, "dtype": dtype, "p": p, "shape": title(shape)}
            words = f"{model} {title(shape)} r={RANK} {dtype} p={p:g}" + ("" if gpu else f" threads={t}")
            make = partial(providers, build, shape, dtype, p, options)
            rows.append(Case(words, facts, make, t, seconds=3.0 if gpu else 12.0))
    if gpu:  # each shape once with dropout first: time may end anywhere
        rows.sort(key=lambda case: case.settings["p"] != dropouts[-1])
    return rows


def providers(build: Build, shape: tuple, name: str, p: float, options: Options) -> list[Provider]:
    """frozen, full fine-tuning, stock, ours layer by layer and as one op; adapters in fp32 and in `name`.

    On a GPU and at toy sizes also every plan by its name.
    """
    device, dtype = torch.device(options.device), DTYPES[name]
    torch.manual_seed(0)
    block = build(dtype, device, *shape)
    block.x.requires_grad_()
    rows = [_plain("frozen", block, block.net.requires_grad_(False))]
    rows += [_plain("full", block, copy.deepcopy(block.net).requires_grad_())]
    if not block.layers:
        rows += [_op("peft_fast", block, block.net)]
        return alone(rows) if device.type != "cpu" else rows
    for fp32 in (True, False) if dtype != torch.float32 else (True,):
        end = "" if fp32 else f" {name}"
        make = partial(adapted, block.net, block.layers, RANK, p, fp32)
        rows += [_stock(f"stock{end}", block, make()), _op(f"peft_fast{end}", block, make())]
        rows += [_layer_by_layer(block, make(fast=True))] if fp32 else []
    if device.type != "cpu" or options.scale == "tiny":
        net = adapted(block.net, block.layers, RANK, p, fp32=name != "fp16")
        plans = [plan for plan in live_plans(options.device, options.without) if _takes(block, net, *plan)]
        rows += [by_name(_op(f"peft_fast {backend} {plan}", block, net, backend, plan)) for backend, plan in plans]
    return alone(rows) if device.type != "cpu" else rows


def modules(block: Block, net: nn.Module) -> list[nn.Module]:
    """The adapted layers of a copy of the block's net, or its plain ones where none is adapted."""
    return [net.get_submodule(name) for name in block.layers] or list(net.children())


def _plain(name: str, block: Block, net: nn.Module) -> Provider:
    return provider(name, net, block.x, block.gs, list(net.parameters()), [block.x, *net.parameters()])


def _gated(name: str, block: Block, net: nn.Module, run: Callable, masks: gate.Masks, fast: bool) -> Provider:
    x, gs = block.x, block.gs
    verdicts = partial(gate.check_op, modules(block, net), block.formula, run, x, gs, masks, fast)
    return provider(name, run, x, gs, list(net.parameters()), [x, *net.parameters()], verdicts)


def _stock(name: str, block: Block, net: nn.Module) -> Provider:
    A, _ = gate.adapter(modules(block, net)[0])
    return _gated(name, block, net, net, gate.each(gate.torch_mask(A.dtype)), fast=False)


def _layer_by_layer(block: Block, net: nn.Module) -> Provider:
    """The accelerated net, each of its layers by itself."""

    def run(x: Tensor):
        with settings.override(groups=False, blocks=False):
            return net(x)

    return _gated("layer by layer", block, net, run, gate.each(gate.our_mask), fast=True)


def _op(name: str, block: Block, net: nn.Module, backend: str | None = None, plan: str | None = None) -> Provider:
    siblings = [sibling(layer) for layer in modules(block, net)]

    def run(x: Tensor):
        return block.op(x, siblings, backend=backend, plan=plan)

    return _gated(name, block, net, run, gate.our_masks, fast=True)


def sibling(layer: nn.Module):
    """A linear layer, of PEFT or plain, as the ops take it."""
    from peft_fast.ops import Adapter, Sibling

    w = gate.weights(layer, torch.float32)
    return Sibling(w.W, w.bias, [] if w.A is None else [Adapter(*gate.adapter(layer), w.scaling, w.p)])


def _takes(block: Block, net: nn.Module, backend: str, plan: str) -> bool:
    layer = modules(block, net)[0]
    return takes(backend, plan, layer.base_layer.weight, gate.adapter(layer), block.x, block.name)
