"""The report's charts as inline SVG: text and colours follow the page, so they read in light and dark."""

from __future__ import annotations

import bisect
import html
import itertools
import math
from collections.abc import Callable, Sequence

Series = tuple[str, Sequence[float], Sequence[float]]  # css class, xs, ys
WIDE, HALF = 860, 480  # drawn at about their own size in one and in two columns
DASH = 9  # of curves that lie on one another, in the drawing's units
HIDDEN = 0.005  # of a drawing's height: about half a line's width


def ticks(low: float, high: float, count: int = 5, least: float = 0.0) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high``, about ``count`` of them, ``least`` apart or more."""
    span = (high - low) or abs(high) or 1.0
    raw = span / count
    step = 10.0 ** math.floor(math.log10(raw))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= raw * 0.999)
    step = max(step, least)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def lines(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    label: str,
    height: int = 330,
    zero: bool = False,
    width: int = WIDE,
    marks: Sequence[tuple[float, str]] = (),
    dots: Sequence[tuple[str, float, float, str]] = (),
    whole: bool = False,
) -> str:
    """Curves over one another; a css class ending in "raw" is drawn faint, and what is not finite leaves a gap.

    ``marks`` are upright lines with a word at the top, ``dots`` points with one beside them (css class, x, y, word),
    where no curve runs through it. ``whole``: x counts something, and has no ticks between whole numbers. Curves that
    lie on one another are dashed in turn.
    """
    xs = [x for _, values, _ in series for x in values] + [x for x, _ in marks] + [x for _, x, _, _ in dots] or [0.0]
    ys = [y for _, _, values in series for y in values if math.isfinite(y)] + [y for _, _, y, _ in dots] or [0.0]
    x_ticks, y_ticks = ticks(min(xs), max(xs), 6, float(whole)), _heights(0.0 if zero else min(ys), max(ys))
    x0, x1, y0, y1 = min(xs), max(xs), y_ticks[0], y_ticks[-1]
    room = max(len(number(y)) for y in y_ticks)
    left, right, top, bottom = max(52, 14 + 8 * room), width - 14, 26 + 18 * bool(marks), height - 38
    apart = 18 * any(text for *_, text in dots)  # above and below all curves, for a word beside a dot

    def px(x: float) -> float:
        return left + (x - x0) / ((x1 - x0) or 1) * (right - left)

    def py(y: float) -> float:
        return bottom - apart - (y - y0) / ((y1 - y0) or 1) * (bottom - top - 2 * apart)

    parts, drawn = [], []
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(_text(left - 8, py(y) + 4, number(y), "end"))
    parts += [_text(px(x), bottom + 18, number(x), "mid") for x in x_ticks if x0 <= x <= x1]
    shares = iter(turns([(values, heights) for css, values, heights in series if not css.endswith("raw")]))
    for css, values, heights in series:
        turn, count = (0, 1) if css.endswith("raw") else next(shares)
        for piece in _pieces(values, heights):
            drawn.append([(px(x), py(y)) for x, y in piece])
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn[-1])
            parts.append(f'<polyline class="curve {css}"{_dashes(turn, count)} points="{points}"/>')
            if len(piece) == 1:  # a line of one point shows nothing
                (x, y), r = drawn[-1][0], 3 + 9 * (count - 1 - turn) / max(count, 3)  # the later within the earlier
                parts.append(f'<circle class="dot {css}" cx="{x:.1f}" cy="{y:.1f}" r="{r:.3g}"/>')
    for css, x, y, text in dots:
        parts.append(f'<circle class="dot {css}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="{4.5 if text else 3}"/>')
        if text:
            parts.append(_text(*_beside(px(x), py(y), text, px(x) > (left + right) / 2, drawn)))
    parts += _upright(marks, px, (left, right), (top, bottom))
    parts += [_text(right, height - 4, x_label, "end"), _text(2, 12, y_label)]
    return _svg(parts, width, height, label)


def _dashes(turn: int, count: int) -> str:
    """Its own part of the way for each of ``count`` curves that lie on one another."""
    if count == 1:
        return ""
    return f' stroke-dasharray="{DASH} {DASH * (count - 1)}" stroke-dashoffset="{-DASH * turn}"'


def turns(curves: Sequence[tuple[Sequence[float], Sequence[float]]]) -> list[tuple[int, int]]:
    """Of each curve (xs, ys): which turn it takes among those that hide one another, and how many these are."""
    kept = [[(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)] for xs, ys in curves]
    heights = [y for points in kept for _, y in points]
    near = HIDDEN * (max(heights) - min(heights)) if heights else 0.0
    group = list(range(len(kept)))
    for later, before in itertools.combinations(reversed(group), 2):
        if group[later] != group[before] and _hide(kept[before], kept[later], near):
            group = [group[before] if one == group[later] else one for one in group]
    return [(group[:place].count(one), group.count(one)) for place, one in enumerate(group)]


def _hide(one: Sequence[tuple[float, float]], two: Sequence[tuple[float, float]], near: float) -> bool:
    """Do two curves lie on one another along half of the shorter one, or two lone points?"""
    short, long = sorted((one, two), key=len)
    if not short or (len(short) == 1) != (len(long) == 1):
        return False
    if long != sorted(long, key=lambda point: point[0]):  # it runs back: no height belongs to an x
        return one == two
    xs, ys = zip(*long, strict=True)
    met = sum(xs[0] <= x <= xs[-1] and abs(_height(xs, ys, x) - y) <= near + 1e-12 * abs(y) for x, y in short)
    return 2 * met >= len(short)


def _height(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """A curve's height at x, between its points on a straight line."""
    place = bisect.bisect_left(xs, x)
    if xs[place] == x:
        return ys[place]
    share = (x - xs[place - 1]) / (xs[place] - xs[place - 1])
    return ys[place - 1] + share * (ys[place] - ys[place - 1])


