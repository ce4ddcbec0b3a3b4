"""What a run says while it goes: a live line on a terminal, a line now and then elsewhere, nothing where quiet."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from peft_fast import settings
from peft_fast.pages import words
from peft_fast.recipes import result

GAP = 5.0  # seconds between two lines that nobody watches live
BAR = 12
SOME = 4  # metrics of an evaluation that are said besides the main one


class Screen:
    """Where a run's words go: to ``say``, or to the console, or nowhere under PEFT_FAST_QUIET."""

    def __init__(self, say: Callable[[str], None] | None = None, console: Any = None) -> None:
        from rich.console import Console

        self.quiet = settings.get().quiet and say is None
        self.own = say
        self.console = console or Console(highlight=False)

    @property
    def live(self) -> bool:
        """Does somebody watch?"""
        return not self.quiet and self.own is None and (self.console.is_terminal or self.console.is_jupyter)

    def say(self, text: str, style: str | None = None) -> None:
        """One line, or several."""
        if self.own is not None:
            self.own(text)
        elif not self.quiet:
            try:
                self.console.print(text, style=style, markup=False, soft_wrap=True)
            except KeyboardInterrupt:
                # rich keeps what it had not finished writing, and would write it before the next line
                with self.console.capture():
                    pass
                raise


class Progress(TrainerCallback):
    """Step, loss, speed, memory, time left and the last evaluation."""

    def __init__(self, screen: Screen, trainer: Any, held: int = 0) -> None:
        self.screen, self.trainer = screen, trainer
        self.held = held  # bytes before the model was there: what is said is beyond them, as in the summary
        self.live: Any = None
        self.step = self.steps = 0
        self.epoch = 0.0
        self.logged: dict[str, float] = {}
        self.judged = ""
        self.doing = ""
        self.batches = 0  # of the evaluation that runs
        self.shown = -GAP
        self.evaluations = 0

    # ---- what happens

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The live line appears."""
        self.step, self.steps, self.epoch = state.global_step, state.max_steps, state.epoch or 0.0
        if self.screen.live:
            from rich.live import Live
            from rich.text import Text

            def line() -> Text:
                return Text(self.line(self.screen.console.width - 1), no_wrap=True, overflow="crop")

            self.live = Live(get_renderable=line, console=self.screen.console, transient=True, refresh_per_second=5)
            self.live.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step further."""
        self.step, self.epoch = state.global_step, state.epoch or 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Loss and speed."""
        if not logs or "loss" not in logs:
            return
        self.logged = logs
        if not self.live and (time.monotonic() - self.shown > GAP or self.step == self.steps):
            self.shown = time.monotonic()
            self.screen.say(self.line(200))

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kw: Any) -> None:
        """One batch of an evaluation."""
        self.batches += 1
        many = f" {self.batches}/{len(eval_dataloader)}" if hasattr(eval_dataloader, "__len__") else ""
        self.doing = f"evaluating{many}"

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """A line that stays."""
        self.batches, self.doing = 0, ""
        self.evaluations += 1
        found = result.figures(metrics or {}, "eval_")
        main = args.metric_for_best_model
        if main in found:
            self.judged = f"{main} {words.metric(main, found[main])}"
        # all of them are in the report
        some = [name for name in found if name not in (main, "epoch")][:SOME]
        others = ", ".join(f"{name} {words.metric(name, found[name])}" for name in some)
        where = f"step {state.global_step:,}" if state.global_step else "before training"
        self.screen.say(f"  {where}: {', '.join(filter(None, (self.judged, others)))}")

    def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The final evaluation is done."""
        self.batches, self.doing = 0, ""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The live line goes."""
        self.close()

    def close(self) -> None:
        """Takes the live line away, however training ended."""
        if self.live:
            self.live.stop()
            self.live = None

    # ---- how it looks

    def line(self, width: int) -> str:
        """As much as fits, the least important left out first."""
        clock, share = self.trainer.clock, self.step / max(1, self.steps)
        filled = round(share * BAR)
        unit = self.trainer.task.unit
        speed = self.logged.get("per_second")
        # (importance, text), as they stand on the line
        parts = [
            (4, "━" * filled + "─" * (BAR - filled) if self.live else ""),
            (9, f"step {self.step:,}/{self.steps:,}"),
            (8, f"loss {words.plain(self.logged['loss'])}" if self.logged else ""),
            (7, f"{words.rate(speed)} {unit}/s" if speed is not None else ""),
            (3, words.size(max(0, self.logged["memory_bytes"] - self.held)) if "memory_bytes" in self.logged else ""),
            (6, self.doing or (f"{clock_time(self.left())} left" if clock.steps else "")),
            (5, self.judged),
            (2, f"epoch {self.epoch:.2f}/{self.trainer.state.num_train_epochs:g}"),
        ]
        parts = [part for part in parts if part[1]]
        while len(text := "  ".join(text for _, text in parts)) > width and len(parts) > 1:
            parts.remove(min(parts))
        return text

    def left(self) -> float:
        """Seconds that the rest will take, evaluations included."""
        clock, steps = self.trainer.clock, self.steps - self.step
        judged = 0.0
        if self.evaluations and self.trainer.args.eval_steps:
            one = clock.phases.get("evaluate", 0.0) / self.evaluations
            judged = one * -(-steps // self.trainer.args.eval_steps)
        return steps * clock.seconds / max(1, clock.steps) + judged


class Logger(TrainerCallback):
    """log.jsonl, an entry a line, as they come; and that the run has begun."""

    def __init__(self, record: Any) -> None:
        self.record = record

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A first step is done."""
        self.record.begin()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Steps and evaluations."""
        entry = {"step": state.global_step, **(logs or {})}
        for kind, made in (("train", result.log), ("evaluation", result.evaluations)):
            for line in made([entry]):
                self.record.log({"kind": kind, **line})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint is there."""
        self.record.log({"kind": "checkpoint", "step": state.global_step})


def clock_time(seconds: float) -> str:
    """0:07, 4:12, 1:02:33."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
