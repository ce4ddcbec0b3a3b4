"""Head, adapters, gradual unfreezing and full fine-tuning of one model on the same rows: accuracy, minutes, memory.

All have the same rows, seed, epochs, batches and schedule, and three learning rates each: the one that is best on the
validation rows is what the test rows judge.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import torch

from peft_fast.errors import SettingsError, fail
from peft_fast.recipes import examples

from . import harness, machine, whole
from .harness import Options

NAME = "minilm"
DATA = "example:movie-reviews"
# what is compared: title -> options of a run
METHODS = {
    "head": {"method": "head"},
    "lora": {"method": "lora"},
    "dora": {"method": "dora"},
    "gradual": {"method": "gradual", "unfreeze_every": 0.5, "unfreeze_layers": 2},
    "full": {"method": "full"},
}
# learning rates that each is tried with: the fewer weights train, the higher
RATES = {
    "head": (2e-2, 8e-2, 3e-1),
    "lora": (1e-3, 2e-3, 4e-3),
    "dora": (1e-3, 2e-3, 4e-3),
    "gradual": (2e-4, 4e-4, 8e-4),
    "full": (1e-4, 2e-4, 4e-4),
}
# of every run; those that --tiny and --quick have less of
SAME = {"batch_size": 32, "epochs": 2.0, "train_rows": 1600, "validation_rows": 300, "seed": 0}
LESS = {
    "full": {},
    "quick": {"train_rows": 320, "validation_rows": 100, "test_rows": 200, "epochs": 1.0},
    "tiny": {"train_rows": 32, "validation_rows": 16, "test_rows": 16, "batch_size": 8, "epochs": 1.0},
}
FEWER_RATES = {"quick": slice(1, 2), "tiny": slice(1, 2)}
MODELS = {"full": "example:minilm", "quick": "example:minilm", "tiny": "example:tiny-bert"}


def names(device: str) -> tuple[str, ...]:
    """What --model takes on this device: methods."""
    return tuple(METHODS)


def run(options: Options, show, save: Path | None = None) -> dict:
    """One row for each method; the document is also written to `save` after each."""
    whole.only(options, "whole runs of one recipe", "dtypes", "threads")
    if len(options.dtypes) > 1:
        fail(SettingsError, f"--dtype {','.join(options.dtypes)}", "one dtype for all runs", "run it once for each")
    document = {
        "schema": harness.SCHEMA,
        "bench": "methods",
        "scale": options.scale,
        "machine": machine.header(torch.device(options.device)),
        "rows": [],
        "refused": [],  # {"title", "reason"}: it did not learn
        "skipped": [],
    }
    show.header(document)
    chosen = options.models or tuple(METHODS)
    for source in (MODELS[options.scale], DATA):  # fetched before anything is timed
        examples.path(source, say=print)
    with tempfile.TemporaryDirectory(prefix="peft_fast-") as folder, show.progress(len(chosen)) as progress:
        for title in chosen:
            if time.monotonic() > options.deadline:
                document["skipped"].append(title)
                continue
            progress.case(title)
            row = _best(title, options, Path(folder) / title)
            document["rows"].append(row)
            print(_line(row), flush=True)
            if options.scale == "full" and row["test"]["accuracy"] <= row["chance"]:
                reason = "no better than the most frequent answer"
                document["refused"].append({"title": title, "reason": reason})
                show.refused(title, reason)
            if save:
                harness.write(save, document)
    return document


def _best(title: str, options: Options, out: Path) -> dict:
    """The row of the learning rate that is best on the validation rows, with what the others reached there."""
    rates = RATES[title][FEWER_RATES.get(options.scale, slice(None))]
    rows = [_row(title, rate, options, out.with_name(f"{out.name}-{rate:g}")) for rate in rates]
    tried = [{"learning_rate": row["settings"]["learning_rate"], **row["validation"]} for row in rows]
    best = max(rows, key=lambda row: (row["validation"]["accuracy"], -row["validation"]["loss"]))
    return best | {"tried": tried}


def _row(title: str, rate: float, options: Options, out: Path) -> dict:
    recipe = {"learning_rate": rate} | SAME | LESS[options.scale] | METHODS[title] | {"device": options.device}
    recipe |= {"threads": options.threads[0] if options.threads else machine.cores()}
    if options.dtypes:
        recipe["dtype"] = options.dtypes[0]
    recipe |= {"model": MODELS[options.scale], "data": DATA}
    found = _trained(recipe | {"out": str(out)})
    memory, forecast = found["memory"], found["forecast"]["memory"]
    confusion = next(part["counts"] for part in found["shown"] if part["kind"] == "confusion")
    return {
        "title": title,
        "settings": recipe,
        "model": found["model"],
        "rows": found["rows"],
        "validation": {key: found["final"]["validation"][key] for key in ("accuracy", "loss")},
        "test": {key: found["final"]["test"][key] for key in ("accuracy", "loss")},
        "chance": max(map(sum, confusion)) / sum(map(sum, confusion)),
        "evaluations": [{key: e[key] for key in ("step", "accuracy")} for e in found["evaluations"]],
        "train_seconds": found["throughput"]["train_seconds"],
        "seconds": found["seconds"],
        "per_second": found["throughput"]["per_second"],
        "peak_bytes": memory["peak_bytes"] - memory["before_bytes"],
        "forecast_bytes": forecast["total"],
        "result_bytes": _size(out / ("adapter" if (out / "adapter").is_dir() else "model")),
    }


def _trained(recipe: dict) -> dict:
    """metrics.json of a run in a process of its own."""
    out = Path(recipe["out"])
    config = out.with_suffix(".yaml")
    config.write_text(json.dumps({"task": "sequence-classification", **recipe}))  # JSON is YAML
    return whole.trained([str(config)], out)


def _size(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _line(row: dict) -> str:
    return (
        f"{row['title']:<18} learning rate {row['settings']['learning_rate']:g}, "
        f"accuracy {100 * row['test']['accuracy']:.1f} %, {row['train_seconds'] / 60:.1f} min, "
        f"{row['peak_bytes'] / 2**20:,.0f} MiB (forecast {row['forecast_bytes'] / 2**20:,.0f})"
    )
