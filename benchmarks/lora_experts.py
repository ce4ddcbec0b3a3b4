"""The experts of a mixture, adapted by target_parameters: PEFT's lora.ParamWrapper against two products with adapters.

A case is transformers' own module of experts with its routing given: gathering, both products, gate, weighted sum.
Both stacks are adapted, or one beside the other, frozen one. A single token is generated: forward, without gradients.
"""

from __future__ import annotations

import copy
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
from .lora_linear import DTYPES, accelerate, draw_adapters, inference, provider
from .shapes import EXPERTS, GPU_EXPERTS, TINY_EXPERTS

JUDGED = 8  # experts that float64 looks at: a copy of all would take four times the memory of what is timed
TARGETS = {"-up": ["experts.gate_up_proj"], "-down": ["experts.down_proj"]}
TOKENS = 128  # that it looks at


def names(device: str) -> tuple[str, ...]:
    """What --model takes on this device."""
    return tuple(EXPERTS if device == "cpu" else GPU_EXPERTS)


def cases(options: Options) -> list[Case]:
    """The cases for this device and scale; there is no dropout."""
    gpu, tiny = options.device != "cpu", options.scale == "tiny"
    threads = options.threads or (1 if gpu or tiny else machine.cores(),)
    shapes = GPU_EXPERTS if gpu else EXPERTS
    rows = []
    models = options.models or tuple(shapes)[: 1 if tiny else None]
    for model, dtype, t in itertools.product(models, options.dtypes or ("bf16",), threads):
        m = shapes[model][0]
        shape = m, h, i, e, k = (min(m, TINY_EXPERTS[0]), *TINY_EXPERTS[1:]) if tiny else shapes[model]
        words = f"{m} token{'s' * (m > 1)}, top {k} of {e}, {h} × {i}"
        facts = {"model": model, "M": m, "r": RANK, "dtype": dtype, "p": 0.0, "shape": words}
        title = f"{model} {words} r={RANK} {dtype}" + ("" if gpu else f" threads={t}")
        make = partial(providers, shape, targets(model), dtype, options)
        rows.append(Case(title, facts, make, t, seconds=3.0 if gpu else 30.0))
    return rows


class Experts(nn.Module):
    """Qwen3-MoE's experts behind a routing that is given."""

    def __init__(self, h: int, i: int, e: int, k: int) -> None:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        super().__init__()
        config = Qwen3MoeConfig(hidden_size=h, moe_intermediate_size=i, num_experts=e, num_experts_per_tok=k)
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            self.experts = Qwen3MoeExperts(config)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, chosen, weights)


def targets(model: str) -> list[str]:
    """The stacks that are adapted."""
    both = [name for names in TARGETS.values() for name in names]
    return next((names for end, names in TARGETS.items() if model.endswith(end)), both)


def providers(shape: tuple[int, ...], adapted_to: list[str], name: str, options: Options) -> list[Provider]:
    """The frozen experts, stock PEFT and ours, adapters in fp32."""
    m, h, i, e, k = shape
    device, dtype = torch.device(options.device), DTYPES[name]
    torch.manual_seed(0)
    net = Experts(h, i, e, k).to(dtype).to_empty(device=device).requires_grad_(False)
    for w in net.parameters():
        nn.init.normal_(w, std=w.shape[-1] ** -0.5)
    x = torch.randn(m, h, device=device).to(dtype).requires_grad_()
    weights, chosen = torch.randn(m, e, device=device).softmax(-1).topk(k)
    weights = weights.requires_grad_()
    g = torch.randn(m, h, device=device).to(dtype)
    rows = [_row("frozen", net, x, chosen, weights, g, None)]
    stock, ours = adapted(net, adapted_to), adapted(net, adapted_to, fast=True)
    rows += [_row("stock", stock, x, chosen, weights, g, None)]
    rows += [_row("peft_fast", ours, x, chosen, weights, g, partial(_verdicts, stock, ours, x, g, k))]
    return rows


