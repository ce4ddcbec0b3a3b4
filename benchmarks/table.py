"""The tables of the READMEs, generated from the committed results, so that no figure in them was typed by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from peft_fast.errors import DataError, fail

from . import harness, kinds, machine, peers, summary
from .train_step import VARIANTS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MEASURED = Path(__file__).resolve().parent / "README.md"
WHICH = ROOT / "peft_fast" / "recipes" / "docs" / "which-method.md"
RESULTS = Path(__file__).resolve().parent / "results"
TITLES = {
    "full": "full fine-tuning",
    "stock": "stock PEFT",
    "stock bf16": "stock, bf16 adapters",
    "addmm": "plain addmm Function",
    "layer by layer": "peft_fast layer by layer",
    "peft_fast": "**peft_fast**",
    "peft_fast bf16": "**peft_fast**, bf16 adapters",
}
NONE = "_Nothing measured yet: `python -m peft_fast bench {bench} --json benchmarks/results/{bench}.json`._"
PLANS = {
    f"peft_fast {backend} {plan}": f"{backend}, {plan}"
    for backend in ("torch", "triton", "cuda")
    for plan in ("accumulate", "augmented", "fused")
} | {f"peft_fast {backend}": backend for backend in ("torch", "triton")}
# of records of a GPU: README has no such columns
ALL = {
    **dict(list(TITLES.items())[:3]),
    "stock fp16": "stock, fp16 adapters",
    **dict(list(TITLES.items())[3:]),
    "peft_fast fp16": "**peft_fast**, fp16 adapters",
    "stock cached": "stock, cached",
    "peft_fast cached": "**peft_fast**, cached",
    **PLANS,
    **{name: name for name in peers.FUNCTIONS},
}


def documents(folder: Path = RESULTS) -> list[dict]:
    """Every full benchmark document in the folder, those inside GPU records included, by file name."""
    found = []
    for path in sorted(folder.glob("*.json")):
        record = harness.read(path)
        found += record.get("runs", [record])
    return [run for run in found if run["scale"] == "full" and run["rows"]]


def train_step(runs: list[dict], titles: dict[str, str] = TITLES) -> str:
    """Rows: model, dtype, dropout. Figures: multiples of the frozen step, speed-up, saved MiB."""
    return _section("train_step", runs, _train_head, _train_row, titles)


def variants(runs: list[dict], named: bool = True) -> str:
    """train_step's rows of models that are measured by name only, or, not `named`, the others."""
    found = []
    for run in (r for r in runs if r["bench"] == "train_step"):
        rows = [row for row in run["rows"] if (row["settings"]["model"] in VARIANTS) == named]
        found += [{**run, "rows": rows}] * bool(rows)
    if named and not found:
        return NONE.format(bench="train_step").replace("train_step", f"train_step --model {','.join(VARIANTS)}", 1)
    return train_step(found)


def lora_linear(runs: list[dict], titles: dict[str, str] = TITLES) -> str:
    """Rows: shape, dtype, threads, dropout. Figures: forward / backward, multiples of the frozen layer's."""
    return _section("lora_linear", runs, _layer_head, _layer_row, titles)


OPS = {
    "lora_group": "Layers with one input: forward / backward, multiples of the frozen layers'",
    "lora_mlp": "An MLP block: forward / backward, multiples of the frozen block's",
    "lora_embedding": "An embedding: forward / backward, multiples of stock PEFT's",
}


# benchmarks that have one figure a provider, and more kinds of them than a page has room for
SINGLE = {
    "lora_experts": "The experts of a mixture: time, multiples of the frozen ones'",
    "dora_linear": "DoRA: time, multiples of the frozen layer's",
    "lora_mixed": "A batch of 16 adapters, inference: time, multiples of the frozen layer's",
    "generate": "Generation with adapters on: time, multiples of merged weights'",
    "quantized": "Quantized bases: time, multiples of the library's layer without an adapter",
    "lora_conv": "Convolutions of size 1: time, multiples of the frozen one's",
}


def single(bench: str, runs: list[dict]) -> str:
    """Rows as they are titled. Figures: multiples of the baseline, speed-up, peak MiB; a table for each question."""
    parts = [_one_figure(bench, _under("", bench, runs))]
    for heading in kinds.APART.get(bench, ()):
        if found := _under(heading, bench, runs):
            parts += [f"### {heading}", _one_figure(bench, found)]
    return "\n\n".join(parts)


