"""report(model): which LoRA layers are fast, which stay with PEFT and why, and how many calls each way."""

from __future__ import annotations

import dataclasses
import sys

from torch import nn

from peft_fast import dispatch, settings
from peft_fast.errors import UnsupportedError, fail
from peft_fast.patch import blocks, conv, dora, embedding, experts, groups, guard, ledger, plan, quantized
from peft_fast.patch.known import forward_known
from peft_fast.patch.marks import state, wanted

SHOWN = 3  # layer names printed for one reason


@dataclasses.dataclass(frozen=True)
class Report:
    """Layers by name and calls by reason; print it, or read the fields."""

    fast: tuple[str, ...]  # layers that take the fast path as they are now
    slow: dict[str, str]  # layer -> why it stays with PEFT
    fast_calls: int
    handed_back: dict[str, int]  # reason -> calls given to PEFT's own forward
    plain: dict[str, str] = dataclasses.field(default_factory=dict)  # fast layer -> why no compiled kernel runs it
    failures: tuple[str, ...] = ()  # kernels that failed on this machine, whose calls torch runs
    groups: tuple[tuple[str, ...], ...] = ()  # layers that read one x and run as one, found at run time
    blocks: tuple[str, ...] = ()  # MLP blocks that run as one
    not_blocks: dict[str, str] = dataclasses.field(default_factory=dict)  # module that may be a block -> why it is none
    group_calls: int = 0
    block_calls: int = 0
    quantized: dict[str, str] = dataclasses.field(default_factory=dict)  # fast layer over a quantized base -> its kind
    traced: tuple[str, ...] = ()  # why torch.compile took PEFT's own forward for some calls of this process

    def __str__(self) -> str:
        lines = []
        if layers := len(self.fast) + len(self.slow):
            lines.append(f"peft_fast: {len(self.fast)} of {layers} LoRA layers are fast")
        if self.groups or self.blocks:
            lines.append(f"  {len(self.groups)} groups of layers with one input, {len(self.blocks)} MLP blocks")
        # compiled code counts no calls, and before it is there nothing else would tell
        lines += _grouped("over a quantized base (PEFT's own under torch.compile)", self.quantized)
        lines += _grouped("layer by layer", self.not_blocks)
        lines += _grouped("with PEFT", self.slow) + _grouped("by torch's own GEMMs", self.plain)
        lines += [f"  {failure}" for failure in self.failures]
        if self.fast_calls or self.handed_back or not lines:
            lines.append(self.calls())
            lines += [f"  {n:,} times: {reason}" for reason, n in self.handed_back.items()]
        lines += [f"  PEFT's own where torch.compile met it: {reason}" for reason in self.traced]
        return "\n".join(lines)

    def calls(self) -> str:
        """The calls in one line."""
        slow = sum(self.handed_back.values())
        together = f" ({self.group_calls:,} groups and {self.block_calls:,} blocks ran as one)"
        together = together if self.group_calls or self.block_calls else ""
        return f"peft_fast: {self.fast_calls:,} fast calls{together}, {slow:,} handed back to PEFT"


def _grouped(what: str, reasons: dict[str, str]) -> list[str]:
    """{layer: reason} -> a line a reason, with the first layers' names."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    lines = []
    for reason, group in names.items():
        more = f", and {len(group) - SHOWN} more" if len(group) > SHOWN else ""
        lines.append(f"  {len(group)} {what}: {reason} ({', '.join(group[:SHOWN])}{more})")
    return lines


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> layer, for every LoRA layer of PEFT inside ``model``; imports nothing."""
    if not isinstance(model, nn.Module):
        fail(
            UnsupportedError,
            f"a {type(model).__name__}",
            "a torch.nn.Module with PEFT LoRA layers inside",
            "pass the model that get_peft_model or add_adapter returned",
        )
    layer = sys.modules.get("peft.tuners.lora.layer")
    if layer is None:  # without it nobody can have made one
        return {}
    return {name: module for name, module in model.named_modules() if isinstance(module, layer.LoraLayer)}


