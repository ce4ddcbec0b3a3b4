"""Forecast: what a run will take, before it starts, from a step that is rehearsed without arithmetic.

    memory = weights + gradients + optimizer + activations        at the moment when they are most

Activations are whatever else lives then: what autograd keeps, and the temporaries of the operators. The batch is
the longest that training has. A library's own workspace inside an operator is unseen; so is the process itself.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from peft_fast.recipes import methods, optimizer, rehearse, structure
from peft_fast.recipes.config import ADAPTERS, Config

if TYPE_CHECKING:
    from datasets import Dataset

    from peft_fast.recipes.tasks import Task

LOOKED_AT = 2000  # rows whose length is asked, spread over all
BIG = 2 << 30  # bytes of weights that a plan does not load
FEW = 2  # rows of a step that has to be performed
SHRUNK = 8  # of a weight's sizes, where only the kind of an optimizer's state is asked


def load(task: Task, dtype: torch.dtype) -> tuple[nn.Module, bool]:
    """(model, whether it has its weights): those of a big one stay on disk, shapes are all a plan needs."""
    config = task.config
    options = config.model_options | {"device_map": "meta"}
    if "gguf_file" not in options:
        task.config = config.model_copy(update={"model_options": options})
        try:
            model = task.load_model(dtype)
            if structure.bytes_of(model.parameters()) > BIG:
                model.hf_device_map = None
                return model, False
        finally:
            task.config = config
    return task.load_model(dtype), True


def forecast(
    config: Config, task: Task, model: nn.Module, features: Dataset | dict[str, Dataset], lengths: Sequence[int] = ()
) -> dict[str, Any]:
    """What the run takes, as JSON. ``features`` are encoded rows: those of training, or a mapping of the splits."""
    train = features["train"] if isinstance(features, dict) else features
    rows, sizes = _lengths(task, train, lengths)
    each_step = config.batch_size * config.gradient_accumulation
    an_epoch = max(1, math.ceil(math.ceil(len(train) / config.batch_size) / config.gradient_accumulation))
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = {
        "parameters": parameters,
        "trainable": trainable,
        "trainable_share": trainable / max(1, parameters),
        "layers": _layers(model, task),
        "steps": config.steps or math.ceil(config.epochs * an_epoch),
        "steps_per_epoch": an_epoch,
        "units_per_step": round(sum(sizes) / max(1, len(sizes)) * each_step),
        "longest": max(sizes, default=0),
    }
    longest = [rows[i] for i in sorted(range(len(sizes)), key=lambda i: -sizes[i])]
    memory, fast, notes = _memory(config, task, model, train, longest)
    if config.method == "gradual":
        notes.append("memory is that of the last stage, when every layer trains")
    return {**found, "memory": memory, "fast": fast, "notes": notes}


def _lengths(task: Task, train: Dataset, lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """(places of rows, their sizes): all if they are known, else a sample."""
    if lengths:
        return list(range(len(train))), [int(n) for n in lengths]
    step = max(1, math.ceil(len(train) / LOOKED_AT))
    places = list(range(0, len(train), step))
    if task.modality != "text":
        # a picture is opened to be measured, and all have one size
        places = places[:: max(1, len(places) // 32)]
    return places, [int(task.length(train[i])) for i in places]


def _layers(model: nn.Module, task: Task) -> dict[str, int]:
    """Part -> weights that train in it."""
    parameters = dict(model.named_parameters())
    groups = structure.groups(model, task.head(structure.unwrapped(model)[0]))

    def count(some: Sequence[structure.Group]) -> int:
        return sum(parameters[n].numel() for g in some for n in g.parameters if parameters[n].requires_grad)

    parts = {
        "head": count(groups[-1:]),
        f"{len(groups) - 2} blocks": count(groups[1:-1]),
        "embeddings": count(groups[:1]),
    }
    return {name: number for name, number in parts.items() if number}


def _memory(
    config: Config, task: Task, model: nn.Module, train: Dataset, longest: list[int]
) -> tuple[dict[str, int], dict[str, Any], list[str]]:
    held = {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = structure.bytes_of(trained)
    states, notes = optimizer_bytes(model, config), []
    device = next(model.parameters()).device
    if device.type == "meta":
        device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    peaks, fast = [], {}
    for training in (True, False):
        most, found, note = _rehearsed(config, task, model, train, longest, device, training)
        peaks.append(most if training else most + gradients)
        fast = fast or found
        notes += [note] if note and note not in notes else []
    if device.type == "cuda" and config.optimizer.startswith("adamw_torch") and "fused" not in config.optimizer:
        peaks.append(2 * gradients)  # it updates all weights at once, with a temporary of their size
    memory = {
        "weights": structure.bytes_of(held) + _packed(config, model, device),
        "gradients": gradients,
        "optimizer": states,
        "activations": max([0, *(peak - gradients for peak in peaks)]),
    }
    return memory | {"total": sum(memory.values())}, fast, notes


def _rehearsed(
    config: Config, task: Task, model: nn.Module, train: Dataset, longest: list[int], device: torch.device,
    training: bool,
) -> tuple[int, dict[str, Any], str]:  # fmt: skip
    """(peak of one step, or of one batch of evaluation; what peft_fast takes of the model; what is to be said)."""
    size = config.batch_size if training else config.eval_batch_size or 2 * config.batch_size
    _, arguments = methods.dtypes(config, task.modality)
    cast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(next(iter(arguments.keys() & {"bf16", "fp16"}), ""))
    # with accumulation the gradients of the batches before are there
    times = 1 + (training and config.gradient_accumulation > 1)

    def batch_of(count: int) -> dict[str, Any]:
        batch = task.collate([train[i] for i in (longest * count)[:count]])
        if config.progressive and training:
            batch = task.resize(batch, config.progressive[-1])
        return _moved(batch, device)

    def prepare(fake: nn.Module) -> dict[str, Any]:
        fake.train(training)
        if config.gradient_checkpointing and training:
            fake.activation_checkpointing_enable({"use_reentrant": False})
        return _fast(fake, config)

    def step(fake: nn.Module, batch: dict[str, Any], judged: bool = True) -> None:
        autocast = torch.autocast(device.type, cast) if cast else contextlib.nullcontext()
        inputs = task.inputs(batch)
        with autocast, torch.set_grad_enabled(training):
            outputs = fake(**(inputs if judged else {k: v for k, v in inputs.items() if k != "labels"}))
            loss = task.loss(outputs, batch) if judged else _sum(outputs)
            loss = outputs["loss"] if loss is None else loss
        if training:
            loss.backward()

    batch, why = batch_of(size), ""
    # some losses look at values: boxes are assigned to answers
    for judged in (True, False):
        try:
            run = functools.partial(step, batch=batch, judged=judged)
            most, fast = rehearse.peak(model, run, device, prepare, times)
        except Exception as error:  # whatever the model's code does with values that are not there
            why = why or f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        else:
            return most, fast, "" if judged else f"memory is forecast without the loss's own ({why})"
    what = "a step" if training else "an evaluation"
    if any(p.is_meta for p in model.parameters()):
        return 0, {}, f"memory lacks the activations: {what} cannot be rehearsed without the weights ({why})"
    few = min(size, FEW)
    try:
        most, fast = rehearse.performed(model, functools.partial(step, batch=batch_of(few)), prepare, times)
    except Exception as error:  # training will say it better
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        return 0, {}, f"memory lacks the activations: {what} failed ({why})"
    return most * size // few, fast, f"activations are those of {few} of {size} rows, scaled"


def _sum(outputs: Any) -> torch.Tensor:
    """Something to start a backward pass from."""
    floats = [leaf for leaf in tree_leaves(dict(outputs)) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    return sum((leaf.float().sum() for leaf in floats), torch.zeros((), requires_grad=True))


def _moved(value: Any, device: torch.device) -> Any:
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, dict(value))


def _fast(fake: nn.Module, config: Config) -> dict[str, Any]:
    """Which layers peft_fast runs of the model that is rehearsed."""
    from peft_fast.recipes import result

    if config.method in ADAPTERS and config.fast:
        import peft_fast

        peft_fast.accelerate(fake)
    return result.fast(fake, config)


def _packed(config: Config, model: nn.Module, device: torch.device) -> int:
    """Bytes of frozen weights' packed copies that peft_fast keeps, where that pays."""
    from peft_fast.ops import packing

    if config.method not in ADAPTERS or not config.fast or device.type != "cpu":
        return 0
    frozen = [p for p in model.parameters() if p.ndim == 2 and not p.requires_grad]
    return min(packing.budget(), 2 * structure.bytes_of(frozen))


