"""One adapted layer over a quantized base: the library's layer alone, stock PEFT and ours, forward and backward.

Models are kinds of bases. "nf4-op" needs no library: lora_quantized on packed values, by backend, beside a dense layer.
The others need bitsandbytes, torchao or HQQ, which are looked for in .venv/quantized too, where `make setup` puts them.
By name also one token of a kind, as in generation, and nf4.py's rows of a weight that is made dense.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from peft_fast import settings
from peft_fast.errors import UnsupportedError, fail

from . import gate, machine, nf4
from .criterion import Verdict, check
from .harness import Case, Options, Provider
from .lora_linear import DTYPES, accelerate, adapted, draw_adapters, inference, provider
from .shapes import GPU_SQUARE, TINY

FOLDER = Path(sys.prefix) / "quantized"
RANK = 16
BLOCK = 64  # values a scale
# M, K, N: a Llama's largest layers, and BERT's
SHAPES = [(512, 1024, 2816), (512, 2816, 1024), (512, 2048, 2048)]
GPU_SHAPES = [GPU_SQUARE, (8192, 4096, 14336), (512, 4096, 4096)]


def four_bits(linear: nn.Linear, quant_type: str, nested: bool) -> nn.Module:
    """bitsandbytes' Linear4bit of a layer, which multiplies in the layer's dtype."""
    import bitsandbytes as bnb

    sizes, dtype = (linear.in_features, linear.out_features), linear.weight.dtype
    options = {"compress_statistics": nested, "quant_type": quant_type, "compute_dtype": dtype}
    layer = bnb.nn.Linear4bit(*sizes, bias=linear.bias is not None, **options)
    # made of a weight in the layer's dtype, as transformers does it: that is what bitsandbytes makes it dense in
    how = {"compress_statistics": nested, "quant_type": quant_type}
    layer.weight = bnb.nn.Params4bit(linear.weight.detach().clone(), requires_grad=False, module=layer, **how)
    if linear.bias is not None:
        layer.bias = linear.bias
    return layer.to(linear.weight.device)


def eight_bits(linear: nn.Linear) -> nn.Module:
    """bitsandbytes' Linear8bitLt of a layer."""
    import bitsandbytes as bnb

    sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
    # in evaluation it says at every call that it casts x
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    layer = bnb.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to(linear.weight.device)


def torchao_int8(linear: nn.Linear) -> nn.Module:
    """torchao's int8 weight-only layer."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(linear, Int8WeightOnlyConfig(version=2))
    return linear


def torchao_int4(linear: nn.Linear) -> nn.Module:
    """torchao's int4 weight-only layer, unpacked to int8: what runs on any device."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    quantize_(linear, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    return linear


