"""`python -m peft_fast tune`: times the tiles and plans of the Triton kernels on this GPU and keeps the fastest.

The result is one JSON file in the cache folder, which every later process reads; nothing is tuned while training.
Plain argparse: on a GPU machine torch and triton may be all there is.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.util
import json
import sys
import time
from pathlib import Path

from peft_fast.errors import DeviceError, SettingsError, UnsupportedError, fail

DTYPES = ("bf16", "fp16", "fp32")
INTERPRETER = "TRITON_INTERPRET=1 python -m peft_fast tune --dry-run"


def app(args: list[str], prog_name: str = "python -m peft_fast tune") -> int:
    """Tunes what there is time for; exit status 0 also where nothing faster was found."""
    given = _parser(prog_name).parse_args(args)
    pairs, ranks, ps = _pairs(given.shapes), _ranks(given.rank), _ps(given.dropout)
    if given.dtype not in DTYPES:
        fail(SettingsError, f"--dtype {given.dtype}", "one of " + ", ".join(DTYPES), "for example --dtype bf16")
    if given.minutes <= 0 or given.tokens < 1:
        what = f"--minutes {given.minutes:g} --tokens {given.tokens}"
        fail(SettingsError, what, "more than 0 minutes, at least 1 token", "leave them out for the defaults")
    _machine(given.dry_run)
    import torch

    clock = importlib.import_module("peft_fast.benchmarks.clock")
    tuner = importlib.import_module("peft_fast.benchmarks.tuner")
    shapes = importlib.import_module("peft_fast.benchmarks.shapes")
    device = torch.device("cpu" if given.dry_run else "cuda")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[given.dtype]
    if given.dry_run:  # the interpreter is a thousand times slower, and has bfloat16 wrong
        pairs, tokens, dtype = pairs or ((48, 40),), 33, torch.float32
    else:
        pairs, tokens = pairs or shapes.GPU_PAIRS, given.tokens
    job = tuner.Job(pairs, tokens, ranks, ps, dtype, device)
    deadline = time.monotonic() + given.minutes * 60
    measure = (lambda fn: _host_seconds(fn)) if given.dry_run else (lambda fn: clock.seconds(fn, device))
    shown = _Screen(_gpu(device), len(pairs))
    made = tuner.tune(job, measure, deadline, shown)
    shown.end(made)
    if given.json:
        _save(given.json, {**_gpu(device), "entries": [{**c.entry(), "refused": list(c.refused)} for c in made]})
        print(f"wrote {given.json}")
    if given.dry_run:
        print("a dry run: the times say nothing, and nothing was kept")
        return 0
    print(f"wrote {_write(device, made)}")
    return 0


def _parser(prog_name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog_name,
        description="Time the Triton kernels' tiles and plans on this GPU; keep the fastest.",
        epilog="The result is a file for this GPU in the folder PEFT_FAST_CACHE; `doctor` says whether it is in use.",
    )
    add = parser.add_argument
    add("--shapes", default="", metavar="K,N;…", help="layers, e.g. 4096,4096;4096,14336 (default: Llama, Qwen, BERT)")
    add("--rank", default="16", metavar="R,…", help="LoRA ranks (default 16)")
    add("--dropout", default="0.05,0", metavar="P,…", help="LoRA dropouts (default 0.05,0)")
    add("--dtype", default="bf16", help="bf16, fp16 or fp32 (default bf16)")
    add("--tokens", type=int, default=8192, help="tokens in a call (default 8192)")
    add("--minutes", type=float, default=5.0, metavar="M", help="start nothing further after this long (default 5)")
    add("--json", type=Path, metavar="FILE", help="write what was found there too, with what was refused and why")
    add("--dry-run", action="store_true", help="the same path in Triton's interpreter, toy sizes, nothing kept")
    return parser


def _machine(dry_run: bool) -> None:
    """Refuses a machine without Triton or without a GPU it serves, in three lines."""
    if importlib.util.find_spec("torch") is None:
        fail(UnsupportedError, "a Python without torch", "torch >= 2.11", "run `pip install 'torch>=2.11'`")
    import torch

    if not dry_run and not torch.cuda.is_available():
        do = f"run it where you train; `{INTERPRETER}` shows the path on a CPU"
        fail(DeviceError, "a machine where torch has no GPU", "a GPU to time kernels on", do)
    if importlib.util.find_spec("triton") is None:
        fail(UnsupportedError, "a Python without triton", "triton >= 3.6", "run `pip install 'triton>=3.6'`")
    if dry_run:
        import triton

        if not triton.knobs.runtime.interpret:
            fail(
                UnsupportedError, "--dry-run without Triton's interpreter", "TRITON_INTERPRET=1", f"run `{INTERPRETER}`"
            )
        return
    from peft_fast import dispatch

    why = next((why for name, live, why in dispatch.backends() if name == "triton" and not live), "")
    if why:
        fail(UnsupportedError, "a machine without live Triton kernels", f"what doctor says: {why}", "mend that first")


def _host_seconds(fn) -> float:
    begin = time.perf_counter()
    fn()
    return time.perf_counter() - begin


def _gpu(device) -> dict:
    import torch

    from peft_fast.backends.triton import version

    versions = {"triton": version(), "torch": torch.__version__}
    if device.type == "cpu":
        return {"gpu": "Triton's interpreter", "capability": "", **versions}
    properties = torch.cuda.get_device_properties(device)
    return {"gpu": properties.name, "capability": f"{properties.major}.{properties.minor}", **versions}


def _write(device, made) -> Path:
    """Merges the choices into this GPU's file; a file of another Triton is replaced."""
    from peft_fast.backends.triton import tuning

    machine = {"schema": tuning.SCHEMA, **_gpu(device)}
    path = tuning.path(machine["gpu"])
    try:
        old = json.loads(path.read_text())
        same = all(old.get(key) == machine[key] for key in ("schema", "gpu", "capability", "triton"))
        entries = {(e["op"], e["shape"], e["dtype"]): e for e in old["entries"]} if same else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        entries = {}
    entries |= {(c.op, c.shape, c.dtype): c.entry() for c in made}
    document = {**machine, "date": f"{datetime.date.today()}", "entries": list(entries.values())}
    _save(path, document)
    tuning.forget()
    return path


