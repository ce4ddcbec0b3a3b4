"""One contender in a process of its own: JSON commands come on stdin, JSON events go out on stdout.

A process each, because then stock PEFT is stock (nothing is patched there), peak memory can be measured, and
the two random streams never mix. The parent lets the two run in turns of a few steps, so that whatever else
the machine does hits both alike.

    in   {who, recipe, task, folder}   ->  ready {steps, trainable, parameters, threads, device}
    in   {"until": n}                  ->  turn {step, seconds, phases, losses, tokens, cpu_seconds}
    in   {"do": "evaluate"}            ->  held_out {accuracy, loss, right: a bool for each held-out row},
                                           of a language model {loss}
    in   {"do": "measure", profile}    ->  measured {saved_bytes, ops_ms, fast_calls, fast, slow, …}
    in   {"do": "quit"}
    any error                          ->  error {kind, message}
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any

from peft_fast.demo.data import Task
from peft_fast.demo.finetune import FAST, Meter, Recipe, trainer
from peft_fast.errors import PeftFastError


class Wire:
    """The two pipes. stdout is taken from everybody else: what libraries print goes to stderr, the log."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, event: str, **fields: Any) -> None:
        self._out.write(json.dumps({"event": event, **fields}) + "\n")
        self._out.flush()

    def receive(self) -> dict[str, Any]:
        line = sys.stdin.readline()
        if not line:
            raise SystemExit("the parent process is gone")
        return json.loads(line)


class Turns:
    """Called before the first step and after each: at the end of a turn reports it, waits for the next.

    ``until`` is the last step of the turn; whoever starts the training sets it for the first.
    """

    def __init__(self, wire: Wire, meter: Meter) -> None:
        self.wire, self.meter = wire, meter
        self.until, self.cpu, self.peak = 0, 0.0, 0

    def __call__(self, step: int, last: int) -> None:
        from peft_fast.demo import measure

        if step not in (0, self.until):
            return
        if step:
            meter = self.meter
            self.peak = measure.peak_resident_bytes()
            self.wire.send(
                "turn",
                step=step,
                seconds=sum(meter.phases.values()),
                cpu_seconds=time.process_time() - self.cpu,
                phases=meter.phases,
                losses=meter.losses,
                tokens=meter.tokens,
            )
            if step == last:
                return
            self.until = self.wire.receive()["until"]
        else:
            measure.reset_peak_resident()
        self.cpu = time.process_time()
        self.meter.open()


def work(wire: Wire) -> None:
    import torch

    from peft_fast.demo import measure

    setup = wire.receive()
    recipe = Recipe(**setup["recipe"])
    task = Task(**setup["task"])
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    on_cuda = recipe.device != "cpu" and torch.cuda.is_available()
    meter = Meter(torch.cuda.synchronize if on_cuda else lambda: None)
    turns = Turns(wire, meter)
    run = trainer(recipe, task, setup["folder"], meter, turns, fast=setup["who"] == FAST)
    steps_in_epoch = len(run.get_train_dataloader())
    steps = recipe.max_steps if recipe.max_steps > 0 else max(1, round(steps_in_epoch * recipe.epochs))
    counts = [(p.numel(), p.requires_grad) for p in run.model.parameters()]
    wire.send(
        "ready",
        steps=steps,
        parameters=sum(n for n, _ in counts),
        trainable=sum(n for n, trains in counts if trains),
        threads=torch.get_num_threads(),
        device=str(run.args.device),
        model_class=type(run.model.get_base_model()).__name__,
        resident_bytes=measure.resident_bytes(),
    )
    while True:
        command = wire.receive()
        if "until" in command:
            turns.until = command["until"]
            run.train()
        elif command["do"] == "evaluate":
            wire.send("held_out", **held_out(run, task))
        elif command["do"] == "measure":
            found = measure.everything(run, setup["who"] == FAST, command["profile"])
            wire.send("measured", peak_resident_bytes=turns.peak, **found)
        else:
            return


def held_out(run: Any, task: Task) -> dict[str, Any]:
    """What the model makes of the held-out rows: which of them are right, or the mean loss of a token."""
    if not task.names:
        return {"loss": run.evaluate()["eval_loss"]}
    found = run.predict(run.eval_dataset)
    right = (found.predictions.argmax(-1) == found.label_ids).tolist()
    return {"accuracy": sum(right) / len(right), "loss": found.metrics["test_loss"], "right": right}


def main() -> None:
    wire = Wire()
    try:
        work(wire)
    except PeftFastError as error:
        wire.send("error", kind=type(error).__name__, message=str(error))
    except Exception as error:
        traceback.print_exc()
        wire.send("error", kind=type(error).__name__, message=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