def hqq(linear: nn.Linear) -> nn.Module:
    """HQQ's layer, four bits."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=BLOCK)
    dtype, device = linear.weight.dtype, linear.weight.device.type
    return HQQLinear(linear, config, compute_dtype=dtype, device=device)


# kind -> the library, and how it makes its layer of a dense one
KINDS: dict[str, tuple[str, Callable[[nn.Linear], nn.Module]]] = {
    "nf4": ("bitsandbytes", partial(four_bits, quant_type="nf4", nested=False)),
    "nf4-double": ("bitsandbytes", partial(four_bits, quant_type="nf4", nested=True)),
    "fp4": ("bitsandbytes", partial(four_bits, quant_type="fp4", nested=False)),
    "int8": ("bitsandbytes", eight_bits),
    "torchao-int8": ("torchao", torchao_int8),
    "torchao-int4": ("torchao", torchao_int4),
    "hqq": ("hqq", hqq),
}
OP = "nf4-op"
TOKEN, DENSE = "-token", "-dense"  # ends of the names of rows of another question
FORCED = "peft_fast min_tokens=0"
JUDGED = 32  # single tokens that the gate looks at


def names(device: str) -> tuple[str, ...]:
    """What --model takes."""
    return (OP, *KINDS, *(f"{kind}{TOKEN}" for kind in KINDS), *(f"{kind}{DENSE}" for kind in nf4.KINDS))


def _kind(model: str) -> str:
    return model.removesuffix(TOKEN).removesuffix(DENSE)


def cases(options: Options) -> list[Case]:
    """Every kind whose library is there, in each dtype, without and with dropout."""
    gpu, tiny = options.device != "cpu", options.scale == "tiny"
    for model in options.models:
        if model != OP:
            need(_kind(model), model)
    models = options.models or (OP, *(kind for kind in KINDS if _there(KINDS[kind][0])))
    dtypes = options.dtypes or (("bf16", "fp32") if options.scale == "full" and not gpu else ("bf16",))
    threads = options.threads or (1 if gpu or tiny else machine.cores(),)
    others = [model for model in models if model.endswith((TOKEN, DENSE))]
    models = [model for model in models if model not in others]
    shapes = [TINY] if tiny else (GPU_SHAPES if gpu else SHAPES)
    if options.scale == "quick":
        shapes = shapes[:1]
    rows = []
    for kind, dtype, p, t in itertools.product(models, dtypes, options.dropouts or (0.0, 0.05), threads):
        for m, k, n in shapes:
            shape = f"{kind} {m} × {k} × {n}"
            facts = {"model": kind, "M": m, "K": k, "N": n, "r": RANK, "dtype": dtype, "p": p, "shape": shape}
            title = f"{shape} r={RANK} {dtype} p={p:g}" + ("" if gpu else f" threads={t}")
            build = partial(of_op if kind == OP else of_layer, kind, m, k, n, dtype, p, options)
            rows.append(Case(title, facts, build, t, seconds=6.0))
    for model, dtype, t in itertools.product(others, dtypes, threads):
        kind, end = _kind(model), f"{dtype}" + ("" if gpu else f" threads={t}")
        facts = {"model": model, "dtype": dtype, "p": 0.0}
        if model.endswith(DENSE):
            for k, n in [TINY[1:]] if tiny else nf4.SHAPES:
                shape = {"K": k, "N": n, "shape": f"{n} × {k}"}
                build = partial(nf4.providers, KINDS[kind][1], k, n, dtype, options)
                rows.append(Case(f"{kind} {n} × {k} {end}", facts | shape, build, t, seconds=6.0, baseline="stock"))
            continue
        for k, n in dict.fromkeys((k, n) for _, k, n in shapes):
            shape = {"M": 1, "K": k, "N": n, "r": RANK, "shape": f"{kind} 1 × {k} × {n}"}
            build, title = partial(of_token, kind, k, n, dtype, options), f"{kind} 1 × {k} × {n} r={RANK} {end}"
            rows.append(Case(title, facts | shape, build, t, seconds=6.0, as_used=True))
    return rows


def need(kind: str, model: str) -> None:
    """UnsupportedError if the library of a kind, which --model asks for, is not installed."""
    if not _there(library := KINDS[kind][0]):
        do = "run `make setup`, which installs requirements-quantized.txt into .venv/quantized"
        fail(UnsupportedError, f"--model {model}", f"{library}, which is not installed", do)


def in_four_bits(net: nn.Module, suffix: str) -> nn.Module:
    """Makes bitsandbytes' double-quantized NF4 of the linear layers whose names end so.

    -> A copy with the dense weights that these mean.
    """
    dense = copy.deepcopy(net)
    for name, module in list(net.named_modules()):
        if name.endswith(suffix) and isinstance(module, nn.Linear):
            net.set_submodule(name, layer := four_bits(module, "nf4", nested=True))
            weight = means(layer, module.in_features, module.weight, module.weight.dtype)
            dense.get_submodule(name).weight.data = weight.clone()
    net.is_loaded_in_4bit = True
    return dense


def _there(library: str) -> bool:
    """Can it be imported? PEFT looks once, at its own import, which this must be ahead of."""
    if importlib.util.find_spec(library) is None and (FOLDER / library).is_dir():
        sys.path.append(str(FOLDER))
        importlib.invalidate_caches()
    return importlib.util.find_spec(library) is not None


def of_layer(kind: str, m: int, k: int, n: int, name: str, p: float, options: Options) -> list[Provider]:
    """The library's layer, stock PEFT, ours, and the library's layer with ours added to it, adapters in fp32."""
    x, g, base = _inputs(m, k, n, name, options)
    box = _box(kind, base)
    stock, fast, added = (_lora(box, p) for _ in range(3))
    accelerate(fast)
    stock, fast, added = (net.base_model.model.proj for net in (stock, fast, added))
    judged = partial(_judged, x, g, means(box.proj, k, x, torch.float32 if kind == "torchao-int8" else x.dtype))
    return [
        provider("frozen", box.proj, x, g, _kept(box.proj), [x]),
        _row("stock", stock, x, g),
        _row("peft_fast", fast, x, g, judged=judged),
        _row("peft_fast added", added, x, g, partial(_added, added, p), judged),
    ]


def of_token(kind: str, k: int, n: int, name: str, options: Options) -> list[Provider]:
    """The same in evaluation, without gradients, as users' settings have it, and by our kernels whatever those say.

    Each has a library's layer of its own: bitsandbytes may pack one for inference at its first call.
    """
    x, _, base = _inputs(1, k, n, name, options)
    x, xs = x.detach(), torch.randn(JUDGED, k, device=x.device).to(x.dtype)
    stock, ours, forced = (_lora(_box(kind, copy.deepcopy(base)), 0.0).eval() for _ in range(3))
    for net in (ours, forced):
        accelerate(net)
    stock, ours, forced = (net.base_model.model.proj for net in (stock, ours, forced))
    frozen, plain = (_box(kind, copy.deepcopy(base)).proj.eval() for _ in range(2))
    W = means(plain, k, x, torch.float32 if kind == "torchao-int8" else x.dtype).double()
    w = gate.Weights(W, None, *(t.detach().double() for t in gate.adapter(stock)), float(stock.scaling["default"]), 0.0)

    def exact(xs: Tensor) -> Tensor:
        return gate.lora(xs.double(), w, None)

    def behind(xs: Tensor) -> Tensor:
        y = torch.cat([frozen(x) for x in xs.split(1)])
        return y + gate.lora(xs.double(), w._replace(W=torch.zeros_like(W)), None)

    def judged(run: Callable[[Tensor], Tensor], fast: bool) -> dict[str, Verdict]:
        # the library's product, in evaluation its own affair (int8 rounds x, bitsandbytes multiplies in bfloat16), or
        # a better one
        found = gate.check_tokens(run, stock, behind, xs, fast)
        return found if all(found.values()) or kind == "int8" else gate.check_tokens(run, stock, exact, xs, fast)

    def always(x: Tensor) -> Tensor:
        with settings.override(min_tokens=0):
            return forced(x)

    return [
        inference("frozen", frozen, x, _kept(frozen)),
        inference("stock", stock, x, _kept(stock)),
        inference("peft_fast", ours, x, _kept(ours), partial(judged, ours, True)),
        inference(FORCED, always, x, _kept(forced), partial(judged, always, True)),
    ]


def of_op(kind: str, m: int, k: int, n: int, name: str, p: float, options: Options) -> list[Provider]:
    """A dense frozen layer, and lora_quantized on packed values by every backend that lives."""
    from peft_fast import dispatch
    from peft_fast.ops import Adapter, lora_quantized
    from peft_fast.ops.nf4 import Packed

    x, g, base = _inputs(m, k, n, name, options)
    device = x.device
    data = torch.randint(256, (k * n // 2,), dtype=torch.uint8, device=device)
    scales = (0.5 + torch.rand(-(-k * n // BLOCK), device=device)) * k**-0.5
    W = Packed(data, scales, torch.linspace(-1, 1, 16, device=device), BLOCK, (n, k))
    with torch.no_grad():
        base.weight.copy_(W.dense(base.weight.dtype))
    net = nn.Module()
    net.proj = base
    layer = adapted(net, ["proj"], RANK, p, fp32=True).proj
    A, B = gate.adapter(layer)
    (scaling,) = layer.scaling.values()
    rows = [provider("frozen", base, x, g, [base.weight], [x])]
    live = [name for name, live, _ in dispatch.backends() if live and name not in ("reference", "cuda")]
    for backend in live if device.type != "cpu" else [b for b in live if b != "triton"]:
        if device.type != "cpu" and backend == "cpu":
            continue
        run = partial(_op, lora_quantized, W, Adapter(A, B, float(scaling), p), backend)
        kept = [*layer.parameters(), data, scales]
        verdicts = partial(gate.check_layer, layer, x, g, gate.our_mask, run, True)
        rows.append(provider(f"peft_fast {backend}", run, x, g, kept, [x, A, B], verdicts))
    return rows


def _op(run, W, adapter, backend: str, x: Tensor) -> Tensor:
    return run(x, W, None, [adapter], backend=backend)


def _inputs(m: int, k: int, n: int, name: str, options: Options) -> tuple[Tensor, Tensor, nn.Linear]:
    """x (M,K), g (M,N) and a dense layer."""
    device, dtype = torch.device(options.device), DTYPES[name]
    torch.manual_seed(0)
    x = torch.randn(m, k, device=device).to(dtype).requires_grad_()
    g = torch.randn(m, n, device=device).to(dtype)
    base = nn.Linear(k, n, bias=False, device=device, dtype=dtype).requires_grad_(False)
    nn.init.normal_(base.weight, std=k**-0.5)
    return x, g, base


def _box(kind: str, base: nn.Linear) -> nn.Module:
    """A model of one layer, `proj`, the library's of a dense one."""
    box = nn.Module()
    box.proj = KINDS[kind][1](base)
    box.is_loaded_in_4bit, box.is_loaded_in_8bit = kind in ("nf4", "nf4-double", "fp4"), kind == "int8"
    return box.requires_grad_(False)


