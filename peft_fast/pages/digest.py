"""The demo's figures as the words that page, picture and terminal share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NAMES = {"stock": "stock PEFT", "peft_fast": "peft_fast"}
PHASES = ("forward", "backward", "optimizer", "data")


def speedup(result: dict[str, Any]) -> str:
    """Stock PEFT's time over peft_fast's: the median over pairs of turns, which a disturbed turn does not move."""
    ratio = result["ratio_by_turns"][0]
    return f"{ratio:.2f}× faster" if ratio >= 1 else f"{1 / ratio:.2f}× slower"


def what(result: dict[str, Any]) -> str:
    """The job in a line."""
    data, model, recipe = result["data"], result["model"], result["recipe"]
    return (
        f"{model['model_class']}, {model['parameters'] / 1e6:.1f} M parameters · "
        f"{data['train']:,} {data['source']} · {recipe['dtype']}, r = {recipe['r']}, "
        f"dropout {recipe['dropout']:g} · {result['steps']} steps of {recipe['batch']}"
    )


def where(result: dict[str, Any]) -> str:
    """The machine in a line."""
    from peft_fast.benchmarks import machine

    threads = result["model"]["threads"]
    return f"{machine.line(result['machine'])}, {threads} thread{'s' * (threads != 1)}"


def rows(result: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, stock, peft_fast, ratio) of the result table."""
    stock, fast = (result["runs"][name] for name in NAMES)

    def row(title: str, key: str, unit: str, scale: float = 1.0) -> tuple[str, str, str, str]:
        a, b = stock[key], fast[key]
        more, word = (a / b, "less") if a >= b else (b / a, "more")
        ratio = f"{more:.2f}× {word}" if more >= 1.005 else "equal"
        return title, f"{a / scale:,.0f} {unit}".strip(), f"{b / scale:,.0f} {unit}".strip(), ratio

    points = 100 * (fast["accuracy"] - stock["accuracy"])
    return [
        (
            "accuracy, held out",
            *(f"{100 * run['accuracy']:.1f} %" for run in (stock, fast)),
            f"{points:+.1f} points",
        ),
        ("training time", *(f"{run['seconds']:.1f} s" for run in (stock, fast)), speedup(result)),
        row("tokens per second", "tokens_per_second", ""),
        row("saved activations", "saved_bytes", "MiB", 2**20),
        row("peak of a step", "step_bytes", "MiB", 2**20),
        row("peak memory, process", "peak_resident_bytes", "MiB", 2**20),
    ]


def verdict(result: dict[str, Any]) -> str:
    """What may be concluded, and what not, in a sentence or two."""
    middle, low, high = result["ratio_by_turns"]
    turns = len(result["runs"]["stock"]["turn_seconds"])
    interval = f"95 % interval {low:.2f} to {high:.2f}, {turns} turns"
    text = f"{middle:.2f} is the median over pairs of turns ({interval})."
    if not low * 0.97 <= result["ratio"] <= high * 1.03:
        text += f" The sums of all turns give {result['ratio']:.2f}: the machine was not quiet."
    if not result["same_batches"]:
        text += " The two runs did not see the same batches: do not compare them."
    if result["quick"]:
        return text + " A quick run shows that everything works; its accuracy says nothing."
    stock, fast = (result["runs"][name]["accuracy"] for name in NAMES)
    points = round(100 * abs(stock - fast), 6)
    text += " Accuracy is equal within 1 point." if points <= 1 else f" Accuracy is {points:.1f} points apart."
    held = result["held_out"]
    chance = "chance, their dropout masks, explains that" if held["p"] >= 0.05 else "chance hardly explains that"
    only = f"stock PEFT alone has {held['only_first']} rows right, peft_fast alone {held['only_last']}"
    return f"{text} Of the held-out rows {only}: {chance} (p = {held['p']:.2g})."


def smooth(values: Sequence[float], half_life: float = 8.0) -> list[float]:
    """Exponential mean, from the first value on without a bias towards zero."""
    keep, total, weight, out = 0.5 ** (1 / half_life), 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight)
    return out


def step_ms(run: dict[str, Any]) -> list[float]:
    """Milliseconds a step in each turn."""
    ends = run["turn_steps"]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    return [1e3 * seconds / n for seconds, n in zip(run["turn_seconds"], sizes, strict=True)]


def phases_ms(result: dict[str, Any], name: str) -> dict[str, float]:
    """Milliseconds a step by phase, mean over the run."""
    phases = result["runs"][name]["phases"]
    return {phase: 1e3 * phases.get(phase, 0.0) / result["steps"] for phase in PHASES}
