"""Rows of one batch with an adapter each (adapter_names): PEFT's loop over the adapters against one pass, inference.

"frozen" is the base layer, or the model without adapters, on the same batch: what nobody can be faster than.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import machine
from .criterion import Verdict, check
from .gate import path
from .harness import Case, Options, Provider
from .lora_linear import DTYPES, inference
from .shapes import GPU_LAYERS, LAYERS

ADAPTERS, RANK = 16, 16
NEW_TOKENS = 16  # that a model generates
LENGTHS = (1, 128)  # tokens of each row: generation, and reading a prompt


def names(device: str) -> tuple[str, ...]:
    """What --model takes on this device."""
    return ("generate", *(LAYERS if device == "cpu" else GPU_LAYERS))


def cases(options: Options) -> list[Case]:
    """Layers of each model with one and with many tokens a row, and generation by a whole Llama-like model."""
    gpu, tiny = options.device != "cpu", options.scale == "tiny"
    dtypes = options.dtypes or (("bf16", "fp32") if options.scale == "full" and not gpu else ("bf16",))
    threads = options.threads or (1 if gpu or tiny else machine.cores(),)
    rows = []
    for model, dtype, t in itertools.product(options.models or ("llama-like", "generate"), dtypes, threads):
        facts = {"model": model, "adapters": ADAPTERS, "r": RANK, "dtype": dtype, "p": 0.0}
        end = "" if gpu else f" threads={t}"
        if model == "generate":
            title = f"generate {NEW_TOKENS} tokens in {ADAPTERS} rows, {ADAPTERS} adapters, {dtype}{end}"
            build = partial(whole, dtype, options)
            rows.append(Case(title, facts | {"shape": "a model"}, build, t, seconds=25.0))
            continue
        layers = [(m, k, n) for (m, k, n), _ in (GPU_LAYERS if gpu else LAYERS)[model]]
        for (_, k, n), tokens in itertools.product([(0, 64, 96)] if tiny else layers, LENGTHS):
            shape = f"{ADAPTERS} × {tokens} tokens, {k} → {n}"
            title = f"{model} {shape}, {ADAPTERS} adapters, {dtype}{end}"
            build = partial(providers, k, n, tokens, dtype, options)
            rows.append(Case(title, facts | {"M": ADAPTERS * tokens, "shape": shape}, build, t, seconds=8.0))
    return rows


def providers(k: int, n: int, tokens: int, name: str, options: Options) -> list[Provider]:
    """frozen, stock and peft_fast, adapters in fp32 and in `name`."""
    device, dtype = torch.device(options.device), DTYPES[name]
    torch.manual_seed(0)
    base = nn.Linear(k, n, bias=False, device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn(ADAPTERS, tokens, k, device=device).to(dtype)
    batch = [f"a{i}" for i in range(ADAPTERS)]
    rows = [_provider("frozen", lambda: base(x), base)]
    for fp32 in (True, False) if dtype != torch.float32 else (True,):
        end = "" if fp32 else f" {name}"
        for title in ("stock", "peft_fast"):
            net = nn.Module()
            net.layer = copy.deepcopy(base)
            layer = _adapted(net, ["layer"], fp32, fast=title == "peft_fast").base_model.model.layer
            run = partial(layer, x, adapter_names=batch)
            rows.append(_provider(title + end, run, layer, partial(_verdicts, layer, x, run, title == "peft_fast")))
    return rows


def whole(name: str, options: Options) -> list[Provider]:
    """The same for generation by a model with adapters on all its linear layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = options.scale == "tiny"
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8}
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(num_hidden_layers=1 if tiny else 4, vocab_size=4096, **(small if tiny else sizes))
    torch.manual_seed(0)
    net = LlamaForCausalLM(config).to(options.device, DTYPES[name]).eval().requires_grad_(False)
    ids = torch.randint(3, 4096, (ADAPTERS, 16), device=options.device)
    length = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    stock, ours = (_adapted(copy.deepcopy(net), targets, fp32=True, fast=fast) for fast in (False, True))
    batch = [f"a{i}" for i in range(ADAPTERS)]
    return [
        _provider("frozen", partial(net.generate, input_ids=ids, **length), net, waits=True),
        *(
            _provider(title, partial(m.generate, input_ids=ids, adapter_names=batch, **length), m, waits=True)
            for title, m in (("stock", stock), ("peft_fast", ours))
        ),
    ]


def _adapted(net: nn.Module, targets: list[str], fp32: bool, fast: bool) -> nn.Module:
    """A PEFT model with ADAPTERS adapters that are not zero."""
    from peft import LoraConfig, get_peft_model

    import peft_fast
    from peft_fast import settings

    torch.manual_seed(0)
    config = LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(net, config, adapter_name="a0", autocast_adapter_dtype=fp32)
    for i in range(1, ADAPTERS):
        model.add_adapter(f"a{i}", copy.copy(config), autocast_adapter_dtype=fp32)
    if fast:
        with settings.override(quiet=True):
            peft_fast.accelerate(model)
    return model.eval()


def _provider(name: str, run, module: nn.Module, verdicts=None, waits: bool = False) -> Provider:
    """``waits``: for the device between its launches, so that no backlog hides the host's time."""
    row = inference(name, lambda _: run(), None, [*module.parameters(), *module.buffers()], verdicts)
    return dataclasses.replace(row, backlog=0.0) if waits else row


def _verdicts(layer: nn.Module, x: Tensor, run, fast: bool) -> dict[str, Verdict]:
    """y against float64, row by row, no further from it than PEFT's own sequence of calls."""
    from peft_fast.ops import fast_calls

    before = fast_calls()
    with torch.no_grad():
        ours = run()
        ran = fast_calls() > before
        W = layer.base_layer.weight
        base, truth = F.linear(x, W), F.linear(x.double(), W.double())
        stock = base.clone()
        for i in range(ADAPTERS):
            A, B, s = layer.lora_A[f"a{i}"].weight, layer.lora_B[f"a{i}"].weight, layer.scaling[f"a{i}"]
            stock[i] += (F.linear(F.linear(x[i].to(A.dtype), A), B) * s).to(base.dtype)
            truth[i] += F.linear(F.linear(x[i].double(), A.double()), B.double()) * s
    return {"y": check(ours, stock, truth, dtype=x.dtype), "path": path(fast, ran)}
