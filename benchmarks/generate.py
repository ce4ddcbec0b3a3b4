"""A language model that generates with adapters on, one sequence at a time: merged, stock PEFT, and peft_fast.

Merged is what the adapters may cost nothing beside: PEFT's merge_and_unload, plain nn.Linear layers. All three are
copies of one model, and generate the same number of tokens greedily from the same words. By name also with DoRA
adapters, over bitsandbytes' NF4, and merged.py's rows of what it costs to merge and to go back.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from peft_fast import settings

from . import dora, machine, merged, quantized
from .blocks import RANK
from .criterion import Verdict, check
from .gate import adapter, in_float64, lora, path, weights
from .harness import Case, Options, Provider
from .lora_linear import DTYPES, copy_adapters
from .train_step import NETWORK_SLACK

Around = Callable[[Callable], Callable]  # what a function is called in

SMOLLM2 = "smollm2-135m"
PROMPT = 16  # tokens
NEW = {"full": 64, "quick": 16, "tiny": 2}


def as_it_is(run: Callable) -> Callable:
    """The same function."""
    return run


@dataclass(frozen=True)
class Llama:
    """A random Llama with as many heads as 64 elements each allow, a quarter of them for k and v."""

    hidden: int
    inner: int
    layers: int
    vocabulary: int = 32000


LLAMAS = {"llama-1024": Llama(1024, 2816, 12), "llama-2048": Llama(2048, 5632, 8)}
# no GPU machine has a network for certain, so nothing there is downloaded
GPU_LLAMAS = {"llama-3-8b-like": Llama(4096, 14336, 8), "llama-1024": LLAMAS["llama-1024"]}
TINY = Llama(128, 192, 2, 64)
DORA, MERGED = "-dora", "-merged"  # ends of the names of models with DoRA, and of rows that enter and leave merged()
NF4 = "-nf4"  # of models whose linear layers but the head are bitsandbytes', double-quantized


def names(device: str) -> tuple[str, ...]:
    """What --model takes on this device."""
    ends = ("", DORA, NF4, MERGED, DORA + MERGED)
    return tuple(model + end for end in ends for model in _models(device))


def _models(device: str) -> tuple[str, ...]:
    return (SMOLLM2, *LLAMAS) if device == "cpu" else tuple(GPU_LLAMAS)


def cases(options: Options) -> list[Case]:
    """One row for each model and dtype."""
    gpu, new, rows = options.device != "cpu", NEW[options.scale], []
    full = options.scale == "full"
    dtypes = options.dtypes or (("bf16", "fp32") if full and not gpu else ("bf16",))
    models = options.models or (_models(options.device) if full else tuple(GPU_LLAMAS if gpu else LLAMAS)[:1])
    threads = options.threads or (1 if gpu else machine.cores(),)
    for name, dtype, t in itertools.product(models, dtypes, threads):
        if name.endswith(NF4):
            quantized.need("nf4", name)
        end = f"r={RANK} {dtype}" + ("" if gpu else f" threads={t}")
        facts = {"model": name, "r": RANK, "dtype": dtype, "p": 0.0}
        made = partial(_pair, name, DTYPES[dtype], options.scale == "tiny", options.device)
        if name.endswith(MERGED):
            title = f"{name.removesuffix(MERGED)} merged and back {end}"
            rows.append(Case(title, facts, partial(merged.providers, made), t, seconds=30.0, baseline="stock"))
            continue
        count = min(new, NEW["quick"]) if DORA in name else new  # of which each takes stock PEFT seconds
        facts |= {"tokens": count, "prompt": PROMPT}
        make = partial(providers, name, DTYPES[dtype], count, options.scale == "tiny", options.device)
        title, seconds = f"{name} {count} tokens {end}", 15.0 if gpu else 90.0
        rows.append(Case(title, facts, make, t, seconds=seconds, baseline="merged"))
    return rows


def _pair(name: str, dtype: torch.dtype, tiny: bool, device: str) -> tuple[nn.Module, nn.Module]:
    """A model with adapters, stock PEFT's and ours."""
    torch.manual_seed(0)
    stock = adapted(network(name, tiny, device).to(dtype).eval(), with_dora=DORA in name)
    return stock, accelerated(copy.deepcopy(stock))


def accelerated(model: nn.Module) -> nn.Module:
    """The same model."""
    import peft_fast

    with settings.override(quiet=True):
        peft_fast.accelerate(model)
    return model


def providers(name: str, dtype: torch.dtype, new: int, tiny: bool, device: str = "cpu") -> list[Provider]:
    """merged, stock and peft_fast; the last also with adapters in the model's own dtype, DoRA inside DoraCaching."""
    torch.manual_seed(0)
    net, with_dora = network(name, tiny, device).to(dtype).eval(), DORA in name
    dense = quantized.in_four_bits(net, "_proj") if NF4 in name else None
    ids = torch.randint(1, net.config.vocab_size, (1, PROMPT), device=device)
    stock = adapted(net, with_dora=with_dora)
    ours = accelerated(copy.deepcopy(stock))
    rows = [
        _provider("merged", copy.deepcopy(stock).merge_and_unload(), ids, new),
        _provider("stock", stock, ids, new),
        _provider("peft_fast", ours, ids, new, partial(verdicts, ours, stock, ids, new, dense=dense)),
    ]
    if with_dora:
        gate = partial(verdicts, ours, stock, ids, new, dora.cached)
        # a model of its own: the others' calls clear what PEFT keeps
        rows.append(_provider("stock cached", copy.deepcopy(stock), ids, new, around=dora.cached))
        rows.append(_provider("peft_fast cached", ours, ids, new, gate, dora.cached))
    if dtype != torch.float32:
        same = accelerated(adapted(net, fp32=False, with_dora=with_dora))
        rows.append(_provider(f"peft_fast {_short(dtype)}", same, ids, new))
    return rows


