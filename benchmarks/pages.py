"""The first command of each task's page, run as it stands there: what it learns, in what time and memory.

Each is a process of its own. A result that is there keeps the rows of the pages that are not run again.
"""

from __future__ import annotations

import math
import re
import shlex
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from peft_fast.errors import DataError, SettingsError, fail
from peft_fast.pages import words
from peft_fast.recipes import config, examples

from . import harness, machine, whole
from .harness import Options

DOCS = Path(config.__file__).parent / "docs"
# what --quick and --tiny do less of
LESS = {"full": (), "quick": ("--steps", "20"), "tiny": ("--steps", "2")}
NONE = "_Nothing measured with this command yet: `python -m peft_fast bench pages --model {task} --json {file}`._"
FILE = "benchmarks/results/pages.json"
PERCENT = ("bleu", "chrf", "rouge1", "rouge2", "rougeL", "rougeLsum")
CORRELATIONS = ("mcc", "pearson", "spearman")


def names(device: str) -> tuple[str, ...]:
    """What --model takes on this device: tasks, which their pages are called after."""
    return config.TASKS


def command(task: str) -> str:
    """The first `peft-fast train` of a task's page."""
    page = DOCS / f"{task}.md"
    found = re.search(r"^```sh\n(peft-fast train .*?)$", page.read_text(encoding="utf-8"), re.M)
    if not found:
        fail(DataError, f"{page.name} without a command", "a block of sh that begins with `peft-fast train`", "add it")
    return found[1]


def run(options: Options, show, save: Path | None = None) -> dict:
    """One row for each page; the document is also written to `save` after each, beside the rows it had."""
    whole.only(options, "the pages' commands as they are")
    document = {
        "schema": harness.SCHEMA,
        "bench": "pages",
        "scale": options.scale,
        "machine": machine.header(torch.device(options.device)),
        "rows": _kept(save, options),
        "refused": [],  # {"title", "reason"}: it did not learn
        "skipped": [],
    }
    show.header(document)
    chosen = options.models or config.TASKS
    with tempfile.TemporaryDirectory(prefix="peft_fast-") as folder, show.progress(len(chosen)) as progress:
        for task in chosen:
            if time.monotonic() > options.deadline:
                document["skipped"].append(task)
                continue
            progress.case(task)
            said = command(task)
            found = _trained(said, options, Path(folder) / task)
            row = _row(task, said, found) | {"machine": document["machine"]}
            others = [one for one in document["rows"] if one["title"] != task]
            document["rows"] = sorted([*others, row], key=lambda one: config.TASKS.index(one["title"]))
            print(_line(row), flush=True)
            if options.scale == "full" and (reason := unlearnt(found)):
                document["refused"].append({"title": task, "reason": reason})
                show.refused(task, reason)
            if save:
                harness.write(save, document)
    return document


def _kept(save: Path | None, options: Options) -> list[dict]:
    """The rows of an earlier result in the same file."""
    if save is None or not save.exists():
        return []
    before = harness.read(save)
    if (before["bench"], before["scale"]) != ("pages", options.scale):
        given = f"{save.name} with {before['bench']}, {before['scale']}"
        fail(SettingsError, given, f"a result of pages, {options.scale}, or no file", "pass another --json")
    return [row for row in before["rows"] if row["title"] in config.TASKS]


def _row(task: str, said: str, found: dict) -> dict:
    memory, flow, fast = found["memory"], found["throughput"], found["fast"]
    first = next(iter(found["evaluations"]), {})
    return {
        "title": task,
        "command": said,
        "metric": found["metric"],
        "higher": found["higher"],
        "before": _metrics(first) if first.get("step") == 0 else {},
        "best_step": found["best"]["step"],
        **{split: _metrics(found["final"].get(split, {})) for split in ("validation", "test")},
        "rows": found["rows"],
        "sources": found["sources"],
        "model": found["model"],
        "method": found["method"],
        "steps": flow["steps"],
        "train_seconds": flow["train_seconds"],
        "seconds": found["seconds"],
        "unit": flow["unit"],
        "per_second": flow["per_second"],
        "peak_bytes": memory["peak_bytes"] - memory["before_bytes"],
        "fast": {
            "layers": len(fast.get("fast", ())),
            "adapted": len(fast.get("fast", ())) + len(fast.get("slow", ())),
            "blocks": fast.get("blocks", 0),
        },
    }


def _metrics(found: dict) -> dict:
    return {name: value for name, value in found.items() if name not in ("step", "epoch")}


def _trained(said: str, options: Options, out: Path) -> dict:
    """metrics.json of a page's command, into another folder."""
    given = shlex.split(said)[2:]
    for option in ("--model", "--data"):  # fetched before anything is timed
        if examples.named(source := given[given.index(option) + 1]):
            examples.path(source, say=print)
    return whole.trained([*given, "--out", str(out), "--device", options.device, *LESS[options.scale]], out)


