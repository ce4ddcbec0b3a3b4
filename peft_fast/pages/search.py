"""report.html of a search: the trials, how their metric came about, which options mattered; plots by optuna."""

from __future__ import annotations

import base64
import contextlib
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peft_fast.pages import charts, words
from peft_fast.pages.html import document, escape, figure, table

FEWEST = 4  # finished trials from which on importance says anything


def write(
    rows: Sequence[Mapping[str, Any]], metric: str, higher: bool, pictures: Mapping[str, bytes], folder: Path
) -> Path:
    """The plots as files, and the page with them in it."""
    for name, png in pictures.items():
        (folder / f"{name}.png").write_bytes(png)
    path = folder / "report.html"
    part = path.with_suffix(".part")
    part.write_text(build(rows, metric, higher, pictures), encoding="utf-8")
    return part.replace(path)


def build(rows: Sequence[Mapping[str, Any]], metric: str, higher: bool, pictures: Mapping[str, bytes]) -> str:
    """The page."""
    best = next((row for row in rows if row["best"]), None)
    done = [row for row in rows if row["state"] == "done"]
    shown = words.metric(metric, best[metric]) if best else "no trial done"
    title = f"Search over {len(rows)} trials: {metric} {shown}"
    body = [f"<h1>{escape(title)}</h1>", f'<p class="soft">{escape(_counts(rows))}</p>']
    if again := [str(row["trial"]) for row in rows if row.get("again")]:
        body.append(f'<p class="soft">Cut off and done again under its own number: trial {", ".join(again)}.</p>')
    if best:
        given = ", ".join(f"{name} {value}" for name, value in best["options"].items())
        body.append(f"<p>Best: trial {best['trial']}: {escape(given)}.</p>")
        body.append("<p>best.yaml trains it again as it is; its run is in its folder.</p>")
    body += [f'<p class="alert">{escape(remark)}</p>' for remark in remarks(rows, metric)]
    if len(done) > 1:
        body += ["<h2>Course</h2>", _course(rows, metric, higher)]
    texts = {
        "importance": "How much of the metric's variance each option explains, over the trials that had all of them.",
        "parallel": "A line is a trial. Where its colour is dark, the metric was good.",
    }
    for name, heading in (("importance", "Which options mattered"), ("parallel", "All trials at once")):
        if name in pictures:
            data = base64.b64encode(pictures[name]).decode()
            image = f'<img class="plot" alt="{escape(heading)}" src="data:image/png;base64,{data}"/>'
            body += [f"<h2>{escape(heading)}</h2>", figure(image, texts[name])]
    if "importance" not in pictures:
        body.append(f'<p class="soft">What mattered shows when {FEWEST} trials came to different values.</p>')
    names = list(dict.fromkeys(name for row in rows for name in row["options"]))
    listed = sorted(rows, key=lambda row: _place(row, metric, higher))
    cells = [
        (
            f"{row['trial']}{' *' if row['best'] else ''}",
            "cut short" if row["state"] == "pruned" else row["state"],
            words.metric(metric, row[metric]),
            words.seconds(row["seconds"]),
            *(row["options"].get(name, "") for name in names),
        )
        for row in listed
    ]
    body += ["<h2>Trials</h2>", table(("trial", "state", metric, "time", *names), cells, numbers=(0, 2, 3))]
    if reasons := [(row["trial"], row["reason"]) for row in listed if row["reason"]]:
        body += ["<h2>Why trials ended early</h2>", table(("trial", "why"), reasons)]
    return document(title, body)


