"""The optimizer's groups and the schedule: each weight that trains is in one group, with its rate and its decay.

rate of a weight = head_learning_rate                           in the head: 10 · learning_rate beside adapters
                 = learning_rate · layer_decayᵏ                 k blocks below it
                   · loraplus_ratio                             for the B of an adapter
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from peft_fast.errors import SettingsError, UnsupportedError, fail
from peft_fast.recipes import structure
from peft_fast.recipes.config import Config

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from peft_fast.recipes.tasks import Task

# option -> what transformers calls it
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "wsd": "warmup_stable_decay",
    "constant": "constant_with_warmup",
    "inverse_sqrt": "inverse_sqrt",
}
LORA_B = ("lora_B", "lora_embedding_B")


def check(config: Config) -> None:
    """Refuses a name that no optimizer has, with one that is like it."""
    from transformers.training_args import OptimizerNames

    names = [kind.value for kind in OptimizerNames]
    if config.optimizer in names:
        return
    known = {name.partition("_")[0]: name for name in reversed(names)} | {name: name for name in names}
    like = difflib.get_close_matches(config.optimizer.lower(), known, n=1, cutoff=0.6)
    given = f"optimizer: {config.optimizer}" + (f"; {known[like[0]]} is one" if like else "")
    do = "correct it, or leave it out for adamw_torch"
    fail(SettingsError, given, "a name that TrainingArguments.optim takes", do)


def build(model: nn.Module, task: Task, config: Config, arguments: TrainingArguments | None = None) -> Optimizer:
    """The optimizer that `config.optimizer` names, as the Trainer makes it, over `groups`."""
    from transformers import Trainer

    try:
        cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments or _arguments(config), model)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        need = "a name that TrainingArguments.optim takes, its package installed"
        fail(SettingsError, f"optimizer: {config.optimizer}: {reason}", need, "adamw_torch is always there", error)
    made = list(groups(model, task, config))
    if (
        isinstance(cls, type)
        and issubclass(cls, Optimizer)
        and not {"params", "model", "optimizer_dict"} & set(options)
    ):
        return cls(made, **options)
    _alike(config)
    if not isinstance(cls, type) or not issubclass(cls, Optimizer):
        return cls()(model, **options)
    own = next(options.pop(key) for key in ("params", "model", "optimizer_dict") if key in options)
    return cls(own, **options)


def alone(weights: list[nn.Parameter], config: Config) -> Optimizer | None:
    """The optimizer over some weights and no model; None for one that needs a model."""
    from transformers import Trainer

    try:
        cls, options = Trainer.get_optimizer_cls_and_kwargs(_arguments(config))
        return cls(weights, **options)
    except Exception:  # those that group weights by themselves, each with an error of its own
        return None


def _arguments(config: Config) -> Any:
    """What the Trainer asks for an optimizer; TrainingArguments themselves would set accelerate's devices anew."""
    from transformers import TrainingArguments
    from transformers.training_args import OptimizerNames

    defaults = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
    own = {"optim": OptimizerNames(config.optimizer), "learning_rate": config.rate}
    return types.SimpleNamespace(**defaults | dict(config.training_arguments) | own)


def _alike(config: Config) -> None:
    """Optimizers that sort the weights by themselves know one learning rate."""
    ours = {"layer_decay": 1.0, "loraplus_ratio": 1.0, "head_learning_rate": None}
    if given := [name for name, neutral in ours.items() if getattr(config, name) != neutral]:
        what = f"optimizer: {config.optimizer}, which groups the weights itself, with {', '.join(given)}"
        fail(SettingsError, what, "an optimizer that takes a rate for each group", "adamw_torch does")


def groups(model: nn.Module, task: Task, config: Config) -> Iterator[dict[str, Any]]:
    """Groups for a torch optimizer, from the head down; `name` says what is in one."""
    parameters = dict(model.named_parameters())
    inner, prefix = structure.unwrapped(model)
    bare = task.head(inner)
    head, by_layer = [prefix + name for name in bare], structure.groups(model, bare)
    top = len(by_layer) - 1
    if config.layer_decay < 1 and top < 2:
        need = "blocks in an nn.ModuleList"
        fail(UnsupportedError, f"layer_decay for {type(inner).__name__}", need, "leave layer_decay out")
    seen: set[str] = set()
    for level in range(top, -1, -1):
        kinds: dict[tuple[float, float, str], list[str]] = {}
        for name in by_layer[level].parameters:
            if not parameters[name].requires_grad:
                continue
            rate, kind = config.rate * config.layer_decay ** (top - level), ""
            if structure.within(name, head):
                rate, kind = config.head_rate, "head"
            elif any(f".{b}." in name for b in LORA_B):
                rate, kind = rate * config.loraplus_ratio, "B"
            # of matrices only: a bias or a norm is no function that could be too steep
            decay = config.weight_decay if parameters[name].ndim > 1 else 0.0
            kinds.setdefault((rate, decay, kind), []).append(name)
        for (rate, decay, kind), names in kinds.items():
            assert not seen & set(names)
            seen.update(names)
            title = " ".join(filter(None, [", ".join(by_layer[level].titles), kind, "" if decay else "no decay"]))
            params = [parameters[name] for name in names]
            yield {"params": params, "lr": rate, "weight_decay": decay, "name": title, "parameter_names": names}
    missed = [name for name, p in parameters.items() if p.requires_grad and name not in seen]
    assert not missed, f"{missed} would not train"


def warmup_steps(config: Config, steps: int) -> int:
    """Steps of the warm-up, of ``steps`` in all."""
    warmup = math.ceil(steps * config.warmup) if config.warmup < 1 else int(config.warmup)
    if warmup >= steps > 1:
        do = "a smaller warmup, or more epochs"
        fail(SettingsError, f"warmup: {warmup} of {steps} steps", "a warm-up that ends before training does", do)
    return warmup


def schedule(optimizer: Optimizer, config: Config, steps: int) -> LRScheduler:
    """The course of every group's rate over ``steps`` optimizer steps."""
    from transformers import get_scheduler

    warmup = warmup_steps(config, steps)
    specific: dict[str, Any] = {}
    if config.schedule == "wsd":
        specific["num_decay_steps"] = min(max(1, round(steps * config.decay)), steps - warmup)
    elif config.schedule == "inverse_sqrt" and not warmup:
        specific["timescale"] = max(1, steps // 10)
    return get_scheduler(SCHEDULES[config.schedule], optimizer, warmup, steps, specific or None)