def _lora(box: nn.Module, p: float) -> nn.Module:
    """PEFT's LoRA on the quantized layer of a box, around the same weights."""
    from peft import LoraConfig, get_peft_model

    own = nn.Module()
    own.__dict__.update({name: value for name, value in box.__dict__.items() if name.startswith("is_")})
    own.proj = copy.copy(box.proj)
    own.proj._parameters = dict(box.proj._parameters)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=p, target_modules=["proj"])
    model = get_peft_model(own, config)
    draw_adapters(model)
    return model


def _row(name: str, layer: nn.Module, x: Tensor, g: Tensor, run=None, judged=None) -> Provider:
    run = run or layer
    leaves = [x, *(w for w in layer.parameters() if w.requires_grad)]
    verdicts = None if judged is None else partial(judged, layer, run)
    return provider(name, run, x, g, _kept(layer), leaves, verdicts)


def _kept(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module.parameters(), *module.buffers()) if type(t.data) is Tensor]


def _added(layer: nn.Module, p: float, x: Tensor) -> Tensor:
    """The library's layer as it is, and our adapter on what it returns."""
    from peft_fast.ops import Adapter, lora_add

    A, B = gate.adapter(layer)
    (scaling,) = layer.scaling.values()
    return lora_add(layer.base_layer(x), x, [Adapter(A, B, float(scaling), p)])


