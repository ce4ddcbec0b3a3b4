"""A result as a picture: each provider's time as a multiple of the baseline, or the losses of whole runs."""

from __future__ import annotations

import sys
from pathlib import Path

COLORS = {
    "full": "#b8b8b8",
    "stock": "#d1761e",
    "stock bf16": "#eeb777",
    "stock fp16": "#eeb777",
    "addmm": "#9a8fc4",
    "layer by layer": "#3f9c9c",
    "peft_fast": "#1f5fa8",
    "peft_fast bf16": "#7fb0e6",
    "peft_fast fp16": "#7fb0e6",
    "peft_fast torch accumulate": "#9fc7a0",
    "peft_fast torch augmented": "#c4dcb4",
    "peft_fast triton accumulate": "#2f8f5b",
    "peft_fast triton fused": "#63b58a",
    "peft_fast cuda accumulate": "#8a4f9e",
    "peft_fast cuda fused": "#c06fb4",
    "unsloth": "#c9a227",
    "axolotl": "#e0cb7c",
}
OTHERS = "#5c5c5c"
MANY = 12  # rows: more are a line of dots each, bars would take a page a model
FARTHEST = 4.0  # multiples: what is slower is drawn at the edge of a picture of dots


def draw(document: dict, path: Path) -> None:
    """The document as PNG (or whatever the suffix says)."""
    if document["bench"] == "methods":
        methods(document, path)
        return
    (losses if any("runs" in row for row in document["rows"]) else ratios)(document, path)


def methods(document: dict, path: Path) -> None:
    """Accuracy over minutes of training, a dot for each method, as large as its memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for row in document["rows"]:
        x, y = row["train_seconds"] / 60, 100 * row["test"]["accuracy"]
        axes.scatter(x, y, s=row["peak_bytes"] / 2**20, alpha=0.6)
        axes.annotate(row["title"], (x, y), textcoords="offset points", xytext=(6, 6))
    axes.margins(0.15)
    axes.set(xlabel="minutes of training", ylabel="accuracy on the test rows, %", xlim=(0, None))
    axes.set_title("area: peak memory", loc="left", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def losses(document: dict, path: Path) -> None:
    """The training loss of both runs by step, a panel for each row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from . import machine

    rows = document["rows"]
    figure, panels = plt.subplots(1, len(rows), figsize=(5 * len(rows), 3.4), squeeze=False)
    for axes, row in zip(panels[0], rows, strict=True):
        for name, run in row["runs"].items():
            axes.plot(range(1, len(run["losses"]) + 1), run["losses"], color=COLORS[name], label=name)
        axes.set_title(row["title"], fontsize=8)
        axes.set_xlabel("step")
        axes.legend(fontsize=8, frameon=False)
    panels[0][0].set_ylabel("training loss")
    figure.suptitle(machine.line(document["machine"]), fontsize=8)
    _save(figure, path)


def ratios(document: dict, path: Path) -> None:
    """Bars or, of many rows, dots: one group a row of the document."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from . import machine

    rows = [row for row in document["rows"] if "providers" in row]
    known = dict.fromkeys(n for row in rows for n in row["providers"] if n != row["baseline"])
    # the order of the table, what it does not know last
    names = [n for n in COLORS if n in known] + [n for n in known if n not in COLORS]
    dots = len(rows) > MANY
    height = 0.3 if dots else 0.16 * len(names) + 0.15
    figure, axes = plt.subplots(figsize=(9, 1.2 + max(len(rows), 1) * height))
    (_dots if dots else _bars)(axes, rows, names)
    axes.axvline(1.0, color="black", lw=0.8)
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows], fontsize=8)
    axes.set_ylim(-0.6, max(len(rows), 1) - 0.4)
    axes.invert_yaxis()
    axes.set_xlabel("time, multiples of the baseline" + ("" if dots else " (bars: 95 % interval)"))
    axes.set_title(f"{document['bench']}\n{machine.line(document['machine'])}", fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _save(figure, path)


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def _bars(axes, rows: list[dict], names: list[str]) -> None:
    thick = 0.8 / max(len(names), 1)
    for i, name in enumerate(names):
        at = [j for j, row in enumerate(rows) if name in row["providers"]]
        mid, low, high = zip(*(rows[j]["providers"][name]["total"]["ratio"] for j in at), strict=True)
        error = [[abs(m - v) for m, v in zip(mid, end, strict=True)] for end in (low, high)]
        places = [j + (i - (len(names) - 1) / 2) * thick for j in at]
        color = COLORS.get(name, OTHERS)
        axes.barh(places, mid, thick * 0.92, xerr=error, color=color, label=name, error_kw={"lw": 0.8})


def _dots(axes, rows: list[dict], names: list[str]) -> None:
    for i, name in enumerate(names):
        at = [j for j, row in enumerate(rows) if name in row["providers"]]
        mid = [min(rows[j]["providers"][name]["total"]["ratio"][0], FARTHEST) for j in at]
        ours = name.startswith("peft_fast")
        # what dispatch picks on top of its plans
        order = 20 if name == "peft_fast" else 10 + i if ours else i
        shape = {"s": 46 if ours else 26, "marker": "o" if ours else "D", "lw": 0.4, "edgecolors": "white"}
        axes.scatter(mid, at, color=COLORS.get(name, OTHERS), label=name, zorder=order, **shape)
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, 0.95), right)
    axes.grid(axis="y", color="#e4e4e4", lw=0.8)
    axes.set_axisbelow(True)


def main(files: list[str]) -> int:
    """Draws what is in result files, GPU records too: for results of a machine without matplotlib."""
    from . import harness

    for path in map(Path, files):
        document = harness.read(path)
        for run in document.get("runs", [document]):
            draw(run, path.with_name(f"{path.stem}-{run['bench']}.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