def some_lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The same of a model that must have one."""
    layers = lora_layers(model)
    if not layers:
        fail(
            UnsupportedError,
            f"a {type(model).__name__} without a LoRA layer of PEFT",
            "a model with PEFT LoRA adapters",
            "call get_peft_model(model, LoraConfig(...)) or model.add_adapter(...) first",
        )
    return layers


def report(model: nn.Module | None = None) -> Report:
    """What is fast in ``model`` now, and its calls since accelerate(); without a model, the process's."""
    if model is None:
        failures = tuple(dispatch.failures())
        calls = ledger.process()
        return Report(
            (),
            {},
            calls.fast,
            dict(calls.handed_back),
            failures=failures,
            group_calls=calls.groups,
            block_calls=calls.blocks,
            traced=ledger.traced(),
        )
    layers = some_lora_layers(model)
    reasons = {name: _never_called(name, layers) or why_slow(layer) for name, layer in layers.items()}
    names = {layer: name for name, layer in layers.items()}
    mlps = blocks.reasons(model)
    found = [tuple(names[m] for m in g.layers() if m in names) for g in groups.groups_of(names)]
    calls = ledger.total(model.modules())
    plain = {name: why_plain(layers[name]) for name, reason in reasons.items() if not reason}
    bases = {name: quantized.kind_of(layers[name]) for name in plain}
    return Report(
        tuple(plain),
        {name: reason for name, reason in reasons.items() if reason},
        calls.fast,
        dict(calls.handed_back),
        {name: reason for name, reason in plain.items() if reason},
        tuple(dispatch.failures()),
        # siblings inside a block that runs are no group of their own any more
        groups=tuple(g for g in found if g and mlps.get(g[0].rpartition(".")[0]) != ""),
        blocks=tuple(name for name, reason in mlps.items() if not reason),
        not_blocks={name: reason for name, reason in mlps.items() if reason},
        group_calls=calls.groups,
        block_calls=calls.blocks,
        quantized={name: kind for name, kind in bases.items() if kind},
        traced=ledger.traced(),
    )


def _never_called(name: str, layers: dict[str, nn.Module]) -> str:
    """Why a layer's forward does not run at all; empty if it does."""
    while name:
        name = name.rpartition(".")[0]
        if type(layers.get(name)).__name__ == "MultiheadAttention":
            return "a part of lora.MultiheadAttention, which computes with its weights"
    return ""


def why_plain(layer: nn.Module) -> str:
    """Why no compiled kernel would run a fast layer on inputs of its base's dtype; empty where one does."""
    if quantized.kind_of(layer):
        return quantized.why_plain(layer)
    if magnified := dora.found(layer, embedding.plan_of):
        choice = dora.choice(magnified)
    elif type(layer) is plan.Embedding:
        W, adapters, *_ = embedding.plan_of(layer)
        tensors = [t for a in adapters for t in (a.A, a.B)]
        choice = dispatch.pick(W, W.dtype, W, tensors, op="lora_embedding")
    elif type(layer) is experts.ParamWrapper:
        choice = experts.choice(experts.plan_of(layer))
    else:
        found = conv.plan_of(layer).linear if type(layer) in conv.kinds else plan.plan_of(layer)
        W, bias, adapters, _ = found
        others = [t for t in (bias, *[t for a in adapters for t in (a.A, a.bias)]) if t is not None]
        exact = settings.get().exact or dispatch.must_be_exact(W.dtype, [a.A for a in adapters])
        dropout = any(a.p > 0 for a in adapters)
        choice = dispatch.pick(W, W.dtype, W, others, exact, dropout=dropout)
    return choice.reason if choice.backend == "torch" else ""


def why_slow(layer: nn.Module) -> str:
    """Why a LoRA layer's next call goes to PEFT whatever its input; empty if it is fast."""
    known, why = forward_known()
    if not known:
        return why
    if state.off:
        return "switched off for the whole process by peft_fast.disable()"
    if type(layer).forward is embedding.forward:
        plan_of = embedding.plan_of
    elif type(layer).forward is quantized.forward or (type(layer).forward is guard.forward and quantized.takes(layer)):
        plan_of = quantized.plan_of
    elif type(layer).forward is conv.forward:
        plan_of = conv.plan_of
    elif type(layer).forward is experts.forward:
        plan_of = experts.plan_of
    elif type(layer).forward is guard.forward:
        plan_of = plan.plan_of
    elif type(layer) in conv.kinds and not forward_known("_ConvNd")[0]:
        return forward_known("_ConvNd")[1]
    elif (name := type(layer).__name__) in ("Embedding", "ParamWrapper") and not forward_known(name)[0]:
        return forward_known(name)[1]
    elif (
        issubclass(type(layer), (plan.Linear, plan.Embedding, *conv.kinds, experts.ParamWrapper))
        and plan.Linear.forward is not guard.forward
    ):
        return "not asked for: call peft_fast.accelerate(model)"
    else:
        return f"{type(layer).__module__.rpartition('.')[2]}.{type(layer).__name__} has no fast path"
    if not wanted(layer):
        return "not asked for: call peft_fast.accelerate(model)"
    if settings.get().disable:
        return "PEFT_FAST_DISABLE is set"
    found = dora.found(layer, embedding.plan_of) or plan_of(layer)
    return found if isinstance(found, str) else ""
