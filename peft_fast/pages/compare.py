"""Runs side by side: a table, warnings where they cannot be compared, curves as a page and as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_fast.pages import charts, words
from peft_fast.pages.html import document, escape, figure, table

Result = Mapping[str, Any]
COLOURS = ("#1f5fa8", "#c96a12", "#2c8a63", "#a53d6f", "#7a5bb0", "#8a7414", "#3f8fa3", "#6b7480")
DASH = 3  # of runs that lie on one another, in widths of a line
# where a run lies, what it is called and how it is watched does not change what it learns
ASIDE = {"out", "name", "overwrite", "resume", "report_to", "log_every", "network", "search", "keep"}


def names(results: Sequence[Result]) -> list[str]:
    """A name for each run, told apart by a number where two are called alike."""
    given = [str(result.get("name") or "run") for result in results]
    return [f"{n} ({given[: i + 1].count(n)})" if given.count(n) > 1 else n for i, n in enumerate(given)]


def metric(results: Sequence[Result], asked: str | None = None) -> str:
    """What they are compared by: what was asked for, else what the first run was judged by."""
    return asked or next((r["metric"] for r in results if r.get("metric")), "loss")


def differing(results: Sequence[Result]) -> list[str]:
    """Options that are not the same in all runs, in the config's order."""
    every = dict.fromkeys(key for result in results for key in result.get("config") or {})
    return [key for key in every if key not in ASIDE and len({repr(_given(r, key)) for r in results}) > 1]


def _given(result: Result, key: str) -> Any:
    return (result.get("config") or {}).get(key)


def warnings(results: Sequence[Result]) -> list[str]:
    """Why the figures may not belong side by side."""
    found = []

    def differ(what: str, values: Sequence[Any], why: str) -> None:
        kinds = list(dict.fromkeys(map(str, values)))
        if len(kinds) > 1:
            found.append(f"not the same {what} ({'; '.join(kinds)}): {why}")

    differ("task", [r.get("task") for r in results], "their metrics mean different things")
    differ("metric", [r.get("metric") for r in results], "each run kept what was best by its own")
    differ("data", [_given(r, "data") for r in results], "their metrics are of other rows")
    drawn = all("drawn" in r for r in results)  # results of an earlier version do not say how
    differ("rows they are judged by", [_held(r, drawn) for r in results], "a difference may be the rows'")
    counts = {(r.get("rows") or {}).get("train") for r in results}
    why = "one has seen more" if len(counts) > 1 else "they have learnt from others"
    differ("training rows", [_rows(r, "train", drawn) for r in results], why)
    machines = [
        (r.get("machine") or {}).get("gpu", {}).get("name") or (r.get("machine") or {}).get("cpu") for r in results
    ]
    differ("machine", machines, "their minutes cannot be compared")
    for name, result in zip(names(results), results, strict=True):
        if result.get("state") != "done":
            found.append(f"{name} was stopped before its end")
        elif (result.get("best") or {}).get("step") == 0 and (result.get("config") or {}).get("keep_best", True):
            found.append(f"{name} kept the weights it began with: no evaluation was better")
    return found


def _held(result: Result, drawn: bool) -> str:
    split = "test" if (result.get("final") or {}).get("test") else "validation"
    source = (result.get("sources") or {}).get(split, "")
    return f"{split}: {_rows(result, split, drawn)}" + f" of {source}" * bool(source)


def _rows(result: Result, split: str, drawn: bool) -> str:
    """How many rows a split has, and how they and what is asked of them were chosen."""
    how = (result.get("drawn") or {}).get(split) if drawn else None
    return f"{(result.get('rows') or {}).get(split)}" + f" ({how})" * bool(how)


def rows(results: Sequence[Result], asked: str | None = None) -> tuple[list[str], list[list[str]]]:
    """(head, a row a run) of what came out; the best value has a star if all are of the same rows."""
    name = metric(results, asked)
    scores = [score(result, name) for result in results]
    known = [value for value in scores if value is not None and math.isfinite(value)]
    higher = next((r.get("higher", True) for r in results if r.get("metric") == name), "loss" not in name)
    best = (max if higher else min)(known) if known and _alike(results, name) else None
    body = []
    for title, result, value in zip(names(results), results, scores, strict=True):
        flow, memory = result.get("throughput") or {}, result.get("memory") or {}
        star = " *" if value is not None and value == best and len(results) > 1 else ""
        body.append(
            [
                title,
                words.metric(name, value) + star,
                split(result, name),
                words.seconds(flow.get("train_seconds", result.get("seconds"))),
                words.size(words.beyond(memory)),
                words.count((result.get("model") or {}).get("trainable")),
                words.speed(result),
            ]
        )
    return ["run", name, "of rows", "training", "memory", "trained", "speed"], body


def _alike(results: Sequence[Result], name: str) -> bool:
    """Are the values of a metric of one task and of the same rows?"""
    drawn = all("drawn" in r for r in results)
    kinds = {(r.get("task"), repr(_given(r, "data")), split(r, name), _held(r, drawn)) for r in results}
    return len(kinds) == 1


