"""Rows of many shapes as one: the median and the extremes of what a benchmark found on one machine in one dtype."""

from __future__ import annotations

from functools import partial
from statistics import median

from . import machine
from .train_step import VARIANTS

# benchmark -> what it is to a reader, in the order of the summary
TITLES = {
    "lora_linear": "a linear layer",
    "lora_group": "layers that read one input",
    "lora_mlp": "an MLP block",
    "lora_embedding": "an embedding",
    "dora_linear": "a layer with DoRA",
    "train_step": "training steps with PEFT's other options",
    "lora_experts": "experts of a mixture",
    "quantized": "a layer over a quantized base",
    "lora_conv": "a convolution of size 1",
    "lora_mixed": "16 adapters in a batch, inference",
    "generate": "generation, multiples of merged weights",
}
HEAD = ["what", "dtype", "dropout", "rows", "stock PEFT", "**peft_fast**", "speed-up over stock", "peak of stock's"]


def sections(runs: list[dict]) -> dict[str, list[list[str]]]:
    """Machine -> a line for each benchmark, dtype and dropout, of the rows that compare peft_fast with stock PEFT."""
    found: dict[str, dict[tuple, list[dict]]] = {}
    for bench in TITLES:
        for run in (r for r in runs if r["bench"] == bench):
            for row in filter(partial(_compares, bench), run["rows"]):
                kinds = found.setdefault(machine.where(run["machine"]), {})
                kinds.setdefault((bench, row["settings"]["dtype"], row["settings"]["p"]), []).append(row)
    return {
        where: [[TITLES[bench], dtype, f"{p:g}", *_figures(rows)] for (bench, dtype, p), rows in kinds.items()]
        for where, kinds in found.items()
    }


def _compares(bench: str, row: dict) -> bool:
    # the usual training steps have a table of their own
    usual = bench == "train_step" and row["settings"]["model"] not in VARIANTS
    return not usual and {"stock", "peft_fast"} <= row.get("providers", {}).keys()


def _figures(rows: list[dict]) -> list[str]:
    totals = [(row["providers"]["stock"]["total"], row["providers"]["peft_fast"]["total"]) for row in rows]
    stock, ours = (f"{median(pair[i]['ratio'][0] for pair in totals):.2f}" for i in (0, 1))
    speed = sorted(mine["speedup"][0] for _, mine in totals)
    spread = f" ({speed[0]:.2f}–{speed[-1]:.2f})" if len(rows) > 1 else ""
    sizes = [[row["bytes"].get(name, {}).get("peak", 0) for name in ("stock", "peft_fast")] for row in rows]
    peaks = [mine / theirs for theirs, mine in sizes if theirs]
    peak = f"{100 * median(peaks):.0f} %" if peaks else ""
    return [str(len(rows)), stock, f"**{ours}**", f"**{median(speed):.2f}×**{spread}", peak]
