"""report.html of a run: one file made of its metrics.json alone; nothing is loaded from elsewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_fast.pages import charts, shown, words
from peft_fast.pages.html import document, escape, figure, names, table

Result = Mapping[str, Any]
SPLITS = ("train", "validation", "test")
SMOOTH = 12  # entries of the log from which on a running mean is drawn over the raw curve


def write(result: Result, folder: Path) -> Path:
    """The page into ``folder``; a reader sees the old page or the whole new one."""
    path = Path(folder) / "report.html"
    part = path.with_suffix(".part")
    part.write_text(build(result), encoding="utf-8")
    return part.replace(path)


def build(result: Result) -> str:
    """The page of a result, however little is in it."""
    split, name, value = words.final(result)
    headline = f"{words.title(result.get('task', 'run'))}: {name} {words.metric(name, value)}, {split} rows"
    body = [
        f"<h1>{escape(headline)}</h1>",
        f"<p>{escape(_what(result))}</p>",
        f'<p class="soft">{escape(_when(result))}</p>',
        *_alerts(result),
        _cards(result, split, name, value),
        "<h2>Evaluation</h2>",
        *_evaluation(result, name),
        "<h2>Training</h2>",
        *_training(result),
        *(["<h2>What it answers</h2>", *shown.build(result["shown"])] if result.get("shown") else []),
        "<h2>Speed and memory</h2>",
        *_resources(result),
        "<h2>What was fast, and why not</h2>",
        *_fast(result),
        "<h2>Data</h2>",
        *_data(result),
        "<h2>How to have it again</h2>",
        *_settings(result),
    ]
    return document(f"{result.get('name', 'run')}: {headline}", body)


# ---- what it is, in a few lines


def _what(result: Result) -> str:
    model = result.get("model") or {}
    rows = (result.get("rows") or {}).get("train")
    parts = [
        f"{result.get('title') or result.get('name', '')}".strip(),
        f"{model.get('class', '')}, {words.count(model.get('parameters'))} parameters",
        f"{result.get('method', '')}: {words.share(result)} trained",
        f"{rows:,} training rows" if rows else "",
        f"{model.get('dtype', '')}",
    ]
    return " · ".join(part for part in parts if part)


def _when(result: Result) -> str:
    from peft_fast.benchmarks import machine

    spent = f"{words.seconds(result.get('seconds'))} in all"
    steps = (result.get("throughput") or {}).get("steps")
    parts = [f"{steps:,} steps" if steps else "", spent, f"started {str(result.get('started', '?'))[:16]}"]
    found = result.get("machine")
    try:
        parts.append(machine.line(found) if found else "")
    except KeyError:  # a result of another version
        pass
    return " · ".join(part for part in parts if part)


def _alerts(result: Result) -> list[str]:
    """What a reader must know before believing a figure."""
    found = []
    if result.get("state") == "stopped":
        found.append("This run was stopped before its end: `peft-fast train … --resume` goes on with it.")
    losses = [words.number(entry.get("loss")) for entry in result.get("log") or () if "loss" in entry]
    if losses and not all(map(math.isfinite, losses)):
        first = next(e["step"] for e in result["log"] if "loss" in e and not math.isfinite(words.number(e["loss"])))
        found.append(
            f"The loss was no number from step {first} on. A smaller learning_rate, dtype: fp32, or max_grad_norm help."
        )
    if result.get("early_stopped"):
        found.append("Training ended early: the metric had stopped getting better (early_stopping).")
    if (result.get("best") or {}).get("step") == 0 and result.get("state") != "stopped":
        kept = "the weights that the run began with are what it leaves"
        if not (result.get("config") or {}).get("keep_best", True):
            kept = "what it leaves are the last weights, since keep_best is off"
        found.append(f"No evaluation was better than the one before training: {kept}.")
    if resumed := result.get("resumed_at"):
        found.append(f"Resumed at step {', '.join(map(str, resumed))}.")
    css = {0: " bad"} if result.get("state") == "stopped" else {}
    return [f'<p class="alert{css.get(i, "")}">{_code(text)}</p>' for i, text in enumerate(found)]


def _code(text: str) -> str:
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))


def _cards(result: Result, split: str, name: str, value: float | None) -> str:
    before = _before(result, name)
    was = f"; before training {words.metric(name, before)}" if before is not None else ""
    best = result.get("best") or {}
    # an evaluation before training is of the validation rows, and stands beside figures of no others
    cards = [(words.metric(name, value), f"{name}, {split} rows{was if split == 'validation' else ''}")]
    if split == "test" and best.get("value") is not None:
        where = f"at step {best['step']:,}{was}" if best.get("step") else "before training"
        cards.append((words.metric(name, best["value"]), f"{name}, validation rows, best {where}"))
    train = (result.get("throughput") or {}).get("train_seconds")
    cards.append((words.seconds(train if train is not None else result.get("seconds")), "of training"))
    flow = result.get("throughput") or {}
    if flow.get("per_second") is not None:
        cards.append((words.count(flow["per_second"]), f"{flow.get('unit', 'rows')} a second, padding not counted"))
    if peak := words.beyond(result.get("memory") or {}):
        cards.append((words.size(peak), "of memory at the peak, beyond what was held before the model"))
    fast = result.get("fast") or {}
    if fast.get("on"):
        layers = len(fast.get("fast", ())) + len(fast.get("slow", ()))
        cards.append((f"{len(fast.get('fast', ()))} of {layers}", f"layers fast, {fast.get('fast_calls', 0):,} calls"))
    made = (f'<div class="card"><b>{escape(big)}</b>{escape(text)}</div>' for big, text in cards)
    return f'<div class="cards">{"".join(made)}</div>'


def _before(result: Result, name: str) -> float | None:
    first = next(iter(result.get("evaluations") or ()), {})
    return first.get(name) if first.get("step") == 0 else None


# ---- curves


def _marks(result: Result) -> list[tuple[float, str]]:
    """What happened at which step."""
    found = [(step, "resumed") for step in result.get("resumed_at") or ()]
    for event in result.get("unfrozen") or ():
        if not event["step"]:  # what trains from the start
            continue
        layers = len(event.get("layers") or ())
        found.append((event["step"], f"+{layers} layer{'s' * (layers != 1)}"))
    found += [(event["step"], f"size {event['size']}") for event in result.get("sizes") or ()]
    last = max([e["step"] for e in (*(result.get("log") or ()), *(result.get("evaluations") or ()))], default=0)
    if result.get("early_stopped"):
        found.append((last, "early stop"))
    together: dict[float, list[str]] = {}
    for step, text in found:
        together.setdefault(step, []).append(text)
    return [(step, ", ".join(texts)) for step, texts in sorted(together.items())]


def _curve(result: Result, entry: str) -> tuple[list[float], list[float]]:
    points = [(e["step"], words.number(e[entry])) for e in result.get("log") or () if entry in e]
    return [float(x) for x, _ in points], [y for _, y in points]


def _training(result: Result) -> list[str]:
    steps, losses = _curve(result, "loss")
    if not steps:
        return ["<p>No step was logged.</p>"]
    series = [("line0", steps, losses)]
    key = [("line0", "training loss")]
    if len(steps) >= SMOOTH:
        series = [("line0 raw", steps, losses), ("line0", steps, words.smooth(losses, len(losses) / 25))]
        key = [("line0", "training loss, running mean")]
    evaluated = [(e["step"], words.number(e.get("loss"))) for e in result.get("evaluations") or () if "loss" in e]
    if any(math.isfinite(loss) for _, loss in evaluated):
        series.append(("line1", [float(x) for x, _ in evaluated], [y for _, y in evaluated]))
        key.append(("line1", "validation loss"))
    marks = _marks(result)
    parts = [
        figure(charts.key(key) + charts.lines(series, "step", "loss", "loss by step", marks=marks, whole=True), "")
    ]
    half = []
    for entry, title in (("learning_rate", "Learning rate, of the fastest group."), ("grad_norm", "Gradient norm.")):
        xs, ys = _curve(result, entry)
        if any(map(math.isfinite, ys)):
            drawn = charts.lines([("line2", xs, ys)], "step", "", title, 230, True, charts.HALF, whole=True)
            half.append(figure(drawn, title if entry == "learning_rate" else title[:-1] + ", before clipping."))
    return [*parts, f'<div class="two">{"".join(half)}</div>'] if half else parts


def _evaluation(result: Result, name: str) -> list[str]:
    found = list(result.get("evaluations") or ())
    parts = []
    scores = [(float(e["step"]), words.number(e.get(name))) for e in found if name in e]
    if any(math.isfinite(y) for _, y in scores):
        best = result.get("best") or {}
        dots = []
        if best.get("value") is not None:
            dots = [("line0", float(best["step"]), float(best["value"]), f"best {words.metric(name, best['value'])}")]
        xs, ys = [x for x, _ in scores], [y for _, y in scores]
        better = "Higher is better." if result.get("higher", True) else "Lower is better."
        drawing = charts.lines(
            [("line0", xs, ys)], "step", name, f"{name} by step", 280, marks=_marks(result), dots=dots, whole=True
        )
        parts.append(figure(drawing, f"{name} on the validation rows. {better}"))
    else:
        parts.append(f"<p>No evaluation during training gave {escape(name)}.</p>")
    final = {split: scores for split, scores in (result.get("final") or {}).items() if scores}
    if final:
        every = list(dict.fromkeys(key for scores in final.values() for key in scores))
        rows = [(key, *(words.metric(key, scores.get(key)) for scores in final.values())) for key in every]
        parts.append("<h3>At the end</h3>" + table(("", *final), rows, numbers=range(1, len(final) + 1)))
    if found:
        every = list(dict.fromkeys(key for entry in found for key in entry if key not in ("step", "epoch")))
        rows = [
            (e["step"], f"{words.number(e.get('epoch')):.2f}", *(words.metric(key, e.get(key)) for key in every))
            for e in found
        ]
        inner = table(("step", "epoch", *every), rows, numbers=range(len(every) + 2))
        parts.append(f"<details><summary>all {len(found)} evaluations</summary>{inner}</details>")
    return parts


# ---- speed, memory, layers


def _resources(result: Result) -> list[str]:
    unit = (result.get("throughput") or {}).get("unit", "rows")
    held = (result.get("memory") or {}).get("before_bytes") or 0
    half = []
    for entry, before, scale, word, text in (
        ("per_second", 0, 1, f"{unit}/s", "Throughput while it trained, padding not counted."),
        ("memory_bytes", held, 2**20, "MiB", "Memory while it trained, beyond what was held before the model."),
    ):
        xs, ys = _curve(result, entry)
        if any(map(math.isfinite, ys)):
            drawn = [("line0" if scale == 1 else "line3", xs, [max(y - before, 0.0) / scale for y in ys])]
            half.append(figure(charts.lines(drawn, "step", word, text, 230, True, charts.HALF, whole=True), text))
    parts = [f'<div class="two">{"".join(half)}</div>'] if half else []
    return [*parts, *_memory(result)]


def _memory(result: Result) -> list[str]:
    """The forecast, part by part, over what was measured."""
    forecast = (result.get("forecast") or {}).get("memory") or {}
    pieces = {k: v / 2**20 for k, v in forecast.items() if k != "total" and isinstance(v, int | float)}
    found = result.get("memory") or {}
    peak, before = found.get("peak_bytes"), found.get("before_bytes") or 0
    bars: list[tuple[str, dict[str, float]]] = [("forecast", pieces)] if any(pieces.values()) else []
    text = []
    if bars and peak:
        bars.append(("measured", {key: 0.0 for key in pieces} | {"peak": max(peak - before, 0) / 2**20}))
        bars[0][1]["peak"] = 0.0
        text.append(
            f"{words.size(before)} before the model was there, {words.size(peak)} at the peak: measured is what lies "
            f"between, {words.whose(result.get('machine'))}."
        )
        total = forecast.get("total") or sum(pieces.values()) * 2**20
        if peak > before:
            times = f"{total / (peak - before):.2f} times what was measured"
            text.append(f"The forecast counts the tensors of a step alone: {times}.")
    if not bars:
        return [f"<p>Peak memory: {words.size(peak)}.</p>"] if peak else []
    drawing = charts.stacks(bars, "MiB", "memory, forecast and measured")
    return ["<h3>Memory: forecast and measured</h3>", figure(drawing, " ".join(text))]


def _fast(result: Result) -> list[str]:
    fast = result.get("fast") or {}
    if not fast.get("on"):
        why = fast.get("why") or "peft_fast was not asked"
        return [f"<p>Nothing ran on the fast path: {escape(why)}.</p>".replace("..</p>", ".</p>")]
    quick, slow = list(fast.get("fast", ())), dict(fast.get("slow", {}))
    joined = f"{fast.get('groups', 0)} groups of layers with one input and {fast.get('blocks', 0)} MLP blocks"
    parts = [
        f"<p>{len(quick)} layers with adapters take the fast path, {len(slow)} stay with PEFT. {joined} run as one. "
        f"{fast.get('fast_calls', 0):,} calls were fast.</p>"
    ]
    reasons: dict[str, list[str]] = {}
    for layer, why in slow.items():
        reasons.setdefault(str(why), []).append(layer)
    for why, layers in reasons.items():
        listed = f"<details><summary>{len(layers)} layers</summary>{names(layers)}</details>"
        parts.append(f"<p>With PEFT: {escape(why)}</p>{listed if len(layers) > 6 else names(layers)}")
    if handed := fast.get("handed_back"):
        rows = [(f"{n:,}", why) for why, n in handed.items()]
        parts.append(table(("calls handed back", "why"), rows))
    if quick:
        parts.append(f"<details><summary>the fast layers</summary>{names(quick)}</details>")
    return parts


# ---- where it came from


def _data(result: Result) -> list[str]:
    rows, sources = result.get("rows") or {}, result.get("sources") or {}
    splits = sorted({*rows, *sources}, key=lambda split: (SPLITS.index(split) if split in SPLITS else 9, split))
    listed = [(s, f"{rows[s]:,}" if s in rows else "–", sources.get(s, "")) for s in splits]
    parts = [table(("split", "rows", "from"), listed, numbers=(1,))] if listed else []
    if notes := result.get("notes"):
        parts.append("<h3>Notes</h3><ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>")
    if facts := result.get("facts"):
        inner = table((), [(key, _short(value)) for key, value in facts.items()])
        parts.append(f"<details><summary>what was learnt from the rows before training</summary>{inner}</details>")
    return parts or ["<p>Nothing is known of the rows.</p>"]


def _short(value: Any, room: int = 2000) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= room else f"{text[:room]} … ({len(text):,} characters)"


def _settings(result: Result) -> list[str]:
    config = result.get("config") or {}
    given, rest = _changed(config)
    parts = ["<h3>Options</h3>", table((), [(key, _short(value)) for key, value in given.items()])]
    inner = table((), [(key, _short(value)) for key, value in rest.items()])
    parts.append(f"<details><summary>the {len(rest)} options at their defaults</summary>{inner}</details>")
    left = f"<div>{''.join(parts)}</div>"
    right = f"<div><h3>Machine and versions</h3>{table((), _machine(result.get('machine') or {}))}</div>"
    end = '<p class="soft">Every figure of this page is in metrics.json; config.yaml trains the same again.</p>'
    return [f'<div class="two">{left}{right}</div>', end]


def _changed(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options that say something, options at their defaults)."""
    from peft_fast.recipes.config import Config

    fields = Config.model_fields
    same = {
        key: value
        for key, value in config.items()
        if key in fields and not fields[key].is_required() and value == _plain(fields[key].get_default())
    }
    return {key: value for key, value in config.items() if key not in same}, same


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _machine(found: Mapping[str, Any]) -> Sequence[tuple[str, Any]]:
    rows = [
        (key.replace("_", " "), found[key])
        for key in ("cpu", "cores", "threads", "system", "python", "device", "date", "commit")
        if found.get(key) not in (None, "")
    ]
    rows += [(f"gpu {key}", value) for key, value in (found.get("gpu") or {}).items()]
    rows += [("flags", " ".join(found["flags"]))] if found.get("flags") else []
    rows += [("load average", " ".join(map(str, found["load_average"])))] if found.get("load_average") else []
    rows += [(f"peft_fast {key}", value) for key, value in (found.get("peft_fast") or {}).items()]
    return [*rows, *(found.get("packages") or {}).items()]