def remarks(rows: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    """What makes a best trial less than it seems."""
    best, values = next((row for row in rows if row["best"]), None), [r[metric] for r in rows if r["state"] == "done"]
    said = []
    if best and best.get("unlearnt"):
        said.append(f"No trial did better than the weights it began with: the best is the {metric} after training.")
    if len(values) > 1 and len(set(values)) == 1:
        said.append(f"All {len(values)} trials came to the same {metric}: nothing tells them apart.")
    return said


def _counts(rows: Sequence[Mapping[str, Any]]) -> str:
    states = [row["state"] for row in rows]
    said = {"done": "done", "pruned": "cut short", "failed": "failed", "running": "running", "waiting": "waiting"}
    counted = [f"{states.count(state)} {word}" for state, word in said.items() if state in states]
    return f"{', '.join(counted)} · {words.seconds(sum(row['seconds'] or 0 for row in rows))} of finished trials"


def _place(row: Mapping[str, Any], metric: str, higher: bool) -> tuple[int, float]:
    value = words.number(row[metric])
    order = {"done": 0, "pruned": 1}.get(row["state"], 2)
    return order, (-value if higher else value) if math.isfinite(value) else math.inf


def _course(rows: Sequence[Mapping[str, Any]], metric: str, higher: bool) -> str:
    """Each finished trial, and the best so far."""
    done = [row for row in rows if row["state"] == "done"]
    xs, ys, so_far = [float(row["trial"]) for row in done], [float(row[metric]) for row in done], []
    for y in ys:
        so_far.append(y if not so_far else (max if higher else min)(so_far[-1], y))
    dots = [("line1", x, y, "") for x, y in zip(xs, ys, strict=True)]
    key = charts.key([("line0", "best so far"), ("line1", "a trial")])
    drawing = charts.lines([("line0", xs, so_far)], "trial", metric, f"{metric} by trial", 280, dots=dots, whole=True)
    return figure(key + drawing, f"{metric} on the validation rows.")


# ---- optuna's plots


def draw(study: Any, metric: str) -> dict[str, bytes]:
    """The plots that the trials so far allow, as PNG."""
    if not (all_names := together(study, 2)):
        return {}
    import matplotlib

    matplotlib.use("Agg")
    import optuna.visualization.matplotlib as plots
    from matplotlib import pyplot as plt

    made = {}
    with warnings.catch_warnings(), plt.style.context("default"):
        warnings.simplefilter("ignore")
        for name, names, plot in (
            ("importance", together(study, FEWEST, apart=True), plots.plot_param_importances),
            ("parallel", all_names, partial(plots.plot_parallel_coordinate, target_name=metric)),
        ):
            if not names:
                continue
            # a plot that optuna cannot make of these trials is left out
            with contextlib.suppress(ValueError, RuntimeError, ZeroDivisionError):
                plot(study, params=names)
                made[name] = _png(plt, name, metric, len(names))
            plt.close("all")
    return made


def _png(plt: Any, name: str, metric: str, count: int) -> bytes:
    drawn = plt.gcf()
    drawn.set_size_inches(11, 0.6 * count + 1.8 if name == "importance" else 5.2)
    axes = drawn.axes[0]
    for place in ("left", "center"):
        axes.set_title("", loc=place)
    for one in drawn.axes:
        one.grid(False)
    if name == "importance":
        axes.set_xlabel(f"share of the variance of {metric}")
        axes.set_ylabel("")
        if axes.get_legend():
            axes.get_legend().remove()
    else:
        for label in axes.get_xticklabels():
            label.set_rotation(20)
            label.set_horizontalalignment("right")
        trials = axes.collections[0]
        if trials.colorbar and len({float(value) for value in trials.get_array()}) == 1:
            trials.colorbar.remove()  # of one value it would make up a scale
    stream = io.BytesIO()
    drawn.savefig(stream, format="png", dpi=110, bbox_inches="tight", facecolor="white")
    return stream.getvalue()


def together(study: Any, fewest: int, apart: bool = False) -> list[str]:
    """Options that the most finished trials have in common and that differ among them: r means nothing for full.

    No option if these trials are too few; ``apart``: or if they all came to the same value.
    """
    done = [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE" and "aside" not in t.user_attrs]
    kinds: dict[frozenset, int] = {}
    for trial in done:
        kind = frozenset(trial.params)
        kinds[kind] = sum(kind <= set(other.params) for other in done)
    best: list[str] = []
    for kind in sorted(kinds, key=lambda kind: (-len(kind), sorted(kind))):
        group = [trial for trial in done if kind <= set(trial.params)]
        names = [name for name in group[0].params if name in kind and len({str(t.params[name]) for t in group}) > 1]
        values = {trial.value for trial in group}
        if len(group) >= fewest and len(values) > apart and len(names) > len(best):
            best = names
    return best
