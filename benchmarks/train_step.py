"""One fine-tuning step: forward, loss, backward, AdamW, on transformers classes with random weights."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from peft_fast import settings
from peft_fast.errors import fail

from . import gate, machine, quantized
from .criterion import Verdict
from .harness import Case, GateError, Options, Provider
from .lora_linear import DTYPES, accelerate, alone, copy_adapters, draw_adapters
from .shapes import LAYER

RANK = 16
# a whole network's rounding error is a draw of the same lottery as stock's, not the same ticket
NETWORK_SLACK = 1.5
SETTLING = 4  # steps: siblings are seen in the first, known in the second, a group in the third
JUDGED = 512  # tokens that are, of as many sequences as have them, one at the least


@dataclasses.dataclass(frozen=True)
class Model:
    """A network by its configuration; a cut vocabulary keeps the output head from hiding a few layers."""

    family: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    batch: int
    length: int
    adapters: str = "lora"


MODELS = {
    "bert-base-like": Model("bert", 768, 3072, 4, 12, 12, 8192, 4, 128),
    "gpt2-like": Model("gpt2", 768, 3072, 4, 12, 12, 8192, 4, 128),
    "llama-like": Model("llama", 1024, 2816, 4, 16, 8, 8192, 4, 128),
}
LINEAR = ".*_proj"  # of a Llama, the head left out
BOTH = "both"  # two adapters are active, and summed
NF4 = "nf4"  # QLoRA: the linear layers but the head are bitsandbytes', double-quantized
SEPARATE = ("dora", NF4)  # whose layers nothing joins
# what LoraConfig is told beside rank and dropout
ADAPTERS = {
    "lora": {},
    "dora": {"use_dora": True},
    "biases": {"bias": "all", "lora_bias": True},
    "head": {"target_modules": f"{LINEAR}|lm_head"},
    "tied": {"target_modules": f"{LINEAR}|.*embed_tokens|lm_head", "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": list(range(16))},
    "saved": {"modules_to_save": ["lm_head"]},
    "twice": {"layer_replication": [[0, 2], [0, 2]]},
    BOTH: {},
    NF4: {"target_modules": LINEAR},
}
# by name only
VARIANTS = {
    f"{name}-{adapters}": dataclasses.replace(MODELS[f"{name}-like"], adapters=adapters)
    for name, kinds in (("bert-base", "dora biases"), ("llama", "dora head tied tokens saved twice both nf4"))
    for adapters in kinds.split()
}
GPU_MODELS = {
    # one layer of it, the head and the embedding cut to next to nothing
    LAYER: Model("llama", 4096, 14336, 1, 32, 8, 256, 4, 2048),
    # as many of Llama-3-8B's layers as fit, up to what nine minutes have time for
    "llama-3-8b-like": Model("llama", 4096, 14336, 8, 32, 8, 32768, 4, 2048),
    "bert-base": Model("bert", 768, 3072, 12, 12, 12, 30522, 32, 512),
}


def names(device: str) -> tuple[str, ...]:
    """What --model takes on this device."""
    return (*MODELS, *VARIANTS) if device == "cpu" else tuple(GPU_MODELS)


def cases(options: Options) -> list[Case]:
    """The cases for this device and scale."""
    gpu = options.device != "cpu"
    full = options.scale == "full"
    threads = options.threads or (1 if gpu or options.scale == "tiny" else machine.cores(),)
    dtypes = options.dtypes or (("bf16", "fp32") if full and not gpu else ("bf16",))
    dropouts = options.dropouts or ((0.0, 0.05) if full else (0.05,))
    rows = []
    chosen = options.models or tuple(GPU_MODELS if gpu else MODELS)
    for name in chosen:
        if name.endswith(NF4):
            quantized.need(NF4, name)
    memory = _free_bytes() if gpu and full else math.inf
    for name, dtype, p, t in itertools.product(chosen, dtypes, dropouts, threads):
        model = fitting(scaled({**MODELS, **VARIANTS, **GPU_MODELS}[name], options.scale), memory)
        rows.append(_case(name, model, dtype, p, t, options, seconds=90.0 if full and not gpu else 9.0))
    if gpu:  # each model once with dropout first: time may end anywhere
        rows.sort(key=lambda case: case.settings["p"] != dropouts[-1])
    return rows


def _case(name: str, model: Model, dtype: str, p: float, t: int, options: Options, seconds: float) -> Case:
    settings = {"model": name, **dataclasses.asdict(model), "r": RANK, "dtype": dtype, "p": p}
    title = f"{name} {model.batch}×{model.length} tokens r={RANK} {dtype} p={p:g}"
    build = partial(providers, model, dtype, p, torch.device(options.device))
    smaller = None
    if options.device != "cpu" and model.layers > 1:
        half = dataclasses.replace(model, layers=model.layers // 2)
        smaller = _case(name, half, dtype, p, t, options, seconds)
    # on a GPU the number of layers is what fits, on a CPU the number of threads what there is
    gpu = options.device != "cpu"
    title = title.replace(name, f"{name} ({model.layers} layers)") if gpu else f"{title} threads={t}"
    return Case(title, settings, build, t, seconds, smaller=smaller)


def fitting(model: Model, memory: float) -> Model:
    """The model with no more layers than `memory` bytes hold beside each other in all providers, at least one."""
    width = model.hidden * (model.heads + model.kv_heads) // model.heads  # q and o, k and v
    weights = 2 * model.hidden * width + (3 if model.family == "llama" else 2) * model.hidden * model.inner
    inputs = (6 * model.hidden + model.inner) * model.batch * model.length  # of all linear layers
    # base 2, full fine-tuning 8 and the float64 gate 8 bytes a weight; stock with dropout keeps 13 an input, and the
    # rest of a layer about as many as that a hidden value
    layer = 18 * weights + 13 * inputs + 13 * 16 * model.hidden * model.batch * model.length
    head = 18 * 2 * model.vocab * model.hidden + 16 * model.vocab * model.batch * model.length
    fit = (memory - head) / layer
    return dataclasses.replace(model, layers=max(1, int(min(model.layers, fit))))


def _free_bytes() -> float:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else math.inf


def scaled(model: Model, scale: str) -> Model:
    """The model itself, with two layers when quick, a toy of its family when tiny."""
    if scale == "quick":
        return dataclasses.replace(model, layers=2)
    if scale == "tiny":
        return dataclasses.replace(
            model, hidden=64, inner=128, layers=2, heads=4, kv_heads=2, vocab=96, batch=2, length=8
        )
    return model


def network(m: Model) -> nn.Module:
    """The transformers class with its own dropout off, so that losses of two runs can be compared."""
    import transformers as tf

    tf.logging.set_verbosity_error()  # notes on defaults of a network that is only measured
    if m.family == "bert":
        config = tf.BertConfig(
            vocab_size=m.vocab, hidden_size=m.hidden, intermediate_size=m.inner, num_hidden_layers=m.layers,
            num_attention_heads=m.heads, max_position_embeddings=max(512, m.length), hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return tf.BertForSequenceClassification(config)
    if m.family == "gpt2":
        config = tf.GPT2Config(
            vocab_size=m.vocab, n_embd=m.hidden, n_inner=m.inner, n_layer=m.layers, n_head=m.heads,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return tf.GPT2LMHeadModel(config)
    config = tf.LlamaConfig(
        vocab_size=m.vocab, hidden_size=m.hidden, intermediate_size=m.inner, num_hidden_layers=m.layers,
        num_attention_heads=m.heads, num_key_value_heads=m.kv_heads, use_cache=False,
        tie_word_embeddings=m.adapters == "tied",
    )  # fmt: skip
    return tf.LlamaForCausalLM(config)


def placed(m: Model, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The network on the device; on a GPU drawn there, in its dtype: billions of weights take the CPU minutes."""
    if device.type == "cpu":
        return network(m).to(device, dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return network(m)
    finally:
        torch.set_default_dtype(before)


def providers(m: Model, dtype_name: str, p: float, device: torch.device) -> list[Provider]:
    """frozen, full fine-tuning, stock, peft_fast, with adapters in fp32 and in the dtype.

    On a CPU nothing is shared; on a GPU all but full fine-tuning share the frozen weights.
    """
    dtype = DTYPES[dtype_name]
    torch.manual_seed(0)
    base = placed(m, dtype, device).train()
    dense = quantized.in_four_bits(base, "_proj") if m.adapters == NF4 else base
    ids = torch.randint(m.vocab, (m.batch, m.length), device=device)
    batch = {"input_ids": ids, "labels": ids[:, 0] % 2 if m.family == "bert" else ids}
    low = dtype != torch.float32
    frozen = _copy(base).requires_grad_(False)
    frozen.enable_input_require_grads()  # so that dx flows through every layer, as it does in LoRA training
    rows = [_provider("frozen", frozen, batch)]
    # no weight of four bits trains
    rows += [_provider("full", copy.deepcopy(base), batch)] if m.adapters != NF4 else []
    stock = lora(base, m, p, fp32=True)
    # float64 attention keeps length² numbers a head; a classifier has a logit or two a sequence
    n = max(1, JUDGED // m.length)
    few = {k: v[:n, :JUDGED] if v.dim() > 1 else v[:n] for k, v in batch.items()}

    @functools.cache
    def judges() -> tuple[dict, dict, dict]:
        # PEFT's tied adapters are views of each other, which cannot be copied
        exact = lora(copy.deepcopy(dense).double(), m, p, fp32=True)
        copy_adapters(stock, exact) if m.adapters == NF4 else exact.load_state_dict(stock.state_dict())
        # evaluation packs bitsandbytes' layers for good: nobody that is timed may be evaluated
        judged = lora(base, m, p, fp32=True) if m.adapters == NF4 else stock
        return few, results(exact, few), results(judged, few)

    rows += [_provider("stock", stock, batch)]
    rows += [_provider(f"stock {dtype_name}", lora(base, m, p, fp32=False), batch)] if low else []
    for fp32, joined in itertools.product((True, False) if low else (True,), (True, False)):
        if not joined and (m.adapters in SEPARATE or not fp32):
            continue
        fast = lora(base, m, p, fp32)
        accelerate(fast)
        name = ("peft_fast" if fp32 else f"peft_fast {dtype_name}") if joined else "layer by layer"
        gate = partial(verdicts, fast, batch, judges, dtype, joined and m.adapters not in SEPARATE)
        rows.append(_provider(name, fast, batch, gate if joined else _one_by_one(gate), joined))
    return rows if device.type == "cpu" else alone(rows)


def lora(base: nn.Module, m: Model, p: float, fp32: bool) -> nn.Module:
    """A copy of `base` with the model's adapters; `fp32` is PEFT's default dtype for them."""
    from peft import LoraConfig, get_peft_model

    task = "SEQ_CLS" if m.family == "bert" else "CAUSAL_LM"
    usual = {"r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": p, "target_modules": "all-linear", "task_type": task}
    config = LoraConfig(**usual | {"fan_in_fan_out": m.family == "gpt2"} | ADAPTERS[m.adapters])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's use of transformers, not the user's
        model = get_peft_model(_copy(base), config, autocast_adapter_dtype=fp32).train()
        if m.adapters == BOTH:
            model.add_adapter(BOTH, config, autocast_adapter_dtype=fp32)
            model.base_model.set_adapter(["default", BOTH])
    draw_adapters(model)
    return model


def _copy(base: nn.Module) -> nn.Module:
    """Modules of its own; on a GPU around the same weights, which nobody trains."""
    shared = {id(w): w for w in base.parameters() if w.device.type != "cpu"}
    return copy.deepcopy(base, shared)


def _one_by_one(run: Callable) -> Callable:
    """The same with every layer by itself: no groups of siblings, no blocks."""

    def alone() -> object:
        with settings.override(groups=False, blocks=False):
            return run()

    return alone


def _provider(name: str, model: nn.Module, batch: dict, gate: Callable | None = None, joined: bool = True) -> Provider:
    """One step in three phases; `update` is AdamW on what trains, and forgetting the gradients."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True) if trained else None
    state = {}

    def forward() -> None:
        state["loss"] = model(**batch).loss

    def backward() -> None:
        state.pop("loss").backward()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    phases = {"forward": forward, "backward": backward, **({"update": update} if trained else {})}
    phases = phases if joined else {phase: _one_by_one(run) for phase, run in phases.items()}
    return Provider(name, phases, [*model.parameters(), *model.buffers()], gate, backlog=0.0)


def results(model: nn.Module, batch: dict) -> dict[str, Tensor]:
    """loss (), logits, and the gradients of all that trains in one vector; dropout off, its state as it was."""
    was = model.training
    model.eval()
    out = model(**batch)
    grads = torch.autograd.grad(out.loss, [p for p in model.parameters() if p.requires_grad])
    model.train(was)
    return {
        "loss": out.loss.detach(),
        "logits": out.logits.detach(),
        "gradients": torch.cat([g.flatten().float() for g in grads]),
    }


def settle(model: nn.Module, batch: dict) -> int:
    """Steps that change no weight, because groups form at an optimizer's step; ops of ours in the last one."""
    from peft_fast.ops import fast_calls

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.0)
    for _ in range(SETTLING):
        before = fast_calls()
        loss = model(**batch).loss
        calls = fast_calls() - before
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return calls


def verdicts(
    model: nn.Module, batch: dict, judges: Callable, dtype: torch.dtype, joined: bool = True
) -> dict[str, Verdict]:
    """Every kind of layer by the criterion with its dropout; then loss, logits and gradients of a few sequences,

    dropout off, against `judges()`: the sequences, their float64 results and stock's. A model that is `joined` has to
    run fewer ops than it has adapted layers, any other as many.
    """
    found = layer_verdicts(model, dtype)
    adapted = [m for m in model.modules() for kind in ("lora_A", "lora_embedding_A") if getattr(m, kind, None)]
    layers, calls = len(adapted), settle(model, batch)
    right = calls < layers if joined else calls == layers
    found["path"] = Verdict(right, f"{layers} adapted layers ran as {calls} ops")
    few, exact, stock = judges()
    ours = results(model, few)
    eps = torch.finfo(dtype).eps
    for name in ("logits", "gradients"):
        e, e0 = (_relative(r[name], exact[name]) for r in (ours, stock))
        allowed = NETWORK_SLACK * e0 + eps / 4
        reason = f"error {e:.2e} is above {allowed:.2e} (stock {e0:.2e})"
        found[name] = Verdict(e <= allowed, reason, rms=e, rms_stock=e0, rms_allowed=allowed)
    # a loss is one number: its error may be zero by luck, so stock's logits say what is rounding
    e = _relative(ours["loss"], exact["loss"])
    allowed = NETWORK_SLACK * _relative(stock["logits"], exact["logits"]) + eps
    found["loss"] = Verdict(e <= allowed, f"error {e:.2e} is above {allowed:.2e}", rms=e, rms_allowed=allowed)
    return found


def layer_verdicts(model: nn.Module, dtype: torch.dtype) -> dict[str, Verdict]:
    """Each distinct (class, K, N) among the LoRA layers, on 64 tokens, with the dropout it trains with."""
    found, judged = {}, False
    for layer in model.modules():
        if not hasattr(layer, "lora_A") or not layer.lora_A:
            continue
        name, *others = layer.active_adapters
        if others or not layer.base_layer.weight.is_floating_point():
            judged = True  # by logits and gradients of the whole network
            continue
        K, N = layer.lora_A[name].weight.shape[1], layer.lora_B[name].weight.shape[0]
        kind = f"{type(layer.base_layer).__name__} {K}→{N}"
        if f"{kind} y" not in found:
            generator = torch.Generator().manual_seed(K + N)
            device = layer.base_layer.weight.device
            x = torch.randn(64, K, generator=generator).to(device, dtype)
            g = torch.randn(64, N, generator=generator).to(device, dtype)
            checks = gate.check_layer(layer, x, g, gate.our_mask, fast=True)
            found |= {f"{kind} {out}": v for out, v in checks.items()}
    if not found and not judged:
        fail(GateError, "a model without a LoRA layer", "layers to accelerate", "check target_modules")
    return found


def _relative(out: Tensor, truth: Tensor) -> float:
    return ((out.double() - truth.double()).norm() / truth.double().norm()).item()
