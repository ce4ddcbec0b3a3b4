"""Rows of many shapes as one: the median and the extremes of what a benchmark found on one machine in one dtype."""

from __future__ import annotations

from statistics import median

from . import kinds, machine
from .train_step import VARIANTS

# (benchmark, which of its rows) -> what they are to a reader, in the order of the summary
TITLES = {
    ("lora_linear", ""): "a linear layer",
    ("lora_group", ""): "layers that read one input",
    ("lora_mlp", ""): "an MLP block",
    ("lora_embedding", ""): "an embedding, of stock PEFT's time",
    ("dora_linear", ""): "a layer with DoRA",
    ("dora_linear", "token"): "a layer with DoRA, one token of inference",
    ("dora_linear", "embedding"): "an embedding with DoRA, of stock PEFT's time",
    ("train_step", ""): "training steps with PEFT's other options",
    ("lora_experts", ""): "experts of a mixture",
    ("lora_experts", "token"): "experts, one token of inference",
    ("quantized", ""): "a quantized layer, of its library's time",
    ("quantized", "token"): "a quantized layer, one token of inference",
    ("quantized", "dense"): "four bits made dense, of bitsandbytes' time",
    ("lora_conv", ""): "a convolution of size 1",
    ("lora_mixed", "token"): "16 adapters in a batch, one token each",
    ("lora_mixed", ""): "16 adapters in a batch, 128 tokens each",
    ("lora_mixed", "model"): "16 adapters in a batch, generating",
    ("lora_mixed", "ranks token"): "64 adapters of five ranks in a batch, one token each",
    ("lora_mixed", "ranks"): "64 adapters of five ranks in a batch, 16 tokens each",
    ("generate", ""): "generating, of merged weights' time",
    ("generate", "dora"): "generating with DoRA, of merged weights' time",
    ("generate", "nf4"): "generating over NF4, of merged weights' time",
    ("generate", "merged"): "merged and back, of PEFT's time",
}
HEAD = ["what", "dtype", "dropout", "rows", "stock PEFT", "**peft_fast**", "speed-up over stock", "peak of stock's"]


def sections(runs: list[dict]) -> dict[str, list[list[str]]]:
    """Machine -> a line for each kind of rows, dtype and dropout.

    Of the rows that compare peft_fast with stock PEFT, on a quiet machine with all its cores.
    """
    found: dict[str, dict[tuple, list[dict]]] = {}
    for (bench, kind), title in TITLES.items():
        for run in (r for r in runs if r["bench"] == bench):
            for row in run["rows"]:
                if _compares(bench, row, run["machine"]) and kinds.kind(bench, row["settings"]) == kind:
                    lines = found.setdefault(machine.where(run["machine"]), {})
                    lines.setdefault((title, row["settings"]["dtype"], row["settings"]["p"]), []).append(row)
    return {
        where: [[title, dtype, f"{p:g}", *_figures(rows)] for (title, dtype, p), rows in lines.items()]
        for where, lines in found.items()
    }


def _compares(bench: str, row: dict, where: dict) -> bool:
    if not {"stock", "peft_fast"} <= row.get("providers", {}).keys() or not row["aa"]["ok"]:
        return False
    settings = row["settings"]
    if "gpu" not in where and settings["threads"] != where["cores"]:
        return False
    # the usual training steps have a table of their own
    return bench != "train_step" or settings["model"] in VARIANTS


def _figures(rows: list[dict]) -> list[str]:
    totals = [(row["providers"]["stock"]["total"], row["providers"]["peft_fast"]["total"]) for row in rows]
    stock, ours = (f"{median(pair[i]['ratio'][0] for pair in totals):.2f}" for i in (0, 1))
    speed = sorted(mine["speedup"][0] for _, mine in totals)
    spread = f" ({speed[0]:.2f}–{speed[-1]:.2f})" if len(rows) > 1 else ""
    sizes = [[row["bytes"].get(name, {}).get("peak", 0) for name in ("stock", "peft_fast")] for row in rows]
    peaks = [mine / theirs for theirs, mine in sizes if theirs]
    peak = f"{100 * median(peaks):.0f} %" if peaks else ""
    return [str(len(rows)), stock, f"**{ours}**", f"**{median(speed):.2f}×**{spread}", peak]