def _beside(
    x: float, y: float, text: str, late: bool, curves: Sequence[Sequence[tuple[float, float]]]
) -> tuple[float, float, str, str]:
    """The place of a word above or below a dot, whichever fewer curves cross."""
    x0 = x - 8 - 7.4 * len(text) if late else x + 8

    def crossed(down: float) -> int:
        box = (x0, x0 + 7.4 * len(text), y + down - 11, y + down + 3)
        return sum(_meets(box, *ends) for curve in curves for ends in zip(curve, curve[1:], strict=False))

    return x + (-8 if late else 8), y + min((-9, 20), key=crossed), text, "strong " + "end" * late


def _meets(box: Sequence[float], one: tuple[float, float], two: tuple[float, float]) -> bool:
    """Does a straight line between two points run through left, right, top, bottom?"""
    (xa, ya), (xb, yb) = sorted((one, two))
    x0, x1 = max(xa, box[0]), min(xb, box[1])
    if x0 > x1:
        return False
    heights = [ya, yb] if xa == xb else [ya + (yb - ya) * (x - xa) / (xb - xa) for x in (x0, x1)]
    return max(heights) >= box[2] and min(heights) <= box[3]


def _heights(low: float, high: float) -> list[float]:
    """Ticks; where all values are alike, that one in the middle."""
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return ticks(low, high)
    apart = 10.0 ** math.floor(math.log10(abs(high))) / 10 if high else 1.0
    return [high - apart, high, high + apart]


def _pieces(xs: Sequence[float], ys: Sequence[float]) -> list[list[tuple[float, float]]]:
    """The points between gaps."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(xs, ys, strict=True):
        if math.isfinite(y):
            pieces[-1].append((x, y))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _upright(
    marks: Sequence[tuple[float, str]], px: Callable[[float], float], across: tuple[float, float], down: Sequence[float]
) -> list[str]:
    """Dashed lines; a word that would run into the one before it is left to the tool tip."""
    parts, free = [], -math.inf
    for at, text in sorted(marks):
        x = px(at)
        tip = f"<title>{html.escape(f'{text}, step {number(at)}')}</title>"
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{down[0]}" y2="{down[1]}">{tip}</line>')
        long = 7.4 * len(text)
        start = min(max(x - long / 2, across[0]), across[1] - long)
        if start > free:
            parts.append(_text(start, down[0] - 7, text))
            free = start + long + 6
    return parts


def key(entries: Sequence[tuple[str, str]]) -> str:
    """The legend of curves: (css class, name)."""
    spans = (f'<span class="key {css}"><i></i>{html.escape(name)}</span>' for css, name in entries)
    return f'<p class="legend">{" ".join(spans)}</p>'


def bars(rows: Sequence[tuple[str, str, float, str]], label: str, width: int = WIDE) -> str:
    """Horizontal bars from 0: (name, css class, value, text beside the bar)."""
    most = max((value for _, _, value, _ in rows), default=0.0) or 1.0
    parts, y = [], 4
    for name, css, value, text in rows:
        long = max(value / most * (width - 230), 1)
        parts.append(_text(82, y + 18, name, "end"))
        parts.append(f'<rect class="{css}" x="92" y="{y}" width="{long:.1f}" height="26" rx="3"/>')
        parts.append(_text(100 + long, y + 18, text, "strong"))
        y += 34
    return _svg(parts, width, y, label)


def stacks(rows: Sequence[tuple[str, dict[str, float]]], unit: str, label: str) -> str:
    """Stacked bars over one scale, with a legend; parts keep their order and their colour."""
    most = max((sum(parts.values()) for _, parts in rows), default=0.0) or 1.0
    names = [name for name in rows[0][1] if any(parts.get(name, 0) > most * 1e-3 for _, parts in rows)]
    out, y = [], 4
    for title, parts in rows:
        x = 92.0
        out.append(_text(82, y + 22, title, "end"))
        for i, name in enumerate(names):
            value = parts.get(name, 0.0)
            long = value / most * (WIDE - 180)
            box = f'<rect class="part{i}" x="{x:.1f}" y="{y}" width="{long:.1f}" height="34">'
            out.append(f"{box}<title>{html.escape(f'{name}: {value:.1f} {unit}')}</title></rect>")
            if long > 34:
                out.append(_text(x + long / 2, y + 22, f"{value:.0f}", f"mid inside{i}"))
            x += long
        out.append(_text(x + 8, y + 22, f"{sum(parts.values()):.0f} {unit}", "strong"))
        y += 46
    x, y = 92, y + 8
    for i, name in enumerate(names):
        if x + 26 + 7 * len(name) > WIDE:
            x, y = 92, y + 22
        out.append(f'<rect class="part{i}" x="{x}" y="{y}" width="13" height="13" rx="2"/>')
        out.append(_text(x + 19, y + 11, name))
        x += 40 + int(7.2 * len(name))
    return _svg(out, WIDE, y + 22, label)


def _text(x: float, y: float, text: str, css: str = "") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}">{html.escape(text)}</text>'


def _svg(parts: Sequence[str], width: int, height: int, label: str) -> str:
    css = "wide" if width == WIDE else "half"
    head = f'<svg class="{css}" viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label)}">'
    return head + "".join(parts) + "</svg>"
