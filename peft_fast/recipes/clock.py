"""Where a run's seconds go, and how much went through the model in them."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback


class Clock:
    """Where a run's seconds go, and how much of the task's unit has gone through the model."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self.units = 0
        self.steps = 0
        self.last = time.perf_counter()
        self.told = 0, 0.0  # units and seconds when a speed was last told

    def mark(self, phase: str) -> None:
        """Give the time since the last mark to ``phase``."""
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self.last
        self.last = now

    @property
    def seconds(self) -> float:
        """Spent on steps: their data, forward, backward, optimizer."""
        return self.phases.get("data", 0.0) + self.phases.get("step", 0.0)

    def since_last(self) -> float:
        """Units a second since this was last asked."""
        units, seconds = self.told
        self.told = self.units, self.seconds
        return (self.units - units) / max(self.seconds - seconds, 1e-9)

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return {"phases": dict(self.phases), "units": self.units, "steps": self.steps}

    def load(self, state: dict[str, Any]) -> None:
        """From JSON."""
        self.phases = dict(state.get("phases", {}))
        self.units, self.steps = state.get("units", 0), state.get("steps", 0)
        self.told = self.units, self.seconds
        self.last = time.perf_counter()


class Turns(TrainerCallback):
    """Tells the clock where a step ends."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on time counts."""
        self.clock.last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is done; the last one is logged, wherever it falls."""
        self.clock.mark("step")
        self.clock.steps += 1
        if state.global_step >= state.max_steps:
            control.should_log = True
