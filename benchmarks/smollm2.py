"""A real fine-tuning of SmolLM2-135M by stock PEFT and by peft_fast: perplexity, tokens a second, memory.

Each in a process of its own, so that peak memory is its own, in turns of a few steps, so that both meet the same
machine; one seed, the same batches. What is held out is judged before and after.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from peft_fast import settings
from peft_fast.demo import data
from peft_fast.demo.compare import compare
from peft_fast.demo.finetune import FAST, STOCK, Recipe
from peft_fast.recipes import fetch
from peft_fast.recipes.examples.generation import unpack

from . import harness, machine, whole
from .harness import Options

NAME = "smollm2-135m"
APART = 0.005  # of the perplexity after the last step: what two runs of one recipe may differ by
BATCH, LENGTH = 4, 128
# steps, steps in a turn, held-out sentences (about 25 tokens each)
SCALES = {"full": (40, 4, 400), "quick": (8, 2, 40), "tiny": (2, 1, 40)}
# of one run, what a row keeps
KEPT = (
    "seconds", "tokens_per_second", "phases", "losses", "turn_seconds", "resident_before_bytes", "peak_resident_bytes",
    "step_bytes", "saved_bytes", "fast_calls",
)  # fmt: skip


def names(device: str) -> tuple[str, ...]:
    """What --model takes on this device."""
    return (NAME,)


def run(options: Options, show, save: Path | None = None) -> dict:
    """One row for each dropout and dtype; the document is also written to `save` after each."""
    need = "whole runs by stock PEFT and by peft_fast"
    whole.only(options, need, "dropouts", "repeats", "dtypes", "threads")
    document = {
        "schema": harness.SCHEMA,
        "bench": "smollm2",
        "scale": options.scale,
        "machine": machine.header(torch.device(options.device)),
        "rows": [],
        "refused": [],  # {"title", "reason"}: it did not learn what stock PEFT learned
        "skipped": [],
    }
    show.header(document)
    dropouts = options.dropouts or ((0.0, 0.05) if options.scale == "full" else (0.05,))
    recipes = [(dtype, p) for dtype in options.dtypes or ("bf16",) for p in dropouts]
    with tempfile.TemporaryDirectory(prefix="peft_fast-") as folder, show.progress(len(recipes)) as progress:
        texts = prepared(Path(folder), SCALES[options.scale][2])
        for dtype, p in recipes:
            title = f"{NAME} {BATCH}×{LENGTH} tokens r=16 {dtype} p={p:g}"
            if time.monotonic() > options.deadline:
                document["skipped"].append(title)
                continue
            progress.case(title)
            row = _row(title, _recipe(folder, dtype, p, options), texts, options, progress)
            document["rows"].append(row)
            if why := row["apart"]:
                document["refused"].append({"title": title, "reason": why})
            show.runs(row)
            if save:
                harness.write(save, document)
    return document


def prepared(folder: Path, n_test: int) -> data.Task:
    """Puts the model into `folder`, as plain bfloat16 weights; the sentences to train on and to hold out."""
    cache = settings.get().cache_dir
    texts = data.movie_texts(fetch.ensure(fetch.MOVIES, cache, say=print) / "movie-reviews.tsv", n_test)
    unpack(fetch.ensure(fetch.SMOLLM2, cache, say=print), next(iter(fetch.SMOLLM2.files)), folder)
    return texts


def _recipe(folder: str, dtype: str, p: float, options: Options) -> Recipe:
    threads = options.threads[0] if options.threads else machine.cores()
    return Recipe(
        folder,
        dtype=dtype,
        dropout=p,
        max_steps=options.repeats or SCALES[options.scale][0],
        batch=BATCH,
        max_length=LENGTH,
        device=options.device,
        threads=threads,
        network=False,
    )


def _row(title: str, recipe: Recipe, texts: data.Task, options: Options, progress) -> dict:
    logs = settings.get().cache_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    found = compare(recipe, texts, logs, _watch(progress), SCALES[options.scale][1], profile=False)
    runs = {name: _figures(found["runs"][name]) for name in (STOCK, FAST)}
    ratio = runs[FAST]["perplexity"][1] / runs[STOCK]["perplexity"][1]
    return {
        "title": title,
        "settings": {
            "model": NAME,
            "dtype": recipe.dtype,
            "p": recipe.dropout,
            "r": recipe.r,
            "alpha": recipe.alpha,
            "lr": recipe.lr,
            "steps": found["steps"],
            "batch": recipe.batch,
            "length": recipe.max_length,
            "threads": found["model"]["threads"],
            "data": found["data"],
        },  # fmt: skip
        "model": found["model"],
        "runs": runs,
        "perplexity_ratio": round(ratio, 5),
        "speedup": [round(v, 4) for v in found["ratio_by_turns"]],
        "apart": _apart(ratio, found["same_batches"], runs[FAST]["fast_calls"], options.scale),
    }


def _figures(run: dict) -> dict:
    """Of one run: what is kept of its figures, perplexity before and after, LoRA layers that were fast."""
    losses = run["loss_before"], run["loss"]
    fast, slow = len(run.get("fast", ())), len(run.get("slow", ()))
    return {
        **{name: run[name] for name in KEPT},
        "perplexity": [round(math.exp(loss), 4) for loss in losses],
        "layers": {"fast": fast, "of": fast + slow, "groups": run.get("groups", 0), "blocks": run.get("blocks", 0)},
    }


def _apart(ratio: float, same_batches: bool, fast_calls: int, scale: str) -> str:
    """Why the two runs may not be compared; empty when they may. Few steps say nothing about perplexity."""
    if not same_batches:
        return "the two runs did not see the same batches"
    if not fast_calls:
        return "peft_fast ran none of the layers"
    if scale == "full" and abs(ratio - 1) > APART:
        return f"perplexity is {100 * (ratio - 1):+.2f} % from stock PEFT's after the last step"
    return ""


def _watch(progress) -> Callable[[str, dict], None]:
    """Steps of both runs as rounds of one bar."""
    done = {"steps": 0, "of": 1}

    def watch(event: str, facts: dict) -> None:
        if event == "ready":
            done["of"] = 2 * facts["steps"]
        elif event == "turn":
            done["steps"] += len(facts["losses"])
            progress.round(done["steps"], done["of"])

    return watch
