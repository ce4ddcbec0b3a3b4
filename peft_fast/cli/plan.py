"""What `train` prints around a run: the plan of --dry-run, and the summary at the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_fast.pages import words


def show(plan: Mapping[str, Any], console: Any = None) -> None:
    """The plan as tables."""
    console = console or _console()
    console.print(f"{plan['title']}", style="bold", markup=False, soft_wrap=True)
    forecast, model, config = plan.get("forecast") or {}, plan["model"], plan["config"]
    table = _table()
    rows = ", ".join(f"{count:,} {split}" for split, count in plan["rows"].items())
    table.add_row("data", f"{plan['sources'].get('train', config['data'])}: {rows} rows")
    table.add_row("model", f"{model['class']} {model['name']}, {model['parameters']:,} parameters in {model['dtype']}")
    share = model["trainable"] / max(1, model["parameters"])
    table.add_row("trains", f"{model['trainable']:,} parameters ({share:.2%}), method {plan['method']}")
    for layer, count in list((forecast.get("layers") or {}).items()):
        table.add_row("", f"{layer}: {count:,}" if isinstance(count, int) else f"{layer}: {count}")
    if "steps" in forecast:
        every = forecast.get("steps_per_epoch")
        a_step = (
            f", about {words.count(forecast['units_per_step'])} {plan['unit']} each"
            if forecast.get("units_per_step")
            else ""
        )
        table.add_row("steps", f"{forecast['steps']:,}, {every:,} an epoch{a_step}")
    each = config["batch_size"] * config["gradient_accumulation"]
    table.add_row("batch", f"{each} rows a step ({config['batch_size']} × {config['gradient_accumulation']})")
    table.add_row("learning rate", f"{config['learning_rate']:g}, {config['schedule']}, warm-up {config['warmup']:g}")
    if memory := forecast.get("memory"):
        parts = " + ".join(f"{name} {words.size(memory[name])}" for name in memory if name != "total")
        table.add_row("memory", f"[bold]{words.size(memory['total'])}[/bold] = {parts}")
    for label, text in _fast(plan.get("fast") or {}, forecast):
        table.add_row(label, text)
    machine = plan["machine"]
    table.add_row("runs on", machine.get("gpu", {}).get("name") or f"{machine['cpu']}, {machine['cores']} cores")
    table.add_row("writes to", config["out"])
    for note in [*plan["notes"], *forecast.get("notes", ())]:
        table.add_row("[yellow]note[/yellow]", f"[yellow]{_escaped(note)}[/yellow]")
    console.print(table)
    console.print("a dry run: nothing was trained, nothing was written", style="dim")


def _fast(fast: Mapping[str, Any], forecast: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Which layers are fast, and why the others are not."""
    if not fast:
        return [("fast", f"{value}") for value in [forecast.get("fast")] if value]
    if not fast["on"]:
        return [("fast", fast["why"])]
    layers = len(fast["fast"]) + len(fast["slow"])
    rows = [("fast", f"{len(fast['fast'])} of {layers} adapted layers, {fast['blocks']} MLP blocks as one")]
    reasons: dict[str, list[str]] = {}
    for layer, why in fast["slow"].items():
        reasons.setdefault(why, []).append(layer)
    for why, names in reasons.items():
        more = f", and {len(names) - 2} more" if len(names) > 2 else ""
        rows.append(("", _escaped(f"{len(names)} with PEFT: {why} ({', '.join(names[:2])}{more})")))
    return rows


def summary(result: Mapping[str, Any], folder: Path, console: Any = None) -> None:
    """What came out, and where it is."""
    console = console or _console()
    table = _table()
    for split, metrics in result["final"].items():
        main = result["metric"]
        ordered = sorted(metrics.items(), key=lambda entry: entry[0] != main)
        text = ", ".join(f"{name} {words.metric(name, value)}" for name, value in ordered[:6])
        table.add_row(split, text)
    best, speed = result["best"], result["throughput"]
    if best["step"] is not None:
        kept = "kept" if result["config"]["keep_best"] else "not kept: keep_best is off"
        early = ", stopped early" if result["early_stopped"] else ""
        where = f"step {best['step']:,} of {speed['steps']:,}"
        if not best["step"]:
            where = "before training: no evaluation was better"
        table.add_row("best", f"{where} ({kept}){early}")
    table.add_row(
        "speed", f"{words.rate(speed['per_second'])} {speed['unit']}/s, {words.seconds(result['seconds'])} in all"
    )
    table.add_row("memory", f"{words.size(words.beyond(result['memory']))} at the peak, beyond what was held before")
    for label, text in _fast(result["fast"], {}):
        table.add_row(label, text)
    for note in result["notes"]:
        table.add_row("note", _escaped(note))
    made = next((name for name in ("adapter", "model") if (folder / name).exists()), None)
    if made:
        table.add_row(made, str(folder / made))
    table.add_row("report", str(folder / "report.html"))
    console.print()
    console.print(table)


def _table() -> Any:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