def _under(heading: str, bench: str, runs: list[dict]) -> list[dict]:
    """The benchmark's runs with the rows of one table alone."""
    found = []
    for run in (r for r in runs if r["bench"] == bench):
        rows = [row for row in run["rows"] if kinds.heading(bench, row["settings"]) == heading]
        found += [{**run, "rows": rows}] * bool(rows)
    return found


def _one_figure(bench: str, runs: list[dict]) -> str:
    rows = [row for run in runs for row in run["rows"]]
    known = dict.fromkeys(n for row in rows for n in row.get("providers", ()) if n != row["baseline"])
    return _section(bench, runs, _single_head, _single_row, {name: ALL.get(name, _bold(name, name)) for name in known})


def _single_head(names: list[str]) -> list[str]:
    return ["", *(ALL.get(n, _bold(n, n)) for n in names), "speed-up over stock [95 %]", "peak MiB: stock → peft_fast"]


def _single_row(row: dict, names: list[str]) -> list[str]:
    found, sizes = row["providers"], row["bytes"]
    ratios = [_bold(n, f"{found[n]['total']['ratio'][0]:.2f}") if n in found else "" for n in names]
    speed = found.get("peft_fast", {}).get("total", {}).get("speedup")
    speedup = f"**{speed[0]:.2f}×** [{speed[1]:.2f}, {speed[2]:.2f}]" if speed else ""
    peaks = " → ".join(f"{sizes[n]['peak'] / 2**20:,.1f}" for n in ("stock", "peft_fast") if n in sizes)
    return [row["title"] + ("" if row["aa"]["ok"] else " †"), *ratios, speedup, peaks]


def of_op(op: str, runs: list[dict], titles: dict[str, str] = TITLES) -> str:
    """Rows: shape, dtype, dropout. Figures: forward / backward, multiples of the baseline's; saved MiB."""
    return _section(op, runs, _op_head, _op_row, titles)


def smollm2(runs: list[dict]) -> str:
    """Rows: dropout, who trains. Figures: perplexity, speed, memory of whole runs."""
    parts = []
    for run in _of("smollm2", runs):
        lines = [cells(RUN_HEAD), cells(["---"] * len(RUN_HEAD))]
        lines += [cells(line) for row in run["rows"] for line in _run_rows(row)]
        facts = "; ".join(dict.fromkeys(_recipe(row) for row in run["rows"]))
        parts.append("\n".join([*lines, "", f"<sub>{facts}. {machine.line(run['machine'])}.</sub>"]))
    return "\n\n".join(parts) or NONE.format(bench="smollm2")


RUN_HEAD = [
    "dropout", "", "perplexity, held out", "tokens/s", "speed-up [95 %]", "peak of the process, MiB",
    "peak of a step, MiB", "saved for backward, MiB",
]  # fmt: skip


def _run_rows(row: dict) -> list[list[str]]:
    s, lines = row["settings"], []
    for name, run in row["runs"].items():
        before, after = run["perplexity"]
        ours = name == "peft_fast"
        apart = f" ({100 * (row['perplexity_ratio'] - 1):+.2f} %)" if ours else ""
        mid, low, high = row["speedup"]
        sizes = [f"{run[key] / 2**20:,.0f}" for key in ("peak_resident_bytes", "step_bytes", "saved_bytes")]
        speed = f"**{mid:.2f}×** [{low:.2f}, {high:.2f}]" if ours else ""
        learned = f"{before:.2f} → {after:.2f}{apart}"
        lines.append([f"{s['p']:g}", TITLES[name], learned, f"{run['tokens_per_second']:,.0f}", speed, *sizes])
    return lines


def _recipe(row: dict) -> str:
    s = row["settings"]
    return (
        f"SmolLM2-135M-Instruct, {s['dtype']}, LoRA r = {s['r']} on every linear layer, {s['steps']} steps of "
        f"{s['batch']} × {s['length']} tokens of {s['data']['source']}, learning rate {s['lr']:g}"
    )


METHODS_HEAD = [
    "method", "options", "weights that train", "accuracy, test", "minutes of training", "peak memory, MiB",
    "forecast, MiB", "saved, MiB",
]  # fmt: skip


