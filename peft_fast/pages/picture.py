"""demo.png: the whole result in one picture, 1600 pixels wide, on a background of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_fast.pages import digest

STOCK, FAST, INK, SOFT, LINE = "#d1761e", "#1f5fa8", "#1c2330", "#5b6472", "#dfe4ea"
PHASE_COLOURS = dict(zip(digest.PHASES, ("#2c6fbb", "#7a8798", "#c2a83e", "#b8457b"), strict=True))


def draw(result: dict[str, Any], path: Path) -> None:
    """Loss curves on the left, speed and memory on the right, the step's phases below them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style = {
        "font.size": 12,
        "text.color": INK,
        "axes.labelcolor": SOFT,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "axes.edgecolor": LINE,
    }
    with plt.rc_context(style):
        figure = plt.figure(figsize=(16, 8.2), dpi=100, facecolor="white")
        grid = figure.add_gridspec(
            3,
            2,
            left=0.05,
            right=0.975,
            top=0.8,
            bottom=0.085,
            width_ratios=(1.02, 1),
            hspace=0.75,
            wspace=0.2,
            height_ratios=(1, 1, 1.05),
        )
        figure.text(
            0.028,
            0.945,
            f"The same LoRA fine-tuning, {digest.speedup(result)}",
            fontsize=25,
            weight="bold",
            va="center",
        )
        figure.text(
            0.028,
            0.884,
            f"{digest.what(result)}\n{digest.where(result)} · above: median over turns, below: whole runs",
            fontsize=12.5,
            color=SOFT,
            va="center",
            linespacing=1.5,
        )
        _losses(figure.add_subplot(grid[:, 0]), result)
        runs = [result["runs"][name] for name in digest.NAMES]
        speeds = [run["tokens_per_second"] for run in runs]
        _bars(figure.add_subplot(grid[0, 1]), "tokens per second", speeds, [f"{v:,.0f}" for v in speeds])
        sizes = [run["saved_bytes"] / 2**20 for run in runs]
        _bars(
            figure.add_subplot(grid[1, 1]),
            "activations kept for backward",
            sizes,
            [f"{v:,.0f} MiB" for v in sizes],
        )
        _phases(figure.add_subplot(grid[2, 1]), result)
        figure.savefig(path, dpi=100)
        plt.close(figure)


def _plain(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _losses(axes: Any, result: dict[str, Any]) -> None:
    for (name, title), colour in zip(digest.NAMES.items(), (STOCK, FAST), strict=True):
        run = result["runs"][name]
        steps = range(1, len(run["losses"]) + 1)
        axes.plot(steps, run["losses"], color=colour, lw=0.8, alpha=0.25)
        accuracy = f"{100 * run['accuracy']:.1f} % accuracy in {run['seconds']:.0f} s"
        axes.plot(steps, digest.smooth(run["losses"]), color=colour, lw=2.6, label=f"{title}: {accuracy}")
    axes.set_title("training loss by step: same seed, same batches", loc="left", fontsize=13.5, color=INK)
    axes.legend(frameon=True, framealpha=0.9, edgecolor="white", fontsize=13.5, loc="upper right")
    axes.set_xlabel("step")
    axes.grid(axis="y", color=LINE, lw=0.8)
    _plain(axes)


def _bars(axes: Any, title: str, values: list[float], labels: list[str]) -> None:
    drawn = axes.barh(list(digest.NAMES.values()), values, color=(STOCK, FAST), height=0.68)
    axes.bar_label(drawn, labels, padding=6, fontsize=13, weight="bold", color=INK)
    axes.set_title(title, loc="left", fontsize=13.5, color=INK)
    axes.set_xlim(0, max(values) * 1.18)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0, labelsize=13, labelcolor=INK)
    _plain(axes)
    axes.spines["bottom"].set_visible(False)


def _phases(axes: Any, result: dict[str, Any]) -> None:
    each = [digest.phases_ms(result, name) for name in digest.NAMES]
    most = max(sum(phases.values()) for phases in each)
    left = [0.0, 0.0]
    for phase, colour in PHASE_COLOURS.items():
        widths = [phases[phase] for phases in each]
        drawn = axes.barh(list(digest.NAMES.values()), widths, left=left, color=colour, height=0.68, label=phase)
        texts = [f"{v:.0f}" if v > most / 20 else "" for v in widths]
        axes.bar_label(drawn, texts, label_type="center", color="white", fontsize=12)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, total in enumerate(left):
        axes.text(total + most * 0.012, row, f"{total:.0f} ms", va="center", fontsize=13, weight="bold")
    axes.set_title("milliseconds a step", loc="left", fontsize=13.5, color=INK)
    axes.set_xlim(0, most * 1.18)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0, labelsize=13, labelcolor=INK)
    axes.legend(frameon=False, ncols=4, loc="upper left", bbox_to_anchor=(-0.01, -0.02), fontsize=12)
    _plain(axes)
    axes.spines["bottom"].set_visible(False)
