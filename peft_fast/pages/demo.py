"""report.html of the demo: one file, nothing loaded from elsewhere, printable, light and dark."""

from __future__ import annotations

from typing import Any

from peft_fast.pages import charts, digest
from peft_fast.pages.html import document, escape, figure, names, table

LOSS = (
    "Training loss by step, from the same seed and on the same batches. Thick: mean of the last steps. "
    "The dropout masks differ, so the curves agree in course, not digit by digit."
)
TURNS = (
    "Milliseconds a step, turn by turn: the two runs alternate every few steps, so whatever else the "
    "machine did hit both. Batches are sorted by length, hence the waves."
)
OPS = (
    "One batch, forward and backward, under torch's profiler (which slows both down), by group of operators. "
    "In a fast layer the matrix products, the dropout mask and the sums happen inside one operator."
)
METHOD = (
    "Each run is a process of its own with the Hugging Face Trainer: in stock PEFT's nothing is patched, and "
    "its peak memory is its own. They take turns of a few steps in the order a b, b a, so that both meet the "
    "same machine. Times are wall-clock and leave out loading and evaluation."
)

NO_DROPOUT = (
    " The frozen model's own dropout is off in both (--keep-dropout leaves it on): its masks differ between any two "
    "runs and would move the accuracy by more than what is compared. LoRA's dropout is on."
)


def build(result: dict[str, Any]) -> str:
    """The document of `compare`, as a page."""
    both = [
        (digest.NAMES[name], css, result["runs"][name]) for name, css in (("stock", "stock"), ("peft_fast", "fast"))
    ]
    fast = result["runs"]["peft_fast"]
    body = [
        f"<h1>The same LoRA fine-tuning, {digest.speedup(result)}</h1>",
        f'<p>{escape(digest.what(result))}</p><p class="soft">{escape(digest.where(result))}</p>',
        _cards(result),
        "<h2>Results</h2>",
        table(("", "stock PEFT", "peft_fast", "ratio"), digest.rows(result), numbers=(1, 2, 3)),
        f'<p class="soft">{escape(digest.verdict(result))}</p>',
        "<h2>The same learning</h2>",
        figure(_losses(both), LOSS),
        "<h2>Speed</h2>",
        figure(
            _bars(both, "tokens_per_second", 1, "tokens/s", charts.WIDE),
            "Training speed; padding is not counted.",
        ),
        figure(_turns(both), TURNS),
        "<h2>Memory</h2>",
        '<div class="two">',
        figure(_bars(both, "saved_bytes", 2**20, "MiB"), "Kept by autograd from forward to backward, one batch."),
        figure(
            _bars(both, "peak_resident_bytes", 2**20, "MiB"),
            "Peak resident memory of the process while it trained.",
        ),
        "</div>",
        "<h2>Where the time goes</h2>",
        figure(_phases(result), "Milliseconds a step, measured while training."),
        figure(charts.stacks([(name, run["ops_ms"]) for name, _, run in both], "ms", "time by operators"), OPS),
        "<h2>Which layers are fast</h2>",
        _layers(fast),
        "<h2>How this was measured</h2>",
        f"<p>{escape(METHOD)}{escape('' if result['recipe']['keep_dropout'] else NO_DROPOUT)}</p>",
        _facts(result),
    ]
    return document(f"peft_fast demo: {digest.speedup(result)}", body)


def _cards(result: dict[str, Any]) -> str:
    stock, fast = result["runs"]["stock"], result["runs"]["peft_fast"]
    apart = not result["quick"] and round(100 * abs(fast["accuracy"] - stock["accuracy"]), 6) > 1
    number, word = digest.speedup(result).split()
    cards = [
        (number, f"{word} training than stock PEFT", ""),
        (
            f"{100 * fast['accuracy']:.1f} %",
            f"accuracy; stock PEFT {100 * stock['accuracy']:.1f} %",
            " bad" * apart,
        ),
        (f"{fast['saved_bytes'] / stock['saved_bytes']:.2f}×", "stock's saved activations", ""),
        (
            f"{len(fast['fast'])} of {len(fast['fast']) + len(fast['slow'])}",
            f"LoRA layers fast, {fast['fast_calls']:,} fast calls",
            "",
        ),
    ]
    made = (f'<div class="card{css}"><b>{escape(big)}</b>{escape(text)}</div>' for big, text, css in cards)
    return f'<div class="cards">{"".join(made)}</div>'


