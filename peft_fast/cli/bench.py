"""`python -m peft_fast bench <name>`: measure, and write what was measured.

Plain argparse: on a GPU machine torch may be all there is.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import time
from pathlib import Path

from peft_fast import settings
from peft_fast.errors import DeviceError, SettingsError, UnsupportedError, fail

BENCHES = {
    "lora_linear": "one adapted layer, forward and backward",
    "lora_group": "layers with one input, q/k/v and gate/up, as one op and one by one",
    "lora_mlp": "an MLP block as one op and layer by layer",
    "lora_embedding": "an adapted embedding",
    "dora_linear": "one layer with a DoRA adapter, forward and backward",
    "lora_conv": "an adapted convolution of size 1",
    "lora_mixed": "a batch of 16 adapters, its layers and generation, inference",
    "lora_experts": "the adapted experts of a mixture, both products and their gate",
    "quantized": "an adapted layer over bitsandbytes, torchao and HQQ bases: the library alone, stock PEFT and ours",
    "train_step": "a whole fine-tuning step of BERT-, GPT-2- and Llama-like models",
    "smollm2": "a real fine-tuning of SmolLM2-135M: perplexity, tokens a second, memory",
    "generate": "generation with adapters on: merged, stock PEFT and peft_fast, one sequence",
    "methods": "head, LoRA, DoRA, gradual and full fine-tuning of one model: accuracy, minutes, memory",
    "pages": "the first command of each task's page of the docs: what it learns, minutes, memory",
    "table": "write the tables of README and of the docs' pages from benchmarks/results/*.json",
}
SCALES = {"quick": "about a minute, wider intervals", "tiny": "toy sizes: proves the path only"}


def app(args: list[str], prog_name: str = "python -m peft_fast bench") -> int:
    """Runs one benchmark; exit status 1 when a gate refused a provider."""
    given = _parser(prog_name).parse_args(args)
    _one_of("benchmark", given.name, BENCHES, prog_name)
    if given.name == "table":
        return _table(given.check)
    return _bench(given, prog_name)


def _parser(prog_name: str) -> argparse.ArgumentParser:
    what = "\n".join(f"  {name:<14} {text}" for name, text in BENCHES.items())
    parser = argparse.ArgumentParser(
        prog=prog_name,
        description="Correctness first, then interleaved timing with its spread.",
        epilog=f"benchmarks:\n{what}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("name", metavar="NAME", help="which one; see below")
    scale = parser.add_mutually_exclusive_group()
    for name, what in SCALES.items():
        scale.add_argument(f"--{name}", dest="scale", action="store_const", const=name, help=what)
    parser.set_defaults(scale="full")
    add("--json", type=Path, metavar="FILE", help="write the result")
    add("--plot", type=Path, metavar="FILE", help="draw it (PNG, SVG, PDF)")
    add("--model", type=_words, default=(), metavar="A,B", help="only these models")
    add("--dtype", type=_words, default=(), metavar="A,B", help="bf16, fp32, fp16")
    add("--dropout", type=_words, default=(), metavar="P,Q", help="LoRA dropout, e.g. 0,0.05")
    add("--threads", type=_words, default=(), metavar="N,M", help="intra-op threads")
    add("--repeats", type=int, default=0, metavar="N", help="rounds per row")
    add("--device", default="", help="cpu or cuda (default: cuda where torch has a GPU)")
    add("--minutes", type=float, default=0.0, metavar="M", help="start no further row after this long")
    add("--gate-only", action="store_true", help="check correctness, time nothing")
    add("--peers", action="store_true", help="also other projects' functions, where they import")
    add("--without", type=_words, default=(), metavar="A,B", help="plans not to measure, e.g. 'cuda fused'")
    add("--check", action="store_true", help="table: fail if README is not up to date, change nothing")
    return parser


def _bench(given: argparse.Namespace, prog_name: str) -> int:
    bench = importlib.import_module(f"peft_fast.benchmarks.{given.name}")
    harness = importlib.import_module("peft_fast.benchmarks.harness")
    show = importlib.import_module("peft_fast.benchmarks.show").best()
    given.device = _device(given.device)
    for model in given.model:
        _one_of("model", model, bench.names(given.device), prog_name)
    for dtype in given.dtype:
        _one_of("dtype", dtype, importlib.import_module("peft_fast.benchmarks.lora_linear").DTYPES, prog_name)
    if given.repeats < 0 or given.minutes < 0:
        what = f"--repeats {given.repeats} --minutes {given.minutes}"
        fail(SettingsError, what, "numbers of 0 or more", "leave them out for the defaults")
    options = harness.Options(
        scale=given.scale,
        device=given.device,
        threads=_numbers("threads", given.threads, int, lambda n: 1 <= n <= 1024, "whole numbers from 1"),
        dtypes=given.dtype,
        models=given.model,
        dropouts=_numbers("dropout", given.dropout, float, lambda p: 0 <= p < 1, "numbers from 0 to below 1"),
        repeats=given.repeats,
        deadline=time.monotonic() + given.minutes * 60 if given.minutes else float("inf"),
        gate_only=given.gate_only,
        peers=given.peers,
        without=given.without,
    )
    for path in (given.json, given.plot):
        if path and path.is_dir():
            fail(SettingsError, f"{path.name}, a folder", "the name of a file to write", "add a file name")
    if given.plot and given.name == "pages":
        fail(
            SettingsError,
            "--plot for pages",
            "a benchmark that compares",
            "leave it out; each run has a report",
        )
    # rows have their real size, but the gate checks layers on few tokens: those must run what is timed
    with settings.override(min_tokens=0):
        if hasattr(bench, "run"):
            document = bench.run(options, show, given.json)
        else:
            document = harness.run(given.name, bench.cases(options), options, show, given.json)
    for title in document["skipped"]:
        print(f"not measured: {title}")
    for row in document["refused"]:
        print(f"refused: {row['title']}")
    for why in document.get("kernel_failures", ()):
        print(f"note: {why}")
    if given.device != "cpu" and not given.gate_only:
        show.targets(importlib.import_module("peft_fast.benchmarks.targets").judge([document]))
    if given.json:
        print(f"\nwrote {given.json}")
    if given.plot and document["rows"] and not given.gate_only:
        _plot(document, given.plot)
    return 1 if document["refused"] else 0


def _plot(document: dict, path: Path) -> None:
    try:
        importlib.import_module("peft_fast.benchmarks.plots").draw(document, path)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print(
            f"no {path.name}: matplotlib is not installed; where it is: python -m peft_fast.benchmarks.plots FILE.json"
        )
    else:
        print(f"wrote {path}")


def _table(check: bool) -> int:
    table = importlib.import_module("peft_fast.benchmarks.table")
    in_sync = table.update(check=check)
    if check:
        print("the pages are up to date" if in_sync else "a page and the results differ: run `bench table`")
        return 0 if in_sync else 1
    print("the pages were up to date" if in_sync else "pages rewritten from benchmarks/results")
    return 0


def _device(name: str) -> str:
    import torch

    gpu = torch.cuda.is_available()
    if name in ("", "cpu") or (name == "cuda" and gpu):
        return name or ("cuda" if gpu else "cpu")
    do = "run `python -m peft_fast doctor`"
    fail(DeviceError, f"--device {name}", "cpu, or cuda where torch has a GPU", do)


def _one_of(what: str, name: str, known, prog_name: str) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    do = f"did you mean {near[0]}?" if near else f"run `{prog_name} --help`"
    fail(UnsupportedError, f"{what} {name!r}", "one of " + ", ".join(known), do)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def _numbers(name: str, words: tuple[str, ...], kind: type, fits, need: str) -> tuple:
    try:
        numbers = tuple(kind(word) for word in words)
    except ValueError:
        numbers = (kind(-1),)
    if not all(fits(n) for n in numbers):
        example = "1,2" if kind is int else "0,0.05"
        fail(SettingsError, f"--{name} {','.join(words)}", need, f"for example --{name} {example}")
    return numbers