def adapted(net: nn.Module, stacks: list[str], fast: bool = False) -> nn.Module:
    """A copy of `net` around the same frozen weights, with PEFT's LoRA on these stacks."""
    from peft import LoraConfig, get_peft_model

    box = copy.deepcopy(net, {id(w): w for w in net.parameters()})
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[], target_parameters=stacks)
    model = get_peft_model(box, config)
    draw_adapters(model)
    if fast:
        accelerate(model)
    return model.base_model.model


def adapters(net: nn.Module) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Name of the stack -> A, B and scaling."""
    found, layer = {}, net.experts
    while hasattr(layer, "parameter_name"):
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        found[layer.parameter_name] = A, B, layer.scaling["default"]
        layer = layer.base_layer
    return found


def _row(name: str, net: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor, g: Tensor, verdicts) -> Provider:
    kept, run = list(net.parameters()), lambda x: net(x, chosen, weights)
    if x.shape[0] == 1:
        return inference(name, run, x, kept, verdicts)
    return provider(name, run, x, g, kept, [x, weights, *kept], verdicts)


def _verdicts(stock: nn.Module, ours: nn.Module, x: Tensor, g: Tensor, k: int) -> dict[str, Verdict]:
    """y and every gradient against float64, no further from it than PEFT; a few experts and tokens stand for all.

    Of single tokens, other ones so that they are many, y alone.
    """
    from peft_fast.ops import fast_calls

    single = x.shape[0] == 1
    x = torch.randn_like(x.expand(TOKENS, -1)) if single else x.detach()[:TOKENS]
    x, g = x.requires_grad_(), g[:TOKENS].expand_as(x)
    E = ours.experts.num_experts
    judged = min(E, max(JUDGED, k))
    generator = torch.Generator(x.device).manual_seed(2)
    draw = torch.rand(x.shape[0], judged, device=x.device, generator=generator)
    weights, chosen = draw.softmax(-1).topk(k)
    weights = weights.detach().requires_grad_()
    before = fast_calls()
    results = _results_one_by_one if single else _results
    found = [results(net, x, chosen, weights, g) for net in (ours, stock)]
    ran = fast_calls() > before
    truth = _truth(ours, x, chosen, weights, g, judged)
    names = ("y", "dx", "dweights", *(f"{side} of {stack}" for stack in adapters(ours) for side in ("dA", "dB")))
    low = x.dtype  # the products' precision is what counts for gradients in float32
    outputs = zip(names, *found, truth, strict=not single)
    checks = {n: check(o, s, t, dtype=low) for n, o, s, t in outputs}
    return checks | {"path": path(True, ran)}


def _results(net: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor, g: Tensor) -> list[Tensor]:
    y = net(x, chosen, weights)
    leaves = [t for A, B, _ in adapters(net).values() for t in (A, B)]
    return [y.detach(), *torch.autograd.grad(y, [x, weights, *leaves], g)]


def _results_one_by_one(net: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor, _: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [torch.cat([net(*token) for token in zip(x.split(1), chosen.split(1), weights.split(1), strict=True)])]


def _truth(net: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor, g: Tensor, judged: int) -> list[Tensor]:
    """The module in float64, over the experts that were chosen."""
    base = net.experts
    while hasattr(base, "base_layer"):
        base = base.base_layer
    double = lambda t: t.detach().double().requires_grad_()  # noqa: E731
    xd, wd = double(x), double(weights)
    low = {n: (double(A), double(B), s) for n, (A, B, s) in adapters(net).items()}

    def product(z: Tensor, stack: str, e: int) -> Tensor:
        W = getattr(base, stack)[e].double()
        if stack not in low:
            return z @ W.T
        A, B, s = low[stack]
        E = base.num_experts
        Ae, Be = A.view(E, -1, A.shape[1])[e], B.view(B.shape[0], -1, E)[:, :, e]
        return z @ W.T + s * (z @ Ae.T) @ Be.T

    y = torch.zeros_like(xd)
    for e in range(judged):
        rows, place = torch.where(chosen == e)
        gate, up = product(xd[rows], "gate_up_proj", e).chunk(2, -1)
        z = product(F.silu(gate) * up, "down_proj", e)
        y = y.index_add(0, rows, z * wd[rows, place, None])
    leaves = [t for A, B, _ in low.values() for t in (A, B)]
    return [y.detach(), *torch.autograd.grad(y, [xd, wd, *leaves], g.double())]
