"""The result of a run, metrics.json: what reports, comparisons and searches read. No path of the machine is in it."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_fast.recipes.config import ADAPTERS, Config

if TYPE_CHECKING:
    from peft_fast.recipes.run import Prepared

# what Trainer adds to an evaluation and nobody asks for
NOISE = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
OF_TRAINING = ("epoch", "loss", "learning_rate", "grad_norm", "per_second", "memory_bytes")


def figures(metrics: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The metrics of an evaluation by the names the task gave them."""
    found = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    return {name: value for name, value in found.items() if name not in NOISE}


def log(history: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A Trainer's log_history -> entries of training."""
    return [
        {"step": entry["step"]} | {name: entry[name] for name in OF_TRAINING if name in entry}
        for entry in history
        if "loss" in entry
    ]


def evaluations(history: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A Trainer's log_history -> evaluations."""
    found = [(entry, figures(entry, "eval_")) for entry in history]
    return [{"step": entry["step"], "epoch": entry.get("epoch", 0.0), **values} for entry, values in found if values]


def name_of(place: str) -> str:
    """A model or a file as a reader may see it: of a path on this machine the last part, else what was given."""
    path = Path(place).expanduser()
    return path.name if path.is_absolute() or ".." in path.parts else place


def plain_config(config: Config) -> dict[str, Any]:
    """All options, resolved; paths by their names."""

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [walk(inner) for inner in value]
        return name_of(value) if isinstance(value, str) and value.startswith(("/", "~", "..")) else value

    return walk(config.model_dump(mode="json")) | {"learning_rate": config.rate, "head_learning_rate": config.head_rate}


def fast(model: Any, config: Config) -> dict[str, Any]:
    """Which layers peft_fast runs, and why it does not run the others."""
    import peft_fast

    if config.method not in ADAPTERS:
        return {"on": False, "why": f"method {config.method} has no adapters, which is what peft_fast makes fast"}
    if not config.fast:
        return {"on": False, "why": "fast: false was given"}
    found = peft_fast.report(model)
    return {
        "on": True,
        "fast": list(found.fast),
        "slow": dict(found.slow),
        "fast_calls": found.fast_calls,
        "handed_back": dict(found.handed_back),
        "groups": len(found.groups),
        "blocks": len(found.blocks),
    }


def about(model: Any, config: Config) -> dict[str, Any]:
    """The model in figures."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    parameters = [(p.numel(), p.requires_grad, p.dtype) for p in model.parameters()]
    dtypes: dict[str, int] = {}
    for count, _, dtype in parameters:
        dtypes[str(dtype).removeprefix("torch.")] = dtypes.get(str(dtype).removeprefix("torch."), 0) + count
    return {
        "name": name_of(config.model),
        "class": type(inner).__name__,
        "parameters": sum(count for count, _, _ in parameters),
        "trainable": sum(count for count, trains, _ in parameters if trains),
        "dtype": max(dtypes, key=dtypes.get),
    }


def sizes(config: Config, steps: int) -> list[dict[str, int]]:
    """Of progressive resizing: the first step of each size."""
    count = len(config.progressive)
    return [{"step": -(-i * steps // count), "size": size} for i, size in enumerate(config.progressive)]


@dataclasses.dataclass
class Ending:
    """How a run ended, and what was asked of it then."""

    state: str = "stopped"
    final: dict[str, Any] = dataclasses.field(default_factory=dict)
    shown: list[Any] = dataclasses.field(default_factory=list)
    signum: int = 0


def drawn(prepared: Prepared) -> dict[str, str]:
    """How a split's rows, and what is asked of those that judge, were chosen; nothing where all of a source is used."""
    found = dict(getattr(prepared.splits, "drawn", {}))
    for split in prepared.rows:
        asked = "" if split == "train" else prepared.task.asked()
        if asked:
            found[split] = "; ".join(filter(None, [found.get(split), asked]))
    return found


def description(prepared: Prepared) -> dict[str, Any]:
    """What a run is, before it has done anything."""
    config = prepared.config
    model = name_of(config.model).removeprefix("example:")
    return {
        "name": config.name or config.out.name,
        "task": config.task,
        "method": config.method,
        "title": f"{model}, {config.task} by {config.method}",
        "config": plain_config(config),
        "facts": prepared.task.facts,
        "unit": prepared.task.unit,
        "rows": prepared.rows,
        "sources": dict(getattr(prepared.splits, "sources", {})),
        "drawn": drawn(prepared),
        "notes": list(prepared.notes),
        "model": about(prepared.model, config),
    }


def build(
    prepared: Prepared,
    learner: Any,
    ending: Ending,
    began: float,
    forecast: dict[str, Any],
    memory: dict[str, int],
) -> dict[str, Any]:
    """The whole of it."""
    import torch

    from peft_fast.benchmarks import machine

    config, task, clock, history = prepared.config, prepared.task, learner.clock, learner.state.log_history
    metric = config.metric or task.metric
    ended = time.time()
    stopper = next((c for c in learner.callback_handler.callbacks if hasattr(c, "early_stopping_patience")), None)
    unfrozen: list[Any] = []
    if config.method == "gradual":
        from peft_fast.recipes import unfreeze

        unfrozen = unfreeze.history(learner)
    return {
        **description(prepared),
        "state": ending.state,
        "started": _iso(began),
        "finished": _iso(ended),
        "seconds": ended - began,
        "forecast": forecast,
        "log": log(history),
        "evaluations": evaluations(history),
        "metric": metric,
        "higher": task.judged_by[metric],
        "best": {"step": learner.state.best_global_step, "value": learner.state.best_metric},
        "final": ending.final,
        "shown": ending.shown,
        "throughput": {
            "unit": task.unit,
            "per_second": clock.units / clock.seconds if clock.seconds else 0.0,
            "units": clock.units,
            "steps": learner.state.global_step,
            "train_seconds": clock.seconds,
        },
        "phases": clock.phases,
        "memory": memory,
        "fast": fast(prepared.model, config),
        "early_stopped": bool(stopper and stopper.early_stopping_patience_counter >= stopper.early_stopping_patience),
        "resumed_at": learner.resumed_at,
        "unfrozen": unfrozen,
        "sizes": sizes(config, learner.state.max_steps),
        # sums of other parts have other last bits: a run is the same again by as many threads
        "machine": machine.header(prepared.device) | {"threads": torch.get_num_threads()},
    }


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")
