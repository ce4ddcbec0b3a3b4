"""Of which kind a row is: one benchmark's rows may answer several questions, which share no table and no median."""

from __future__ import annotations

# benchmark -> heading of a table of its own -> the kinds in it; other kinds are in the benchmark's first table
APART = {
    "dora_linear": {
        "One token of inference, multiples of the frozen layer (*cached*: inside PEFT's `DoraCaching`)": ("token",),
        "An embedding with DoRA, multiples of stock PEFT": ("embedding",),
    },
    "lora_mixed": {
        "64 adapters of five ranks and rows without one, multiples of the frozen layer": ("ranks", "ranks token"),
    },
    "generate": {
        "Generation with DoRA, multiples of merged weights (*cached*: inside PEFT's `DoraCaching`)": ("dora",),
        "Generation over bitsandbytes' NF4, multiples of weights merged by PEFT, which rounds them anew": ("nf4",),
        "`peft_fast.merged(model)`, in and out, multiples of PEFT's merge_adapter and unmerge_adapter": ("merged",),
    },
    "quantized": {
        "One token of inference, multiples of the library's layer without an adapter": ("token",),
        "Four bits made dense, multiples of bitsandbytes' dequantize_4bit": ("dense",),
    },
}


def kind(bench: str, settings: dict) -> str:
    """Empty for what most rows of the benchmark are."""
    model = settings["model"]
    if bench == "lora_experts":
        return "token" if settings["M"] == 1 else ""
    if bench == "lora_mixed":
        if model == "generate":
            return "model"
        token = settings.get("M") == settings.get("rows", settings.get("adapters", 0))
        return " ".join(["ranks"] * model.endswith("-ranks") + ["token"] * token)
    ends = {
        "dora_linear": ("token", "embedding"),
        "generate": ("merged", "dora", "nf4"),
        "quantized": ("token", "dense"),
    }
    return next((end for end in ends.get(bench, ()) if model.endswith(end)), "")


def heading(bench: str, settings: dict) -> str:
    """Of the table of its own that such a row is in; empty for the benchmark's first table."""
    if bench not in APART:
        return ""
    own = kind(bench, settings)
    return next((head for head, kinds in APART[bench].items() if own in kinds), "")