def options(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of the options that differ: an option a row, or a run a row where there are many runs."""
    differ, titles = differing(results), names(results)
    if len(results) <= 5:
        return ["option", *titles], [[key, *(_short(_given(r, key)) for r in results)] for key in differ]
    return ["run", *differ], [
        [title, *(_short(_given(result, key)) for key in differ)] for title, result in zip(titles, results, strict=True)
    ]


def score(result: Result, name: str) -> float | None:
    """The run's value of a metric: on the test rows if there are any, as it is summed up by."""
    value = (result.get("final") or {}).get(split(result, name), {}).get(name)
    if value is not None:
        return float(value)
    best = result.get("best") or {}
    return best.get("value") if name == result.get("metric") else None


def split(result: Result, name: str) -> str:
    """Of which split that value is."""
    final = result.get("final") or {}
    return next((s for s in ("test", "validation") if final.get(s, {}).get(name) is not None), "validation")


def heading(results: Sequence[Result], name: str) -> str:
    """What the page and the picture are called."""
    splits = dict.fromkeys(split(result, name) for result in results)
    return f"{len(results)} runs by {name} of the {' or '.join(splits)} rows"


def _short(value: Any) -> str:
    text = "default" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else text[:39] + "…"


# ---- curves


def curves(results: Sequence[Result], name: str) -> dict[str, list[tuple[list[float], list[float], list[float]]]]:
    """The figure's title -> (steps, minutes, values) of each run."""
    found: dict[str, list] = {"training loss": [], f"validation {name}": []}
    for result in results:
        log = [entry for entry in result.get("log") or () if "loss" in entry]
        found["training loss"].append(_points(result, log, "loss", smooth=True))
        judged = [entry for entry in result.get("evaluations") or () if name in entry]
        found[f"validation {name}"].append(_points(result, judged, name))
    return {title: each for title, each in found.items() if any(steps for steps, _, _ in each)}


def _points(result: Result, entries: Sequence[Any], key: str, smooth: bool = False) -> tuple[list, list, list]:
    steps = [float(entry["step"]) for entry in entries]
    flow = result.get("throughput") or {}
    # steps of a run take about as long as one another
    pace = (flow.get("train_seconds") or 0) / (flow.get("steps") or 1) / 60
    values = [words.number(entry.get(key)) for entry in entries]
    if smooth and len(values) >= 12:
        values = words.smooth(values, len(values) / 25)
    return steps, [step * pace for step in steps], values


def build(results: Sequence[Result], asked: str | None = None) -> str:
    """The page."""
    name, titles = metric(results, asked), names(results)
    head, body = rows(results, asked)
    key = charts.key([(f"line{i % 8}", title) for i, title in enumerate(titles)])
    whole = heading(results, name)
    parts = [f"<h1>{escape(whole)}</h1>"]
    for text in warnings(results):
        named = text.startswith(tuple(titles))  # a run's name stays as it is
        parts.append(f'<p class="alert">{escape(text if named else text[:1].upper() + text[1:])}.</p>')
    parts.append(table(head, body, numbers=(1, 3, 4, 5, 6)))
    if any(row[1].endswith(" *") for row in body):
        parts.append('<p class="soft">*: best.</p>')
    if differing(results):
        parts += ["<h2>Options that differ</h2>", table(*options(results))]
    parts.append("<h2>Curves</h2>")
    for title, each in curves(results, name).items():
        for place, label in ((0, "step"), (1, "minutes of training")):
            series = [(f"line{i % 8}", one[place], one[2]) for i, one in enumerate(each) if one[0]]
            drawing = charts.lines(series, label, title, f"{title} by {label}", 290, whole=place == 0)
            under = f"{title[:1].upper() + title[1:]} by {label}."
            if any(count > 1 for _, count in charts.turns([(xs, ys) for _, xs, ys in series])):
                under += " Runs that lie on one another are dashed in turn."
            parts.append(figure((key if place == 0 else "") + drawing, under))
    return document(whole, parts)


def draw(results: Sequence[Result], path: Path, asked: str | None = None) -> None:
    """The curves as a picture: loss and metric, by step and by minutes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    name, titles = metric(results, asked), names(results)
    found = curves(results, name) or {f"validation {name}": [([], [], [])] * len(results)}
    picture, grid = plt.subplots(len(found), 2, figsize=(13, 4.4 * len(found)), dpi=110, squeeze=False)
    for across, (title, each) in zip(grid, found.items(), strict=True):
        for place, label in ((0, "step"), (1, "minutes of training")):
            axes = across[place]
            turns = charts.turns([(one[place], one[2]) for one in each])
            for i, (one, (turn, count)) in enumerate(zip(each, turns, strict=True)):
                mark = "o" if len(one[0]) < 40 and "validation" in title else None
                # each its own part of the way, and its points around those of the later ones
                line = (DASH * (count - turn), (DASH, DASH * (count - 1))) if count > 1 else "-"
                size = 4 + 16 * (count - 1 - turn) / max(count, 4)
                axes.plot(one[place], one[2], color=COLOURS[i % 8], lw=2, ls=line, marker=mark, ms=size)
            axes.set_xlabel(label)
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=place == 0))
            axes.set_title(title, loc="left")
            axes.grid(axis="y", alpha=0.3)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
    scores = ", ".join(
        f"{_plain(title)} {words.metric(name, score(result, name))} ({split(result, name)})"
        for title, result in zip(titles, results, strict=True)
    )
    said = f"{name}: {scores}" if len(results) <= 4 else heading(results, name)
    picture.suptitle(said, fontsize=10, x=0.01, ha="left")
    entries = [Line2D([], [], color=COLOURS[i % 8], lw=2, label=_plain(title)) for i, title in enumerate(titles)]
    grid[0][0].legend(handles=entries, frameon=False, fontsize=9)
    picture.tight_layout()
    picture.savefig(path)
    plt.close(picture)


def _plain(text: str) -> str:
    """A label that matplotlib neither reads as mathematics nor hides."""
    return text.replace("$", r"\$").lstrip("_") or "run"
