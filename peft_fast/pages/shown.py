"""What a task shows of its answers, as html: confusion matrix, tables, curves, pictures."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from peft_fast.pages import charts, words
from peft_fast.pages.html import escape, figure, table

ROOM = 30  # classes a matrix can show as numbers; more are drawn, with the worst confusions in words
CELLS = 4000  # of a drawn matrix; the fainter ones are left out


def build(shown: Sequence[Mapping[str, Any]]) -> list[str]:
    """The parts in order; a kind nobody knows is shown as it came."""
    kinds = {"confusion": _confusion, "table": _table, "lines": _lines, "images": _images}
    return [kinds.get(part.get("kind"), _raw)(part) for part in shown]


def _raw(part: Mapping[str, Any]) -> str:
    return f"<pre>{escape(json.dumps(part, indent=1, ensure_ascii=False))}</pre>"


def _heading(part: Mapping[str, Any], default: str) -> str:
    return f"<h3>{escape(part.get('title') or default)}</h3>"


# ---- confusion matrix


def _confusion(part: Mapping[str, Any]) -> str:
    names, counts = [str(name) for name in part["names"]], part["counts"]
    parts = [_heading(part, "Confusion matrix")]
    if len(names) <= ROOM:
        parts.append(_matrix(names, counts))
        note = "Row: the truth; column: the answer; colour: the share of its row."
        parts.append(f'<p class="soft">{note} Recall is read along a row, precision down a column.</p>')
        return "".join(parts)
    parts.append(figure(_drawn(names, counts), f"{len(names)} classes. Row: the truth, column: the answer."))
    parts.append(table(("truth", "answered as", "rows", "of its rows"), _worst(names, counts), numbers=(2, 3)))
    parts.append(f"<details><summary>every class</summary>{_classes(names, counts)}</details>")
    return "".join(parts)


def _matrix(names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    small = len(names) > 12  # then shares go into the tool tip
    columns = [sum(row[j] for row in counts) for j in range(len(names))]
    short = [name if len(name) <= 24 else name[:23] + "…" for name in names]
    head = "".join(f'<th class="col"><span>{escape(name)}</span></th>' for name in short)
    rows = [f'<tr><th></th>{head}<th class="col"><span>recall</span></th></tr>']
    for i, row in enumerate(counts):
        whole = sum(row)
        cells = []
        for j, value in enumerate(row):
            part = value / whole if whole else 0.0
            tip = f"{names[i]} answered as {names[j]}: {value:,} of {whole:,} ({100 * part:.1f} %)"
            css = " hot" * (part > 0.55) + " hit" * (i == j) + " none" * (not value)
            shown = f"{value:,}" if value or not small else "·"
            below = "" if small else f"<small>{100 * part:.0f} %</small>"
            cells.append(f'<td class="cell{css}" style="--v:{part:.3f}" title="{escape(tip)}">{shown}{below}</td>')
        rows.append(f"<tr><th>{escape(short[i])}</th>{''.join(cells)}<td class='edge'>{_part(row[i], whole)}</td></tr>")
    edge = "".join(f"<td class='edge'>{_part(counts[j][j], columns[j])}</td>" for j in range(len(names)))
    rows.append(f"<tr><th>precision</th>{edge}<td></td></tr>")
    css = "matrix small" if small else "matrix"
    return f'<div class="scroll"><table class="{css}">{"".join(rows)}</table></div>'


def _part(value: int, whole: int) -> str:
    return f"{100 * value / whole:.0f} %" if whole else "–"


def _drawn(names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    n = len(names)
    cells = [(value / max(sum(row), 1), i, j) for i, row in enumerate(counts) for j, value in enumerate(row) if value]
    cells = sorted(cells, reverse=True)[:CELLS]
    rects = "".join(
        f'<rect class="heat" x="{j}" y="{i}" width="1" height="1" fill-opacity="{0.15 + 0.85 * v:.2f}">'
        f"<title>{escape(f'{names[i]} → {names[j]}: {counts[i][j]:,}')}</title></rect>"
        for v, i, j in cells
    )
    frame = f'<rect class="frame" x="0" y="0" width="{n}" height="{n}"/>'
    label = f"confusion matrix of {n} classes"
    return f'<svg class="square" viewBox="0 0 {n} {n}" role="img" aria-label="{label}">{frame}{rects}</svg>'


def _worst(names: Sequence[str], counts: Sequence[Sequence[int]], most: int = 20) -> list[tuple[str, str, str, str]]:
    wrong = [(v, i, j) for i, row in enumerate(counts) for j, v in enumerate(row) if v and i != j]
    wrong.sort(key=lambda cell: (-cell[0], cell[1], cell[2]))
    return [(names[i], names[j], f"{v:,}", _part(v, sum(counts[i]))) for v, i, j in wrong[:most]]


def _classes(names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    columns = [sum(row[j] for row in counts) for j in range(len(names))]
    rows = [
        (name, f"{sum(row):,}", _part(row[i], sum(row)), _part(row[i], columns[i]))
        for i, (name, row) in enumerate(zip(names, counts, strict=True))
    ]
    return table(("class", "rows", "recall", "precision"), rows, numbers=(1, 2, 3))


# ---- the rest


def _table(part: Mapping[str, Any]) -> str:
    head = [str(cell) for cell in part.get("head", ())]
    numbers = [i for i in range(len(head)) if all(isinstance(r[i], int | float) for r in part["rows"]) and part["rows"]]
    rows = [[words.plain(cell) if isinstance(cell, float) else _text(cell) for cell in row] for row in part["rows"]]
    return _heading(part, "Samples") + table(head, rows, numbers)


def _text(cell: Any) -> str:
    if isinstance(cell, dict | list):
        return json.dumps(cell, ensure_ascii=False)
    return "" if cell is None else str(cell)


def _lines(part: Mapping[str, Any]) -> str:
    """Series as curves; those named in ``dots`` as points."""
    named, series, dots = part["series"], [], []
    loose = set(part.get("dots") or ())
    for i, (name, points) in enumerate(named.items()):
        xs, ys = [words.number(x) for x, _ in points], [words.number(y) for _, y in points]
        if name in loose:
            dots += [(f"line{i % 8}", x, y, "") for x, y in zip(xs, ys, strict=True) if math.isfinite(x + y)]
        elif points:
            series.append((f"line{i % 8}", xs, ys))
    key = charts.key([(f"line{i % 8}", name) for i, name in enumerate(named)])
    title = part.get("title") or "Curves"
    drawing = charts.lines(series, str(part.get("x", "")), str(part.get("y", "")), str(title), dots=dots)
    return _heading(part, "Curves") + figure(key + drawing, "")


def _images(part: Mapping[str, Any]) -> str:
    cards = []
    for image in part["images"]:
        # nothing but base64 may enter the attribute
        data, caption = re.sub(r"[^A-Za-z0-9+/=]", "", image["png"]), escape(image.get("caption", ""))
        picture = f'<img src="data:image/png;base64,{data}" alt="{caption}"/>'
        cards.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
    return _heading(part, "Samples") + f'<div class="images">{"".join(cards)}</div>'
