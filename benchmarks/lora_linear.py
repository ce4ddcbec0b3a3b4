"""One adapted layer: PEFT's lora.Linear, stock and accelerated, against a frozen and a trained one."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from peft_fast.errors import SettingsError

from . import gate, machine, peers
from .criterion import Verdict
from .harness import Case, NotForThese, Options, Provider
from .shapes import AWKWARD, GPU_LAYERS, GPU_SQUARE, LAYERS, SQUARE, TINY

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def names(device: str) -> tuple[str, ...]:
    """What --model takes on this device."""
    return ("square", *(LAYERS if device == "cpu" else GPU_LAYERS))


def cases(options: Options) -> list[Case]:
    """The cases for this device and scale, the headline shape first."""
    gpu = options.device != "cpu"
    full = options.scale == "full"
    dtypes = options.dtypes or (("bf16", "fp32") if full and not gpu else ("bf16",))
    dropouts = options.dropouts or (0.0, 0.05)
    cores = machine.cores()
    threads = options.threads or ((1, cores) if full and not gpu and cores > 1 else (1,))
    models = options.models or (("square",) if options.scale == "tiny" else names(options.device))
    rows = []
    for model, dtype, p, t in itertools.product(models, dtypes, dropouts, threads):
        for (m, k, n), ranks in _shapes(model, options):
            rows += [
                _case(model, m, k, n, r, dtype, p, t, options)
                for r in ranks
                if model == "square" or _wanted(options, r, dtype, p == dropouts[-1], t == threads[-1])
            ]
    if gpu:
        # the headline with every dropout first, then each shape once with dropout: time may end anywhere
        rows.sort(key=lambda case: (case.settings["model"] != "square", case.settings["p"] != dropouts[-1]))
    return rows


def _wanted(options: Options, r: int, dtype: str, last_p: bool, last_t: bool) -> bool:
    """Away from the square, one thread count, and fp32 once, unless the user asks for more."""
    threads = bool(options.threads) or last_t
    low = dtype != "fp32" or bool(options.dtypes) or (last_p and r == 16)
    return threads and low


def _shapes(model: str, options: Options) -> list:
    gpu = options.device != "cpu"
    more = AWKWARD if options.gate_only else []
    if options.scale == "tiny":
        return [(TINY, (8,)), *more]
    if model == "square":
        return [(GPU_SQUARE if gpu else SQUARE, (16,)), *more]
    shapes = (GPU_LAYERS if gpu else LAYERS)[model]
    return shapes if options.scale == "full" else shapes[:1]


def _case(model, m, k, n, r, dtype, p, threads, options) -> Case:
    settings = {"model": model, "M": m, "K": k, "N": n, "r": r, "dtype": dtype, "p": p}
    settings["gated_tokens"] = min(m, gate.MOST_TOKENS)
    gpu = options.device != "cpu"
    title = f"{model} M={m} K={k} N={n} r={r} {dtype} p={p:g}" + ("" if gpu else f" threads={threads}")
    plans = live_plans(options.device, options.without) if gpu or options.scale == "tiny" else []
    build = partial(providers, m, k, n, r, dtype, p, torch.device(options.device), plans, options.peers)
    long = 80.0 if not gpu else 8.0
    return Case(title, settings, build, threads, seconds=long if model == "square" else long / 10)


def live_plans(device: str, without: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(backend, plan) of everything that can run there, to be measured by name beside what dispatch picks."""
    from peft_fast import dispatch
    from peft_fast.backends import triton

    gpu = device != "cpu"
    where = {"cuda": gpu, "triton": gpu or triton.interpreting(), "cpu": not gpu, "reference": False}
    live = [name for name, live, _ in dispatch.backends() if live and where.get(name, True)]
    plans = [(name, plan) for name in live for plan in dispatch.BACKEND_PLANS[name]]
    return [plan for plan in plans if " ".join(plan) not in without]