def optimizer_bytes(model: nn.Module, config: Config) -> int:
    """Bytes of the optimizer's state: one step on small weights shows what it keeps for a weight of such a kind."""
    trained = [p for p in model.parameters() if p.requires_grad]
    kinds: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for p in trained:
        # rows and columns stay told apart
        kinds.setdefault(tuple(min(n, SHRUNK + i) for i, n in enumerate(p.shape)), []).append(p)
    small = {shape: nn.Parameter(torch.zeros(shape)) for shape in kinds}
    made = optimizer.alone(list(small.values()), config)
    if made is None:
        return 8 * sum(p.numel() for p in trained)
    for p in small.values():
        p.grad = torch.ones_like(p)
    made.step()
    return sum(
        _grown(t, shape, tuple(p.shape)) * t.element_size()
        for shape, members in kinds.items()
        for t in made.state[small[shape]].values()
        if isinstance(t, torch.Tensor)
        for p in members
    )


def _grown(t: torch.Tensor, small: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Elements of a state for a weight of ``shape``, of which ``t`` is that of a weight of the ``small`` one."""
    # Adafactor keeps a matrix's rows and columns
    for keep in (lambda s: s, lambda s: s[:-1], lambda s: s[:-2] + s[-1:]):
        if tuple(t.shape) == keep(small) and t.ndim:
            return math.prod(keep(shape))
    return t.numel()
