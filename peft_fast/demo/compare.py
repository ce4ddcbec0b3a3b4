"""Stock PEFT and peft_fast side by side: the same recipe, seed and batches, in turns of a few steps."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft_fast import errors
from peft_fast.demo.data import Task
from peft_fast.demo.finetune import FAST, STOCK, Recipe
from peft_fast.errors import UnsupportedError, fail

# the worker imports from where this process does, wherever the package was found
START = "import sys; sys.path[:] = {path!r}; from peft_fast.demo.worker import main; main()"


class Contender:
    """A worker process and what it has reported so far."""

    def __init__(self, name: str, who: str, recipe: Recipe, task: Task, log: Path, folder: str) -> None:
        self.name, self.log = name, log
        self.ready: dict[str, Any] = {}
        self.before: float | None = None
        self.turns: list[dict[str, Any]] = []
        self.after: dict[str, Any] = {}
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", START.format(path=sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.tell(who=who, recipe=dataclasses.asdict(recipe), task=dataclasses.asdict(task), folder=folder)

    def tell(self, **command: Any) -> None:
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self._ended()

    def hear(self, event: str) -> dict[str, Any]:
        """The next event, which has to be ``event``; a worker's error is raised here."""
        line = self.process.stdout.readline()
        if not line:
            self._ended()
        found = json.loads(line)
        if found["event"] == "error":
            kind = getattr(errors, found["kind"], None)
            if kind:
                raise kind(found["message"])
            self._ended(found["message"])
        if found["event"] != event:
            raise RuntimeError(f"{self.name} sent {found['event']} where {event} was due")
        return found

    def train(self, until: int) -> dict[str, Any]:
        self.tell(until=until)
        self.turns.append(self.hear("turn"))
        return self.turns[-1]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _ended(self, reason: str = "") -> None:
        status = self.process.poll() if reason else self.process.wait()
        reason = reason or f"ended with exit status {status}" + (", killed: often for memory" if status == -9 else "")
        fail(UnsupportedError, f"the run {self.name}: {reason}", "two runs that finish", f"read {self.log}")


def compare(
    recipe: Recipe,
    task: Task,
    folder: Path,
    watch: Callable[[str, dict[str, Any]], None] = lambda event, facts: None,
    block: int = 5,
    contenders: dict[str, str] | None = None,
    profile: bool = True,
) -> dict[str, Any]:
    """Train every contender (name -> who) and return all figures; ``folder`` takes the logs of the processes.

    ``profile``: with the time by operators. A language model is judged on what is held out before it is trained, too.
    ``watch(event, facts)`` hears "ready", "turn", "evaluate", "measure" as they come.
    """
    began = time.perf_counter()
    names = contenders or {STOCK: STOCK, FAST: FAST}
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="peft_fast-"))
        runs = []
        for name, who in names.items():
            runs.append(Contender(name, who, recipe, task, folder / f"{name}.log", f"{scratch}/{name}"))
            stack.callback(runs[-1].stop)
        for run in runs:
            run.ready = run.hear("ready")
        steps = runs[0].ready["steps"]
        watch("ready", {"steps": steps, **{run.name: run.ready for run in runs}})
        for run in runs if not task.names else ():
            watch("evaluate", {"name": run.name})
            run.tell(do="evaluate")
            run.before = run.hear("held_out")["loss"]
        for index, until in enumerate(range(block, steps + block, block)):
            # a b, then b a: a machine that grows slower or faster favours nobody
            for run in runs if index % 2 == 0 else reversed(runs):
                watch("turn", {"name": run.name, **run.train(min(until, steps))})
        for run in runs:
            watch("evaluate", {"name": run.name})
            run.tell(do="evaluate")
            run.after |= run.hear("held_out")
        for run in runs:
            watch("measure", {"name": run.name})
            run.tell(do="measure", profile=profile)
            run.after |= run.hear("measured")
            run.tell(do="quit")
        return _result(recipe, task, runs, time.perf_counter() - began)


def _result(recipe: Recipe, task: Task, runs: list[Contender], wall: float) -> dict[str, Any]:
    import torch

    from peft_fast.benchmarks import machine, stats

    figures = {run.name: _figures(run) for run in runs}
    first, last = (figures[run.name] for run in (runs[0], runs[-1]))
    return {
        "bench": "demo",
        "machine": machine.header(torch.device(runs[0].ready["device"])),
        "recipe": dataclasses.asdict(recipe) | {"model": _name(recipe.model)},
        "data": {
            "source": _name(task.source),
            "names": task.names,
            "train": len(task.train),
            "test": len(task.test),
        },
        "model": {key: runs[0].ready[key] for key in ("model_class", "parameters", "trainable", "threads")},
        "steps": runs[0].ready["steps"],
        "runs": figures,
        **({"held_out": held_out(runs[0].after["right"], runs[-1].after["right"])} if task.names else {}),
        "same_batches": [t["tokens"] for t in runs[0].turns] == [t["tokens"] for t in runs[-1].turns],
        "ratio": first["seconds"] / last["seconds"],
        "ratio_by_turns": stats.ratio(first["turn_seconds"], last["turn_seconds"]),
        "wall_seconds": wall,
    }


def _name(source: str) -> str:
    """A hub id as it is; of a path only the last part, for a report names nobody's folders."""
    path = Path(source).expanduser()
    return path.name if path.exists() else source


def _figures(run: Contender) -> dict[str, Any]:
    """All that one contender measured; times in seconds or ms, sizes in bytes."""
    seconds = sum(turn["seconds"] for turn in run.turns)
    tokens = sum(turn["tokens"] for turn in run.turns)
    phases: dict[str, float] = {}
    for turn in run.turns:
        for phase, spent in turn["phases"].items():
            phases[phase] = phases.get(phase, 0.0) + spent
    return {
        "seconds": seconds,
        "cpu_seconds": sum(turn["cpu_seconds"] for turn in run.turns),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "phases": phases,
        "losses": [loss for turn in run.turns for loss in turn["losses"]],
        "turn_steps": [turn["step"] for turn in run.turns],
        "turn_seconds": [turn["seconds"] for turn in run.turns],
        "resident_before_bytes": run.ready["resident_bytes"],
        **({} if run.before is None else {"loss_before": run.before}),
        **{key: value for key, value in run.after.items() if key not in ("event", "right")},
    }


def held_out(a: list[bool], b: list[bool]) -> dict[str, Any]:
    """Rows that only the first or only the last has right; p: how often chance alone splits them so unevenly.

    McNemar's exact test: two runs that differ by their dropout masks alone disagree on some rows, either way.
    """
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    n, k = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    return {"only_first": only_a, "only_last": only_b, "p": min(1.0, 2 * tail)}