def providers(
    m: int,
    k: int,
    n: int,
    r: int,
    name: str,
    p: float,
    device: torch.device,
    plans: Sequence[tuple[str, str]] = (),
    others: bool = False,
) -> list[Provider]:
    """frozen, full fine-tuning, stock, addmm, peft_fast; adapters in fp32 (PEFT's default) and in `name`.

    ``plans`` are measured by name, with fp32 adapters (beside fp16 those have PEFT's arithmetic, so fp16 there);
    ``others``: also the peers that import.
    """
    dtype = DTYPES[name]
    torch.manual_seed(0)
    x = torch.randn(m, k, device=device).to(dtype).requires_grad_()
    g = torch.randn(m, n, device=device).to(dtype)
    base = nn.Linear(k, n, bias=False, device=device, dtype=dtype).requires_grad_(False)
    nn.init.normal_(base.weight, std=k**-0.5)
    full = nn.Linear(k, n, bias=False, device=device, dtype=dtype)
    full.load_state_dict(base.state_dict())
    low = dtype != torch.float32
    rows = [_plain("frozen", base, x, g), _plain("full", full, x, g)]
    rows += [_stock("stock", lora_layer(base, r, p, fp32=True), x, g)]
    rows += [_stock(f"stock {name}", lora_layer(base, r, p, fp32=False), x, g)] if low else []
    rows += [_addmm("addmm", lora_layer(base, r, p, fp32=not low), x, g)]
    rows += [_fast("peft_fast", lora_layer(base, r, p, fp32=True, fast=True), x, g)]
    rows += [_fast(f"peft_fast {name}", lora_layer(base, r, p, fp32=False, fast=True), x, g)] if low else []
    rows += [
        _plan(backend, plan, layer, x, g)
        for backend, plan in plans
        if takes(backend, plan, base.weight, gate.adapter(layer := lora_layer(base, r, p, fp32=name != "fp16")), x)
    ]
    if others:
        rows += [_peer(peer, lora_layer(base, r, p, fp32=False), x, g) for peer in peers.found(p)]
    return alone(rows) if x.is_cuda else rows


def alone(rows: list[Provider]) -> list[Provider]:
    """The same, each refused alone: on a GPU time is short, and a row is worth having without one of them."""
    return [dataclasses.replace(row, optional=row.name != "frozen") for row in rows]


def lora_layer(base: nn.Linear, r: int, p: float, fp32: bool, fast: bool = False, dora: bool = False) -> nn.Module:
    """A PEFT lora.Linear around `base`; `fp32`, PEFT's default: adapters in float32 whatever the base is."""
    box = nn.Module()
    box.proj = base
    return adapted(box, ["proj"], r, p, fp32, fast, dora).proj


def adapted(
    net: nn.Module, names: list[str], r: int, p: float, fp32: bool, fast: bool = False, dora: bool = False
) -> nn.Module:
    """A copy of `net` around the same frozen weights, with PEFT's LoRA on the layers of these names."""
    from peft import LoraConfig, get_peft_model

    # modules of its own: accelerate() marks modules
    box = copy.deepcopy(net, {id(w): w for w in net.parameters()})
    turned = any(type(module).__name__ == "Conv1D" for module in box.modules())
    options = {"target_modules": names, "use_dora": dora, "fan_in_fan_out": turned}
    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=p, **options)
    model = get_peft_model(box, config, autocast_adapter_dtype=fp32)
    draw_adapters(model)
    if fast:
        accelerate(model)
    return model.base_model.model


def copy_adapters(of: nn.Module, to: nn.Module) -> nn.Module:
    """``to``, with the adapters of another model, whose base may be another one."""
    to.load_state_dict({name: value for name, value in of.state_dict().items() if "lora_" in name}, strict=False)
    return to