def unlearnt(found: dict) -> str:
    """Why a run's metrics.json does not show that it learnt; empty where it does."""
    name, first = found["metric"], next(iter(found["evaluations"]), {})
    before = first.get(name) if first.get("step") == 0 else None
    after = (found["final"].get("validation") or {}).get(name)
    if before is None or after is None:
        return f"no {name} of the validation rows {'before' if before is None else 'after'} training"
    if not found["best"]["step"]:
        return "no evaluation was better than the one before training"
    if name == "perplexity":  # it is e to the mean over the tokens: the mean is what chance moves
        name, before, after = "loss", math.log(before), math.log(after)
    better, chance = after - before if found["higher"] else before - after, margin(name, before, after, found["rows"])
    if better > chance:
        return ""
    was, now = words.metric(name, before), words.metric(name, after)
    text = f"{name} of the validation rows is {now}, and was {was} before training"
    if better <= 0:
        return text
    rows = found["rows"]["validation"]
    return f"{text}: chance alone may make {words.metric(name, chance)} of {rows:,} rows"


def margin(name: str, before: float, after: float, rows: dict) -> float:
    """Two standard errors of the difference of two values, each of validation rows of its own.

    Before and after are of the same rows, which makes the true error smaller.
    """
    most = max(scatter(name, before), scatter(name, after))  # of two values of few rows one may look certain by luck
    return 2 * math.sqrt(2 / rows["validation"]) * most


def scatter(name: str, value: float) -> float:
    """How far one row lies from a metric's mean over rows, as a standard deviation; rather too high than too low."""
    if name in PERCENT:
        return 100 * scatter("share", value / 100)
    if name == "r2":  # the large-sample error of a squared correlation
        return 2 * math.sqrt(max(value, 0.0)) * abs(1 - value)
    if name in CORRELATIONS:
        return 1 - value**2
    if words.share_of_one(name) and 0 <= value <= 1:  # no values within 0 and 1 scatter more than right and wrong
        return math.sqrt(value * (1 - value))
    return abs(value)  # losses and errors: about as far as their mean


def _line(row: dict) -> str:
    name = row["metric"]
    shown = " → ".join(words.metric(name, row[when].get(name)) for when in ("before", "validation", "test"))
    return f"{row['title']:<24} {name} {shown}, {words.seconds(row['train_seconds'])}, {words.size(row['peak_bytes'])}"


# ---- the pages


def sections() -> dict[Path, dict]:
    """Page -> what stands between its marks, as table.render() takes it."""
    return {DOCS / f"{task}.md": {"page": partial(section, task)} for task in config.TASKS}


def section(task: str, runs: list[dict]) -> str:
    """Rows: a metric. Figures: before and after; below them time, memory and machine. Nothing of another command."""
    rows = [row for run in runs if run["bench"] == "pages" for row in run["rows"]]
    row = next((row for row in rows if row["title"] == task and row["command"] == command(task)), None)
    if row is None:
        return NONE.format(task=task, file=FILE)
    heads = {"before": "before training", "validation": "after", "test": "test rows"}
    shown = [when for when in heads if row[when]]
    every = dict.fromkeys([row["metric"], *(name for when in shown for name in row[when])])
    lines = [["", *(heads[when] for when in shown)], ["---"] * (len(shown) + 1)]
    for name in every:
        lines.append([f"`{name}`", *(words.metric(name, row[when].get(name)) for when in shown)])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{table}\n\n<sub>{'. '.join([*_facts(row), machine.line(row['machine'])])}.</sub>"


def _facts(row: dict) -> list[str]:
    model, fast = row["model"], row["fast"]
    counts = [f"{row['rows'][split]:,} {split}" for split in ("train", "validation", "test") if split in row["rows"]]
    judged = "Before and after are of the validation rows" if row["before"] else "After is of the validation rows"
    share = f"{words.share(row)} of the weights train"
    layers = f"{fast['layers']} of {fast['adapted']} adapted layers fast, {fast['blocks']} MLP blocks as one"
    took = (
        f"{row['steps']:,} steps in {words.seconds(row['train_seconds'])} of training, "
        f"{words.rate(row['per_second'])} {row['unit']}/s, {words.size(row['peak_bytes'])} of memory at the peak "
        f"({words.whose(row['machine'])}) beyond what was held before the model was there"
    )
    return [
        f"{judged}, with the weights of step {row['best_step']:,}",
        f"Rows: {', '.join(counts)} of {row['sources'].get('train', 'its data')}",
        f"{model['class']}, method {row['method']}, {model['dtype']}: {share}" + f"; {layers}" * bool(fast["adapted"]),
        took,
    ]
