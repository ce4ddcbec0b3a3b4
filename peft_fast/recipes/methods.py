"""Methods: which weights train, in which dtype they are held, and which options go together.

What trains is held in float32, since steps of a learning rate are lost in bfloat16's eight bits. What is frozen is
held in the run's dtype and computed in it, with casts where the two meet: autocast was measured to be no faster, and
kernels see the dtype that they are made for. Where biases of frozen layers or everything trains, autocast it is.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft_fast.errors import DeviceError, SettingsError, UnsupportedError, fail
from peft_fast.recipes import adapters, structure
from peft_fast.recipes.config import ADAPTERS, Config

if TYPE_CHECKING:
    from peft_fast.recipes.tasks import Task

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# of PEFT's initialisations those that need nothing but the weights, and come out the same at every load
INITS = ("gaussian", "pissa", "olora", "orthogonal")

layers = structure.layers


def check(config: Config, task: Task) -> None:
    """Raises SettingsError with every pair of options that excludes each other, before anything is read."""
    if wrong := list(_contradictions(config, task)):
        given = "\n  ".join([f"{len(wrong)} option{'s' * (len(wrong) > 1)} that cannot be meant:", *wrong])
        fail(SettingsError, given, "options that act on this run", "leave them out or change what they name")


def _contradictions(config: Config, task: Task) -> Iterator[str]:
    given = config.model_fields_set
    if config.method == "head":
        if config.layer_decay != 1:
            yield "layer_decay: nothing below the head trains with method head"
        if config.head_learning_rate and config.learning_rate:
            yield "head_learning_rate: the head is all that trains with method head; give learning_rate alone"
    if config.schedule != "wsd" and "decay" in given:
        yield f"decay: schedule {config.schedule} has no such part, only wsd"
    if config.warmup > 1 and config.warmup != int(config.warmup):
        yield f"warmup: {config.warmup}; a share below 1 or a whole number of steps"
    if config.schedule == "wsd" and config.warmup < 1 and config.warmup + config.decay > 1:
        yield f"warmup, decay: {config.warmup} + {config.decay} of the steps is more than all"
    if config.method == "gradual":
        other = "unfreeze_every" if config.unfreeze_by == "plateau" else "unfreeze_patience"
        if other in given:
            yield f"{other}: means nothing where unfreeze_by is {config.unfreeze_by}"
        if config.unfreeze_by == "plateau" and 0 < config.early_stopping <= config.unfreeze_patience:
            yield (
                f"early_stopping: {config.early_stopping}; training would end at the plateau that unfreezes, "
                f"after {config.unfreeze_patience}"
            )
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights not in INITS:
        why = "PEFT draws it anew or needs more than the weights"
        yield f"init_lora_weights: {config.init_lora_weights}; true, false, {', '.join(INITS)} ({why} for others)"
    if config.init_lora_weights == "orthogonal" and config.r % 2:
        yield f"init_lora_weights: orthogonal needs an even r, not {config.r}"
    if config.method == "dora" and config.init_lora_weights in ("pissa", "olora"):
        yield f"init_lora_weights: {config.init_lora_weights} changes the weights that dora takes its magnitudes from"
    if config.target_modules == []:
        yield "target_modules: an empty list"


def dtypes(config: Config, modality: str = "text") -> tuple[torch.dtype, dict[str, Any]]:
    """(dtype to load the model in, what TrainingArguments needs for it)."""
    gpu = config.device != "cpu" and torch.cuda.is_available()
    name = config.dtype
    if name == "auto":
        # the scales and values of a series need more digits, and its models are small
        name = "bf16" if modality != "series" and _multiplies_bf16(gpu) else "fp32"
    if name == "fp16" and not gpu:
        fail(DeviceError, "dtype: fp16 on a CPU", "a GPU, or bf16 or fp32", "set dtype to auto")
    arguments: dict[str, Any] = {}
    if config.gradient_checkpointing:  # the old kind finds no gradient where everything below is frozen
        arguments["activation_checkpointing_kwargs"] = {"use_reentrant": False}
    autocast = config.method in ("full", "gradual") or config.lora_bias != "none" or modality == "series"
    # fp16's small gradients vanish without the loss scaling that the Trainer's fp16 brings
    if name != "fp32" and (autocast or name == "fp16"):
        arguments[name] = True
    return (torch.float32 if autocast else DTYPES[name]), arguments


def _multiplies_bf16(gpu: bool) -> bool:
    if gpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def prepare(model: nn.Module, task: Task, config: Config) -> nn.Module:
    """The model as loaded -> the model as it trains; a PEFT model for lora and dora."""
    check(config, task)
    head = _outermost(task.head(model))
    _known(model, head)
    if config.dropout is not None:
        set_dropout(model, config.dropout)
    if config.head_learning_rate and not head and config.method != "head":
        need = "a task that adds a head, such as classification"
        fail(SettingsError, f"head_learning_rate for {config.task}", need, "leave head_learning_rate out")
    if config.method in ADAPTERS:
        held = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        model = adapters.add(model, task, config, head)
        _hold(model, held, head)
    elif config.method == "head":
        held = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        head = head or _output_layer(model, config)
        for name, p in model.named_parameters():
            p.requires_grad_(structure.within(name, head))
        _hold(model, held, head)
    elif getattr(model, "is_quantized", False):
        do = "use lora, or load the model as it is"
        fail(UnsupportedError, f"a quantized model and method {config.method}", "weights that can train", do)
    else:
        _float32(model)
    if not any(p.requires_grad for p in model.parameters()):
        fail(UnsupportedError, f"{type(model).__name__}: nothing trains", "a weight that trains", "use another method")
    return model


def _outermost(names: Sequence[str]) -> list[str]:
    return [n for n in names if not structure.within(n, [other for other in names if other != n])]


def _known(model: nn.Module, names: Sequence[str]) -> None:
    found = dict(model.named_modules())
    assert not (strange := [name for name in names if name not in found]), f"no module {strange}"


def _output_layer(model: nn.Module, config: Config) -> list[str]:
    """The layer before the logits, where a task has no head of its own and no other weight shares it."""
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    given, do = f"method head for {config.task}", "use lora, dora, full or gradual"
    if layer is None:
        fail(SettingsError, given, f"a head; {type(model).__name__} has none of its own", do)
    names = [name for name, module in model.named_modules() if module is layer]
    own = {id(p) for p in layer.parameters()}
    shared = [n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in own]
    if outside := [n for n in shared if not structure.within(n, names)]:
        fail(SettingsError, given, f"an output layer of its own; {names[0]} is tied to {outside[0]}", do)
    return names[:1]


# ---- dtypes


def _float32(model: nn.Module) -> None:
    for p in model.parameters():
        if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16):
            p.data = p.data.float()


def _hold(model: nn.Module, held: torch.dtype, head: Sequence[str]) -> None:
    """Float32 for what trains, with inputs cast for it; what a module in the midst gives is cast back."""
    _float32(model)
    if held == torch.float32:
        return
    inner, _ = structure.unwrapped(model)
    name = getattr(inner, "main_input_name", "input_ids")
    # pictures, sound: float32 as the processor gives them, and not every model casts them
    inner.register_forward_pre_hook(_Cast(held, name), with_kwargs=True)
    # a head inside another module, as BERT's transform before its frozen decoder, is in the midst as well
    ends = [name for name in head if "." not in name]
    done: list[str] = []
    for path, module in inner.named_modules():
        if _is_adapter(module):  # casts by itself
            done.append(path)
        if not path or structure.within(path, done) or isinstance(module, nn.ModuleDict | nn.ModuleList):
            continue
        parameters = list(module.parameters())
        if parameters and all(p.requires_grad for p in parameters):
            done.append(path)
            module.register_forward_pre_hook(_Cast(torch.float32), with_kwargs=True)
            if not structure.within(path, ends):
                module.register_forward_hook(_CastBack(held))


def _is_adapter(module: nn.Module) -> bool:
    layer = sys.modules.get("peft.tuners.tuners_utils")  # without it nobody can have made one
    return layer is not None and isinstance(module, layer.BaseTunerLayer)


class _Cast:
    """Forward pre-hook: floating tensors to a dtype, or only that argument. A class: it can be copied and saved."""

    def __init__(self, dtype: torch.dtype, name: str | None = None) -> None:
        self.dtype, self.name = dtype, name

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self.name is None:
            return tuple(map(self._cast, args)), {key: self._cast(value) for key, value in kwargs.items()}
        return args, {key: self._cast(value) if key == self.name else value for key, value in kwargs.items()}

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


class _CastBack:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return output.to(self.dtype) if isinstance(output, torch.Tensor) and output.is_floating_point() else output


# ---- dropout


def set_dropout(model: nn.Module, p: float) -> None:
    """Every dropout probability of the model and its config; stochastic depth and masking are none."""
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        # some models have nothing there where they were built without dropout
        if isinstance(module, nn.Identity) and "drop" in name and "path" not in name:
            setattr(model.get_submodule(parent), name, nn.Dropout(p))
    count = sum(_set(module, p) for module in model.modules() if "DropPath" not in type(module).__name__)
    for config in {id(c): c for c in _configs(getattr(model, "config", None))}.values():
        count += _set(config, p)
    if not count:
        fail(SettingsError, f"dropout: {p} for {type(model).__name__}", "a model with dropout", "leave dropout out")


def _configs(config: Any) -> Iterator[Any]:
    if config is not None:
        yield config
        for value in list(vars(config).values()):
            if hasattr(value, "to_dict"):
                yield from _configs(value)


def _set(owner: Any, p: float) -> int:
    names = [name for name, value in vars(owner).items() if _is_dropout(name, value)]
    if isinstance(owner, nn.modules.dropout._DropoutNd):
        names.append("p")
    from huggingface_hub.errors import StrictDataclassError

    for name in names:
        # MPT's config holds one as a whole number, and its modules have read it already
        with contextlib.suppress(StrictDataclassError):
            setattr(owner, name, p)
    return len(names)


def _is_dropout(name: str, value: Any) -> bool:
    number = isinstance(value, float | int) and not isinstance(value, bool) and 0 <= value < 1
    name = name.lower()
    return number and ("dropout" in name or "pdrop" in name or name == "drop_prob")