def draw_adapters(model: nn.Module, seed: int = 1) -> None:
    """Fills A, B, their biases and DoRA's magnitudes with values of trained size that bf16 holds, equal in all."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, w in model.named_parameters():
            if "lora_magnitude" in name:
                w.mul_(1 + 0.1 * torch.randn(w.shape, generator=generator).to(w.device))
                w.copy_(w.bfloat16())
            elif "lora_" in name:
                std = (w.shape[1] if w.dim() > 1 else 100) ** -0.5 * (0.3 if "lora_B" in name else 1.0)
                w.copy_((torch.randn(w.shape, generator=generator) * std).bfloat16())


def accelerate(model: nn.Module) -> None:
    """peft_fast.accelerate without its printed summary."""
    import peft_fast
    from peft_fast import settings

    with settings.override(quiet=True):
        peft_fast.accelerate(model)


def provider(name, run, x, g, kept, leaves, verdicts=None) -> Provider:
    """run(x) and its backward with g, a tensor or one for each result; `leaves` take gradients, x is one of them."""
    state = {}
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def forward() -> None:
        state["y"] = run(x)

    def backward() -> None:
        if x.is_cuda:  # nothing that waits for the host between the kernels
            torch.autograd.grad(state.pop("y"), wanted, g)
        else:
            torch.autograd.backward(state.pop("y"), g)

    def reset() -> None:
        for leaf in leaves:
            leaf.grad = None

    return Provider(name, {"forward": forward, "backward": backward}, kept, verdicts, reset)


def inference(name: str, run, x: Tensor, kept: Sequence[Tensor], verdicts=None) -> Provider:
    """run(x) without gradients."""

    def forward() -> Tensor:
        with torch.no_grad():
            return run(x)

    return Provider(name, {"forward": forward}, kept, verdicts)


def _plain(name, layer, x, g) -> Provider:
    return provider(name, layer, x, g, [layer.weight], [x, layer.weight])


def _lora(name, layer, x, g, mask, run=None, fast=False) -> Provider:
    verdicts = partial(gate.check_layer, layer, x, g, mask, run, fast)
    return provider(name, run or layer, x, g, list(layer.parameters()), [x, *layer.parameters()], verdicts)


def _stock(name, layer, x, g) -> Provider:
    A, _ = gate.adapter(layer)
    return _lora(name, layer, x, g, gate.torch_mask(A.dtype))


def _addmm(name, layer, x, g) -> Provider:
    A, B = gate.adapter(layer)
    w = gate.weights(layer, x.dtype)
    return _lora(name, layer, x, g, peers.addmm_mask, lambda x: peers.addmm(x, w, A, B))


def _fast(name, layer, x, g) -> Provider:
    return _lora(name, layer, x, g, gate.our_mask, fast=True)


def _plan(backend, plan, layer, x, g) -> Provider:
    """The operator itself with backend and plan by name: no patch, no dispatch, the same arithmetic."""
    from peft_fast.ops import Adapter, lora_linear

    w = gate.weights(layer, x.dtype)
    adapter = Adapter(*gate.adapter(layer), w.scaling, w.p)

    def run(x):
        return lora_linear(x, w.W, w.bias, [adapter], backend=backend, plan=plan)

    return by_name(_lora(f"peft_fast {backend} {plan}", layer, x, g, gate.our_mask, run, fast=True))


def by_name(named: Provider) -> Provider:
    """A plan measured by its name: optional, and refused where other kernels than the named ones ran."""
    from peft_fast import dispatch

    def verdicts() -> dict[str, Verdict]:
        watch = dispatch.Watch()
        found = named.gate()
        failed = watch.failed()
        found["kernels"] = Verdict(not failed, failed)
        if all(found.values()) and (why := watch.refused()):
            raise NotForThese(f"not for these tensors or this device: {why}")
        return found

    return dataclasses.replace(named, gate=verdicts, optional=True)


def takes(backend: str, plan: str, W: Tensor, tensors: Sequence[Tensor], x: Tensor, op: str = "lora_linear") -> bool:
    """Does this backend have a plan of the op for these dtypes?"""
    from peft_fast import dispatch

    try:
        return dispatch.pick(x, x.dtype, W, tensors, backend=backend, plan=plan, op=op).backend == backend
    except SettingsError:
        return False


def _peer(peer, layer, x, g) -> Provider:
    A, B = gate.adapter(layer)
    w = gate.weights(layer, x.dtype)
    found = _lora(peer.name, layer, x, g, gate.torch_mask(x.dtype), lambda x: peer(x, w, A, B))
    return dataclasses.replace(found, optional=True)
