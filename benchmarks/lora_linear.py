"""One adapted layer: PEFT's lora.Linear, stock and accelerated, against a frozen and a trained one."""

from __future__ import annotations

import itertools
from functools import partial

import torch
from torch import nn

from . import gate, machine, peers
from .harness import Case, Options, Provider

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
SQUARE = (2048, 2048, 2048)  # M, K, N: the shape the project's targets are stated for
# (M, K, N), ranks: BERT-base and a Llama with K/N as in TinyLlama's first billion, 512 tokens
LAYERS = {
    "bert-base": [((512, 768, 768), (8, 16, 64)), ((512, 768, 3072), (16,)), ((512, 3072, 768), (16,))],
    "llama-like": [((512, 1024, 1024), (16,)), ((512, 1024, 2816), (16,)), ((512, 2816, 1024), (16,))],
}
GPU_LAYERS = {
    "llama-3-8b": [((m, 4096, 4096), (16,)) for m in (512, 2048, 16384)]
    + [((8192, 4096, 4096), (8, 64)), ((8192, 4096, 14336), (16,)), ((8192, 14336, 4096), (16,))],
    "qwen2.5-7b": [((8192, 3584, 18944), (16,))],
    "bert-base": [((8192, 768, 768), (16,)), ((8192, 768, 3072), (16,))],
}
GPU_SQUARE = (8192, 4096, 4096)
TINY = (48, 64, 96)
# sizes no tile divides, for --gate-only
AWKWARD = [((37, 127, 129), (2, 17)), ((131, 300, 70), (64, 256))]


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
    title = f"{model} M={m} K={k} N={n} r={r} {dtype} p={p:g} threads={threads}"
    build = partial(providers, m, k, n, r, dtype, p, torch.device(options.device))
    return Case(title, settings, build, threads, seconds=80.0 if model == "square" else 8.0)


def providers(m: int, k: int, n: int, r: int, name: str, p: float, device: torch.device) -> list[Provider]:
    """frozen, full fine-tuning, stock, addmm, peft_fast; adapters in fp32 (PEFT's default) and in `name`."""
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
    return rows


def lora_layer(base: nn.Linear, r: int, p: float, fp32: bool, fast: bool = False) -> nn.Module:
    """A PEFT lora.Linear around `base`; `fp32`, PEFT's default: adapters in float32 whatever the base is."""
    from peft import LoraConfig, get_peft_model

    box = nn.Module()
    # a module of its own around the same weight: accelerate() marks modules
    box.proj = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    box.proj.weight = base.weight
    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=p, target_modules=["proj"])
    model = get_peft_model(box, config, autocast_adapter_dtype=fp32)
    draw_adapters(model)
    if fast:
        accelerate(model)
    return model.base_model.model.proj


def draw_adapters(model: nn.Module, seed: int = 1) -> None:
    """Fills A and B with values of trained size that bf16 holds exactly: all providers start equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, w in model.named_parameters():
            if "lora_" in name:
                std = w.shape[1] ** -0.5 * (0.3 if "lora_B" in name else 1.0)
                w.copy_((torch.randn(w.shape, generator=generator) * std).bfloat16())


def accelerate(model: nn.Module) -> None:
    """peft_fast.accelerate without its printed summary."""
    import peft_fast
    from peft_fast import settings

    with settings.override(quiet=True):
        peft_fast.accelerate(model)


def _provider(name, run, x, g, kept, leaves, verdicts=None) -> Provider:
    state = {}

    def forward() -> None:
        state["y"] = run(x)

    def backward() -> None:
        state.pop("y").backward(g)

    def reset() -> None:
        for leaf in leaves:
            leaf.grad = None

    return Provider(name, {"forward": forward, "backward": backward}, kept, verdicts, reset)


def _plain(name, layer, x, g) -> Provider:
    return _provider(name, layer, x, g, [layer.weight], [x, layer.weight])


def _lora(name, layer, x, g, mask, run=None, fast=False) -> Provider:
    verdicts = partial(gate.check_layer, layer, x, g, mask, run, fast)
    return _provider(name, run or layer, x, g, list(layer.parameters()), [x, *layer.parameters()], verdicts)


def _stock(name, layer, x, g) -> Provider:
    dtype = layer.lora_A["default"].weight.dtype
    return _lora(name, layer, x, g, gate.torch_mask(dtype))


def _addmm(name, layer, x, g) -> Provider:
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    w = gate.weights(layer, x.dtype)
    return _lora(name, layer, x, g, peers.addmm_mask, lambda x: peers.addmm(x, w, A, B))


def _fast(name, layer, x, g) -> Provider:
    return _lora(name, layer, x, g, gate.our_mask, fast=True)