def _save(path: Path, document: dict) -> None:
    """A half-written file never replaces a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(document, indent=1) + "\n")
    part.replace(path)


# ---- what the user gives


def _pairs(text: str) -> tuple[tuple[int, int], ...]:
    words = [word.split(",") for word in text.replace(" ", "").split(";") if word]
    fine = all(len(word) == 2 and all(n.isdigit() and int(n) > 0 for n in word) for word in words)
    if not fine or (text and not words):
        need = "pairs K,N of whole numbers, with ; between them"
        fail(SettingsError, f"--shapes {text}", need, "for example --shapes '4096,4096;4096,14336'")
    return tuple((int(k), int(n)) for k, n in words)


def _ranks(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.isdigit() and 1 <= int(word) <= 256 for word in words):
        fail(SettingsError, f"--rank {text}", "whole numbers from 1 to 256", "for example --rank 16,64")
    return tuple(map(int, words))


def _ps(text: str) -> tuple[float, ...]:
    try:
        ps = tuple(map(float, text.split(",")))
    except ValueError:
        ps = (-1.0,)
    if not all(0 <= p < 1 for p in ps):
        fail(SettingsError, f"--dropout {text}", "numbers from 0 to below 1", "for example --dropout 0,0.05")
    return ps


# ---- how it looks

COLUMNS = ("what", "shape class", "shipped", "chosen", "gain")


class _Screen:
    """A line as each choice is made, a table at the end; plain where rich is not installed."""

    def __init__(self, machine: dict, pairs: int) -> None:
        self.watched = sys.stdout.isatty()
        self.asked_for = 0
        print(f"tuning for {machine['gpu']}, triton {machine['triton']}, {_many(pairs, 'layer shape')}", flush=True)

    def asked(self, name: str, number: int, total: int) -> None:
        """What is timed now; a line that the answer replaces, on a terminal only."""
        self.asked_for = total
        if self.watched:
            print(f"\r\x1b[2K  [{number:>{len(str(total))}}/{total}] {name} …", end="", flush=True)

    def row(self, choice, number: int, total: int) -> None:
        name, shape, shipped, chosen, gain = _cells(choice)
        clear = "\r\x1b[2K" if self.watched else ""
        count = f"[{number:>{len(str(total))}}/{total}]"
        print(f"{clear}  {count} {name} {shape}: {chosen or f'{shipped} stays'}{gain and f'  ({gain})'}", flush=True)
        for why in choice.refused:
            print(f"    refused {why}", flush=True)

    def end(self, made) -> None:
        rows = [_cells(choice) for choice in made]
        print()
        try:
            import rich.box
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            widths = [max(len(row[i]) for row in [COLUMNS, *rows]) for i in range(len(COLUMNS))]
            for row in [COLUMNS, *rows]:
                print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
        else:
            table = Table(box=rich.box.SIMPLE_HEAD)
            for index, name in enumerate(COLUMNS):
                table.add_column(name, style="cyan" if index == 0 else None, overflow="fold")
            for choice, row in zip(made, rows, strict=True):
                table.add_row(*row, style="green" if choice.changed else None)
            Console(highlight=False).print(table)
        if len(made) < self.asked_for:
            print(f"the time ended after {len(made)} of {self.asked_for} choices: more with --minutes")
        changed = [choice for choice in made if choice.changed]
        most = f", up to {max(c.gain for c in changed):.2f}× faster" if changed else ""
        print(f"tuned: {len(changed)} of {_many(len(made), 'choice')} not the shipped one{most}")


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _cells(choice) -> tuple[str, str, str, str, str]:
    label = importlib.import_module("peft_fast.benchmarks.tuner").label
    name = "plan" if choice.op == "lora_linear" else choice.op
    if not choice.changed:
        return name, f"{choice.shape} {choice.dtype}", label(choice.shipped), "", ""
    shown = f"{choice.gain:.2f}×"
    return name, f"{choice.shape} {choice.dtype}", label(choice.shipped), label(choice.chosen), shown