def methods(runs: list[dict]) -> str:
    """Rows: a method. Figures: accuracy, minutes and memory of whole runs on the same rows."""
    parts = []
    for run in _of("methods", runs):
        lines = [cells(METHODS_HEAD), cells(["---"] * len(METHODS_HEAD)), *map(_method_row, run["rows"])]
        s, counts = run["rows"][0]["settings"], run["rows"][0]["rows"]
        n = counts["test"]
        accuracies = [row["test"]["accuracy"] for row in run["rows"]]
        error = 100 * max((a * (1 - a) / n) ** 0.5 for a in accuracies)
        facts = (
            f"{s['model'].removeprefix('example:')} on {s['data'].removeprefix('example:')}: {counts['train']:,} rows, "
            f"{s['epochs']:g} epochs of batches of {s['batch_size']}, {run['rows'][0]['model']['dtype']}, "
            f"{s['threads']} threads; tested on {n:,} rows, of which {100 * run['rows'][0]['chance']:.1f} % have the "
            f"most frequent label; the standard error of an accuracy is {error:.1f} points. Each method had "
            f"{len(run['rows'][0]['tried'])} learning rates; the {counts['validation']:,} validation rows chose. Peak "
            "memory is the process's, with its libraries and what its allocator could not give back, beyond what it "
            "held before the model was there; the forecast, that of --dry-run, counts the tensors of a step"
        )
        parts.append("\n".join([*lines, "", f"<sub>{facts}. {machine.line(run['machine'])}.</sub>"]))
    return "\n\n".join(parts) or NONE.format(bench="methods")


def _method_row(row: dict) -> str:
    shown = {k: v for k, v in row["settings"].items() if k in METHOD_OPTIONS}
    model, most = row["model"], (row["peak_bytes"], row["forecast_bytes"], row["result_bytes"])
    share = f"{model['trainable']:,} ({100 * model['trainable'] / model['parameters']:.3g} %)"
    peak, forecast, saved = (f"{size / 2**20:,.1f}" if size < 2**23 else f"{size / 2**20:,.0f}" for size in most)
    options = ", ".join(f"{k} {v:g}" for k, v in shown.items())
    accuracy = f"**{100 * row['test']['accuracy']:.1f} %**"
    return cells([row["title"], options, share, accuracy, f"{row['train_seconds'] / 60:.1f}", peak, forecast, saved])


METHOD_OPTIONS = ("learning_rate", "loraplus_ratio", "layer_decay", "unfreeze_every", "unfreeze_layers")


def _op_head(names: list[str]) -> list[str]:
    return ["shape", "dtype", "dropout", *(ALL[n] for n in names), _saved_head(names)]


def _op_row(row: dict, names: list[str]) -> list[str]:
    s = row["settings"]
    # stock PEFT leaves a block without adapters as it is
    stock = "stock" if "stock" in row["bytes"] else "frozen"
    shape = s["shape"] + ("" if row["aa"]["ok"] else " †")
    return [shape, s["dtype"], f"{s['p']:g}", *_pairs(row["providers"], names), _saved(row, stock, 1)]


def _section(bench: str, runs: list[dict], head: Callable, line: Callable, titles: dict[str, str] = TITLES) -> str:
    parts = []
    for run in _of(bench, runs):
        names = [n for n in titles if any(n in row.get("providers", {}) for row in run["rows"])]
        header = head(names)
        lines = [cells(header), cells(["---"] * len(header))]
        lines += [cells(line(row, names)) for row in run["rows"] if "providers" in row]
        parts.append("\n".join([*lines, "", f"<sub>{machine.line(run['machine'])}.{_noise(run)}</sub>"]))
    return "\n\n".join(parts) or NONE.format(bench=bench)


def _of(bench: str, runs: list[dict]) -> list[dict]:
    """The runs of a benchmark; those of one machine, its versions and a day are one, in the order of their files."""
    found: dict[str, dict] = {}
    for run in (r for r in runs if r["bench"] == bench):
        line = machine.line(run["machine"])
        before = found[line]["rows"] if line in found else []
        found[line] = {"machine": run["machine"], "rows": [*before, *run["rows"]]}
    return list(found.values())


def _train_head(names: list[str]) -> list[str]:
    shown = [ALL[n] for n in names]
    return ["model", "dtype", "dropout", *shown, "speed-up over stock [95 %]", _saved_head(names)]


def _train_row(row: dict, names: list[str]) -> list[str]:
    s, providers = row["settings"], row["providers"]
    speed = providers.get("peft_fast", {}).get("total", {}).get("speedup")
    ratios = [_bold(n, f"{providers[n]['total']['ratio'][0]:.2f}") if n in providers else "" for n in names]
    # of the largest, as many layers as fitted
    label = s["model"] + (f", {s['layers']} layers" if s["model"] == "llama-3-8b-like" else "")
    label += "" if row["aa"]["ok"] else " †"
    speedup = f"**{speed[0]:.2f}×** [{speed[1]:.2f}, {speed[2]:.2f}]" if speed else ""
    return [label, s["dtype"], f"{s['p']:g}", *ratios, speedup, _saved(row, "stock")]


