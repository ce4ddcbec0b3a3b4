"""A result as a picture: every provider's time as a multiple of the frozen baseline, with its interval."""

from __future__ import annotations

from pathlib import Path

COLORS = {
    "full": "#b8b8b8",
    "stock": "#d1761e",
    "stock bf16": "#eeb777",
    "addmm": "#9a8fc4",
    "peft_fast": "#1f5fa8",
    "peft_fast bf16": "#7fb0e6",
}


def ratios(document: dict, path: Path) -> None:
    """One group of bars per row of the document, written as PNG (or whatever the suffix says)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from . import machine

    rows = [row for row in document["rows"] if "providers" in row]
    names = [n for n in COLORS if any(n in row["providers"] for row in rows)]
    thick = 0.8 / max(len(names), 1)
    figure, axes = plt.subplots(figsize=(9, 1.2 + max(len(rows), 1) * (0.16 * len(names) + 0.15)))
    for i, name in enumerate(names):
        at = [j for j, row in enumerate(rows) if name in row["providers"]]
        mid, low, high = zip(*(rows[j]["providers"][name]["total"]["ratio"] for j in at), strict=True)
        error = [[abs(m - v) for m, v in zip(mid, end, strict=True)] for end in (low, high)]
        places = [j + (i - (len(names) - 1) / 2) * thick for j in at]
        axes.barh(places, mid, thick * 0.92, xerr=error, color=COLORS[name], label=name, error_kw={"lw": 0.8})
    axes.axvline(1.0, color="black", lw=0.8)
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time, multiples of the frozen baseline (bars: 95 % interval)")
    axes.set_title(f"{document['bench']}\n{machine.line(document['machine'])}", fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
