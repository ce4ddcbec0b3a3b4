"""Gradual unfreezing (ULMFiT, arXiv 1801.06146): the head trains first, then block after block from the top.

The optimizer has every weight from the start: one that is frozen gets no gradient, so no step and no state. What
trains at a step follows from the step, or from the evaluations so far: both are in a checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from peft_fast.recipes import structure
from peft_fast.recipes.config import Config

if TYPE_CHECKING:
    from peft_fast.recipes.tasks import Task

SLACK = 1e-6  # of an epoch: its fraction is a sum of rounded ones


class Unfreezing(TrainerCallback, ExportableState):
    """Thaws a model's layers while it trains. Its attributes are plain values: a checkpoint keeps them as JSON."""

    def __init__(self, config: Config | None = None, model: nn.Module | None = None, task: Task | None = None) -> None:
        if config is None:  # transformers makes one without arguments and sets the attributes
            return
        head = task.head(structure.unwrapped(model)[0])
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        found = [
            (list(group.titles), [name for name in group.parameters if name in trains])
            for group in structure.groups(model, head)
        ]
        # from the top; what has no parameters is no stage
        self.layers: list[tuple[list[str], list[str]]] = [layer for layer in reversed(found) if layer[1]]
        self.by, self.every = config.unfreeze_by, config.unfreeze_every
        self.count, self.patience = config.unfreeze_layers, config.unfreeze_patience
        name = config.metric or task.metric
        self.metric, self.higher = f"eval_{name}", task.judged_by.get(name, False)
        self.min_delta = config.min_delta
        # without a new head there is nothing to learn before the first blocks
        self.start = 1 if head else min(1 + self.count, len(self.layers))
        self.open = self.start  # layers that train, from the top
        self.best: float | None = None
        self.bad = 0  # evaluations without progress
        self.history: list[dict[str, Any]] = []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {name: value for name, value in vars(self).items() if name[0] != "_"}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """Freezes what is not due; after a resume, as it was at the checkpoint."""
        self._training = True
        if not self.history:
            self._note(state.global_step, 0)
        self._apply(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """By epoch: the next layers, as soon as their time has come."""
        if self.by == "epoch" and state.global_step < state.max_steps:
            stages = int(state.epoch / self.every + SLACK)
            self._thaw(self.start + self.count * stages, state.global_step, model)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict | None = None, model: nn.Module | None = None, **_: Any
    ) -> None:
        """By plateau: the next layers, once evaluation has stopped improving."""
        value = (metrics or {}).get(self.metric)
        if self.by != "plateau" or value is None or not getattr(self, "_training", False):
            return
        gain = None if self.best is None else (value - self.best) * (1 if self.higher else -1)
        if gain is None or gain > self.min_delta:
            self.best, self.bad = value, 0
            return
        self.bad += 1
        if self.bad >= self.patience and state.global_step < state.max_steps:
            self.bad = 0
            self._thaw(self.open + self.count, state.global_step, model)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluations from now on are the user's."""
        self._training = False

    def _thaw(self, count: int, step: int, model: nn.Module) -> None:
        count = min(count, len(self.layers))
        if count > self.open:
            before, self.open = self.open, count
            self._note(step, before)
            self._apply(model)

    def _note(self, step: int, before: int) -> None:
        titles = [title for names, _ in self.layers[before : self.open] for title in names]
        self.history.append({"step": step, "layers": titles})

    def _apply(self, model: nn.Module) -> None:
        due = {name for _, names in self.layers[: self.open] for name in names}
        known = {name for _, names in self.layers for name in names}
        for name, p in model.named_parameters():
            if name in known:
                p.requires_grad_(name in due)
                if name not in due:
                    p.grad = None


def history(trainer: Any) -> list[dict[str, Any]]:
    """[{"step", "layers"}]: what has been thawed after how many steps; [] for other methods."""
    return [entry for cb in trainer.callback_handler.callbacks if isinstance(cb, Unfreezing) for entry in cb.history]