def network(name: str, tiny: bool, device: str = "cpu") -> nn.Module:
    """The model in float32, pretrained where that is what it is."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    name = name.removesuffix(MERGED).removesuffix(DORA).removesuffix(NF4)
    if name == SMOLLM2 and not tiny:
        from peft_fast.recipes import examples

        return AutoModelForCausalLM.from_pretrained(examples.path("example:smollm2", say=print), dtype=torch.float32)
    m = TINY if tiny else (LLAMAS | GPU_LLAMAS)[name]
    heads = m.hidden // 64
    config = LlamaConfig(
        vocab_size=m.vocabulary, hidden_size=m.hidden, intermediate_size=m.inner, num_hidden_layers=m.layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 4), tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config)


def adapted(net: nn.Module, fp32: bool = True, with_dora: bool = False) -> nn.Module:
    """A copy with adapters on every linear layer but the head, whose B is not zero, nor the magnitude a norm."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    options = {"target_modules": "all-linear", "lora_dropout": 0.05, "use_dora": with_dora}
    config = LoraConfig(r=RANK, lora_alpha=RANK, **options)
    model = get_peft_model(copy.deepcopy(net), config, autocast_adapter_dtype=fp32).eval()
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.02)
        elif "lora_magnitude" in parameter_name:
            parameter.data.mul_(1 + 0.05 * torch.randn_like(parameter))
    return model


def generated(model: nn.Module, ids: Tensor, new: int) -> Tensor:
    """The ids and ``new`` more, greedily."""
    with torch.no_grad(), settings.override(min_tokens=settings.Settings().min_tokens):
        return model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip


def verdicts(
    ours: nn.Module,
    stock: nn.Module,
    ids: Tensor,
    new: int,
    around: Around = as_it_is,
    dense: nn.Module | None = None,
) -> dict[str, Verdict]:
    """Every kind of layer by the criterion; the logits, and in float32 the very tokens, against stock PEFT's.

    ``dense`` has the weights that quantized ones mean. Of these the logits alone are compared: bitsandbytes computes
    some products in bfloat16, whose rounding decides between close tokens.
    """
    return around(partial(_verdicts, ours, stock, ids, new, dense))()


def _verdicts(ours: nn.Module, stock: nn.Module, ids: Tensor, new: int, dense: nn.Module | None) -> dict[str, Verdict]:
    from peft_fast.ops import fast_calls

    dtype = next(p.dtype for p in stock.parameters() if p.is_floating_point())
    # settings as users have them: the command counts every call as large enough
    with torch.no_grad(), settings.override(min_tokens=settings.Settings().min_tokens):
        found = _layer_verdicts(ours, stock, dtype) if dense is None else {}
        before = fast_calls()
        y, expected = (model(input_ids=ids).logits for model in (ours, stock))
        found["path"] = path(True, fast_calls() - before == len(_lora(ours)))
        exact = copy.deepcopy(stock) if dense is None else copy_adapters(stock, adapted(dense))
        truth = dora.cached(exact.double(), False)(input_ids=ids).logits
    e, e0 = ((out.double() - truth).norm().item() / truth.norm().item() for out in (y, expected))
    allowed = NETWORK_SLACK * e0 + torch.finfo(dtype).eps / 4
    reason = f"error {e:.2e} is above {allowed:.2e} (stock {e0:.2e})"
    found["logits"] = Verdict(e <= allowed, reason, rms=e, rms_stock=e0, rms_allowed=allowed)
    if dtype == torch.float32 and dense is None:
        same = torch.equal(generated(ours, ids, new), generated(stock, ids, new))
        found["tokens"] = Verdict(same, "other tokens than stock PEFT's")
    return found


def _layer_verdicts(ours: nn.Module, stock: nn.Module, dtype: torch.dtype) -> dict[str, Verdict]:
    """Each distinct (K, N) among the adapted layers, on as many tokens as the prompt has."""
    found = {}
    for fast, slow in zip(_lora(ours), _lora(stock), strict=True):
        A, B = adapter(slow)
        K, N = A.shape[1], B.shape[0]
        if (name := f"{K}→{N}") not in found:
            x = torch.randn(PROMPT, K, generator=torch.Generator().manual_seed(K + N)).to(A.device, dtype)
            truth = lora(x.double(), in_float64(weights(slow, torch.float64)), None)
            found[name] = check(fast(x), slow(x), truth, dtype=dtype)
    return found


def _lora(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if getattr(module, "lora_A", None)]


def _provider(
    name: str, model: nn.Module, ids: Tensor, new: int, gate: Callable | None = None, around: Around = as_it_is
) -> Provider:
    kept = [*model.parameters(), *model.buffers()]
    # every token waits for the one before it: on a GPU there is no queue to fill
    return Provider(name, {"generate": around(partial(generated, model, ids, new))}, kept, gate, backlog=0.0)


def _short(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known is dtype)
