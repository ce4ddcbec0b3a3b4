"""Rows of one batch with an adapter each (adapter_names): PEFT's loop over the adapters against one pass, inference.

"frozen" is the base layer, or the model without adapters, on the same batch: what nobody can be faster than. By name
also a larger batch, whose adapters have several ranks and some of whose rows have none.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from dataclasses import dataclass
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

NEW_TOKENS = 16  # that a model generates


@dataclass(frozen=True)
class Batch:
    """Who is in a batch: a row for each adapter, of these ranks, and after every so many of them one for none."""

    ranks: tuple[int, ...] = (16,) * 16
    every: int = 0
    lengths: tuple[int, int] = (1, 128)  # tokens of each row: generation, and reading a prompt

    @property
    def names(self) -> list[str]:
        """What adapter_names is given."""
        rows = []
        for i in range(len(self.ranks)):
            rows += [f"a{i}"] + ["__base__"] * (self.every > 0 and (i + 1) % self.every == 0)
        return rows

    def words(self) -> str:
        """Of its adapters, for a title."""
        least, most, plain = min(self.ranks), max(self.ranks), len(self.names) - len(self.ranks)
        ranks = f" of rank {least} to {most}" * (least < most)
        return f"{len(self.ranks)} adapters{ranks}" + (f", {plain} rows without" if plain else "")


USUAL = Batch()
MANY = Batch(ranks=tuple((4, 8, 16, 32, 64)[i % 5] for i in range(64)), every=8, lengths=(1, 16))
RANKS = "-ranks"  # end of the name of a model whose layers have MANY


def names(device: str) -> tuple[str, ...]:
    """What --model takes on this device."""
    layers = LAYERS if device == "cpu" else GPU_LAYERS
    return ("generate", *layers, *(f"{model}{RANKS}" for model in layers))


def cases(options: Options) -> list[Case]:
    """Layers of each model with one and with many tokens a row, and generation by a whole Llama-like model."""
    gpu, tiny = options.device != "cpu", options.scale == "tiny"
    dtypes = options.dtypes or (("bf16", "fp32") if options.scale == "full" and not gpu else ("bf16",))
    threads = options.threads or (1 if gpu or tiny else machine.cores(),)
    rows = []
    usual = ("llama-3-8b" if gpu else "llama-like", "generate")
    for model, dtype, t in itertools.product(options.models or usual, dtypes, threads):
        batch = MANY if model.endswith(RANKS) else USUAL
        size = len(batch.names)
        facts = {"model": model, "adapters": len(batch.ranks), "r": max(batch.ranks), "dtype": dtype, "p": 0.0}
        end = "" if gpu else f" threads={t}"
        if model == "generate":
            title = f"generate {NEW_TOKENS} tokens in {size} rows, {batch.words()}, {dtype}{end}"
            build = partial(whole, dtype, options)
            rows.append(Case(title, facts | {"shape": "a model"}, build, t, seconds=25.0))
            continue
        facts |= {"rows": size} if batch is MANY else {}
        layers = dict.fromkeys(shape[1:] for shape, _ in (GPU_LAYERS if gpu else LAYERS)[model.removesuffix(RANKS)])
        for (k, n), tokens in itertools.product([(64, 96)] if tiny else layers, batch.lengths):
            shape = f"{size} × {tokens} tokens, {k} → {n}"
            title = f"{model} {shape}, {batch.words()}, {dtype}{end}"
            build = partial(providers, batch, k, n, tokens, dtype, options)
            rows.append(Case(title, facts | {"M": size * tokens, "shape": shape}, build, t, seconds=8.0))
    return rows


def providers(batch: Batch, k: int, n: int, tokens: int, name: str, options: Options) -> list[Provider]:
    """frozen, stock and peft_fast, adapters in fp32 and in `name`."""
    device, dtype = torch.device(options.device), DTYPES[name]
    torch.manual_seed(0)
    base = nn.Linear(k, n, bias=False, device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn(len(batch.names), tokens, k, device=device).to(dtype)
    rows = [_provider("frozen", lambda: base(x), base)]
    for fp32 in (True, False) if dtype != torch.float32 else (True,):
        end = "" if fp32 else f" {name}"
        for title in ("stock", "peft_fast"):
            net = nn.Module()
            net.layer = copy.deepcopy(base)
            layer = _adapted(net, ["layer"], batch.ranks, fp32, fast=title == "peft_fast").base_model.model.layer
            run = partial(layer, x, adapter_names=batch.names)
            verdicts = partial(_verdicts, layer, x, batch.names, run, title == "peft_fast")
            rows.append(_provider(title + end, run, layer, verdicts))
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
    batch = USUAL.names
    ids = torch.randint(3, 4096, (len(batch), 16), device=options.device)
    length = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    stock, ours = (_adapted(copy.deepcopy(net), targets, USUAL.ranks, fp32=True, fast=fast) for fast in (False, True))
    return [
        _provider("frozen", partial(net.generate, input_ids=ids, **length), net, waits=True),
        *(
            _provider(title, partial(m.generate, input_ids=ids, adapter_names=batch, **length), m, waits=True)
            for title, m in (("stock", stock), ("peft_fast", ours))
        ),
    ]


def _adapted(net: nn.Module, targets: list[str], ranks: tuple[int, ...], fp32: bool, fast: bool) -> nn.Module:
    """A PEFT model with an adapter of each rank, a0, a1, …, none of them zero."""
    from peft import LoraConfig, get_peft_model

    import peft_fast
    from peft_fast import settings

    torch.manual_seed(0)
    first, *others = (LoraConfig(r=r, target_modules=targets, init_lora_weights=False) for r in ranks)
    model = get_peft_model(net, first, adapter_name="a0", autocast_adapter_dtype=fp32)
    for i, config in enumerate(others, 1):
        model.add_adapter(f"a{i}", config, autocast_adapter_dtype=fp32)
    if fast:
        with settings.override(quiet=True):
            peft_fast.accelerate(model)
    return model.eval()


def _provider(name: str, run, module: nn.Module, verdicts=None, waits: bool = False) -> Provider:
    """``waits``: for the device between its launches, so that no backlog hides the host's time."""
    row = inference(name, lambda _: run(), None, [*module.parameters(), *module.buffers()], verdicts)
    return dataclasses.replace(row, backlog=0.0) if waits else row


def _verdicts(layer: nn.Module, x: Tensor, batch: list[str], run, fast: bool) -> dict[str, Verdict]:
    """y against float64, row by row, no further from it than PEFT's own sequence of calls."""
    from peft_fast.ops import fast_calls

    before = fast_calls()
    with torch.no_grad():
        ours = run()
        ran = fast_calls() > before
        W = layer.base_layer.weight
        base, truth = F.linear(x, W), F.linear(x.double(), W.double())
        stock = base.clone()
        for i, name in enumerate(batch):
            if name not in layer.lora_A:
                continue
            A, B, s = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
            stock[i] += (F.linear(F.linear(x[i].to(A.dtype), A), B) * s).to(base.dtype)
            truth[i] += F.linear(F.linear(x[i].double(), A.double()), B.double()) * s
    return {"y": check(ours, stock, truth, dtype=x.dtype), "path": path(fast, ran)}