def _saved_head(names: list[str]) -> str:
    return "saved MiB: stock → " + "layer by layer → " * ("layer by layer" in names) + "peft_fast"


def _saved(row: dict, stock: str, digits: int = 0) -> str:
    shown = (row["bytes"][n]["saved"] for n in (stock, "layer by layer", "peft_fast") if n in row["bytes"])
    return " → ".join(f"{size / 2**20:.{digits}f}" for size in shown)


def _layer_head(names: list[str]) -> list[str]:
    return ["M × K × N", "r", "dtype", "threads", "dropout", *(ALL[n] for n in names)]


def _layer_row(row: dict, names: list[str]) -> list[str]:
    s = row["settings"]
    shape = f"{s['M']} × {s['K']} × {s['N']}" + ("" if row["aa"]["ok"] else " †")
    return [shape, str(s["r"]), s["dtype"], str(s["threads"]), f"{s['p']:g}", *_pairs(row["providers"], names)]


def _pairs(providers: dict, names: list[str]) -> list[str]:
    """forward / backward of each, multiples of the baseline's."""
    pairs = []
    for n in names:
        both = (providers[n][phase]["ratio"][0] for phase in ("forward", "backward") if n in providers)
        pairs.append(_bold(n, " / ".join(f"{ratio:.2f}" for ratio in both)))
    return pairs


def _bold(name: str, text: str) -> str:
    return f"**{text}**" if text and name.startswith("peft_fast") else text


def _noise(run: dict) -> str:
    if all(row["aa"]["ok"] for row in run["rows"] if "aa" in row):
        return ""
    return " † the baseline against itself was outside its own interval: the machine was not quiet."


def cells(row: list[str]) -> str:
    return "| " + " | ".join(row) + " |"


def summarized(runs: list[dict]) -> str:
    """Rows: benchmark, dtype, dropout; a table for each machine."""
    parts = []
    for where, lines in summary.sections(runs).items():
        head = [cells(summary.HEAD), cells(["---"] * len(summary.HEAD))]
        parts.append("\n".join([*head, *map(cells, lines), "", f"<sub>{where}.</sub>"]))
    return "\n\n".join(parts) or NONE.format(bench="lora_linear")


# marker name in README -> what stands between <!-- NAME:start --> and <!-- NAME:end -->
README_SECTIONS = {
    "bench": partial(variants, named=False),
    "smollm2": smollm2,
    "summary": summarized,
}
# the same of the page beside this file
MEASURED_SECTIONS = {
    "variants": variants,
    "layer": lora_linear,
    **{op.removeprefix("lora_"): partial(of_op, op) for op in OPS},
    **{bench.removeprefix("lora_"): partial(single, bench) for bench in SINGLE},
}
SECTIONS = README_SECTIONS | MEASURED_SECTIONS
# the same, of the page that compares methods
WHICH_SECTIONS = {"methods": methods}


def render(text: str, runs: list[dict], sections: dict[str, Callable] = SECTIONS) -> str:
    """A page's text with every marked part rewritten."""
    for name, section in sections.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            fail(DataError, f"a page without {start} … {end}", "both markers, in order", "put them back")
        text = f"{before}{start}\n{section(runs)}\n{end}{after}"
    return text


def update(readme: Path = README, folder: Path = RESULTS, check: bool = False) -> bool:
    """Rewrites the pages, or the one given (with `check`: only looks); True when all were in sync."""
    if not readme.is_file():
        fail(DataError, "no README.md beside benchmarks/", "a clone of the repository", "run it there")
    found = {readme: SECTIONS}
    if readme == README:
        from . import pages  # what it needs is not on every GPU machine

        found = {README: README_SECTIONS, MEASURED: MEASURED_SECTIONS}
        found |= {WHICH: WHICH_SECTIONS} | pages.sections()
    in_sync = True
    for page, sections in found.items():
        old = page.read_text(encoding="utf-8")
        new = render(old, documents(folder), sections)
        in_sync = in_sync and new == old
        if new != old and not check:
            page.write_text(new, encoding="utf-8")
    return in_sync