Both = list[tuple[str, str, dict[str, Any]]]  # title, css class, figures


def _key(both: Both) -> str:
    return "<p>" + " · ".join(f'<span class="key {css}">{escape(name)}</span>' for name, css, _ in both) + "</p>"


def _losses(both: Both) -> str:
    raw, thick = [], []
    for _, css, run in both:
        steps = list(range(1, len(run["losses"]) + 1))
        raw.append((f"{css} raw", steps, run["losses"]))
        thick.append((css, steps, digest.smooth(run["losses"])))
    return _key(both) + charts.lines([*raw, *thick], "step", "loss", "training loss of both runs", whole=True)


def _turns(both: Both) -> str:
    series = [(css, run["turn_steps"], digest.step_ms(run)) for _, css, run in both]
    return _key(both) + charts.lines(
        series, "step", "ms a step", "milliseconds a step", height=270, zero=True, whole=True
    )


def _bars(both: Both, key: str, scale: float, unit: str, width: int = charts.HALF) -> str:
    values = [(name, css, run[key] / scale) for name, css, run in both]
    return charts.bars([(name, css, v, f"{v:,.0f} {unit}") for name, css, v in values], key.replace("_", " "), width)


def _phases(result: dict[str, Any]) -> str:
    phases = [(title, digest.phases_ms(result, name)) for name, title in digest.NAMES.items()]
    return charts.stacks(phases, "ms", "time of a step by phase")


def _layers(fast: dict[str, Any]) -> str:
    reasons: dict[str, list[str]] = {}
    for layer, reason in fast["slow"].items():
        reasons.setdefault(reason, []).append(layer)
    joined = f"{fast['groups']} groups of layers with one input and {fast['blocks']} MLP blocks run as one each."
    parts = [f"<p>{len(fast['fast'])} LoRA layers take the fast path; {len(fast['slow'])} stay with PEFT. {joined}</p>"]
    for reason, layers in reasons.items():
        parts.append(f"<p>{len(layers)} with PEFT: {escape(reason)}</p>{names(layers)}")
    handed = [(f"{count:,}", reason) for reason, count in fast["handed_back"].items()]
    if handed:
        parts.append(table(("calls handed back", "why"), handed))
    if fast["fast"]:
        parts.append(f"<details><summary>the fast layers</summary>{names(fast['fast'])}</details>")
    return "".join(parts)


def _facts(result: dict[str, Any]) -> str:
    found = result["machine"]
    recipe = [(key.replace("_", " "), value) for key, value in result["recipe"].items() if key != "network"]
    recipe += [("classes", ", ".join(result["data"]["names"])), ("held-out rows", result["data"]["test"])]
    system = [
        (key.replace("_", " "), found[key]) for key in ("cpu", "cores", "system", "python", "device", "date", "commit")
    ]
    system += [
        ("flags", " ".join(found["flags"])),
        ("load average", " ".join(map(str, found["load_average"]))),
    ]
    system += [(f"gpu {key}", value) for key, value in found.get("gpu", {}).items()]
    system += [(key, value) for key, value in found["peft_fast"].items() if not isinstance(value, bool)]
    system += list(found["packages"].items())
    both = (("Recipe", recipe), ("Machine and versions", system))
    tables = "".join(f"<div><h2>{title}</h2>{table((), facts)}</div>" for title, facts in both)
    end = f"{result['wall_seconds']:.0f} s in all, with loading and evaluation. Every number is in demo.json."
    return f'<div class="two">{tables}</div><p class="soft">{end}</p>'