def means(base: nn.Module, k: int, x: Tensor, dtype: torch.dtype) -> Tensor:
    """W (N,K), what a library's layer multiplies x of ``dtype`` by: it is applied to the unit vectors."""
    with torch.enable_grad():  # without gradients bitsandbytes may repack its weight for good
        return base(torch.eye(k, dtype=dtype, device=x.device).requires_grad_()).detach().T


def _judged(x: Tensor, g: Tensor, W: Tensor, layer: nn.Module, run) -> dict[str, Verdict]:
    """y, dx, dA, dB against float64, no further from it than PEFT's sequence of calls on the library's product."""
    from peft_fast.ops import fast_calls

    (name,) = layer.active_adapters
    drop = layer.lora_dropout[name]
    p = drop.p if isinstance(drop, nn.Dropout) else 0.0
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(0)
        keep = gate.our_mask(x, p) if p else None
        torch.manual_seed(0)
        before = fast_calls()
        ours = _results(run, x, gate.adapter(layer), g)
        ran = fast_calls() > before

    def found(dtype: torch.dtype, W: Tensor, base) -> list[Tensor]:
        low = [t.detach().to(dtype).requires_grad_() for t in gate.adapter(layer)]
        w = gate.Weights(W, None, *low, float(layer.scaling[name]), p)
        return _results(lambda x: gate.lora(x, w, keep) + base(x), x.detach().to(dtype), low, g.to(dtype))

    # beside a W of zeros the product is the library's
    theirs = found(x.dtype, torch.zeros_like(W, dtype=x.dtype), layer.base_layer)
    truth = found(torch.float64, W.double(), lambda x: 0.0)
    checks = zip(("y", "dx", "dA", "dB"), ours, theirs, truth, strict=True)
    return {what: check(o, s, t, dtype=x.dtype) for what, o, s, t in checks} | {"path": gate.path(True, ran)}


def _results(run, x: Tensor, adapter: Sequence[Tensor], g: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = run(x)
    return [y.detach(), *torch.autograd.grad(y, (x, *adapter), g)]
