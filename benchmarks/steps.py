"""What `make gpu` runs, step by step: command lines as data, or the reason why a step has nothing to run."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from peft_fast import build, native
from peft_fast.backends import cuda
from peft_fast.dispatch import UNPLANNED

from . import machine, peers
from .shapes import ALONE, OPS

ROOT = Path(__file__).resolve().parent.parent
# Share of the budget after which each step must have ended; what one leaves, the next may use. What is worth most comes
# first: a machine may be taken away at any time. `contract` is most of the proof and has hundreds of kernels to
# compile, seconds each, among MOST_WORKERS processes; `ops`, the rest of the tests, finds many of its own in Triton's
# cache. `racecheck` has no share, only what `memcheck` leaves: most races show as wrong values in the contract. The
# figures keep two fifths.
ENDS = {
    "build": 0.16,
    "plans": 0.23,
    "doctor": 0.255,
    "gate": 0.28,
    "contract": 0.49,
    "tune": 0.545,
    "lora_linear": 0.65,
    "train_step": 0.74,
    "lora_experts": 0.78,
    "dora_linear": 0.81,
    "lora_mixed": 0.835,
    "generate": 0.865,
    "lora_group": 0.89,
    "lora_mlp": 0.91,
    "lora_embedding": 0.92,
    "quantized": 0.93,
    "lora_conv": 0.94,
    "peers": 0.95,
    "ops": 0.97,
    "memcheck": 0.99,
    "racecheck": 0.99,
}
LEAST_S = {"racecheck": 12.0}  # with less left it is not started
# these take --minutes and end by themselves
TIMED = (
    *("plans", "gate", "tune", "lora_linear", "train_step", *ALONE, "generate", *OPS, "quantized"),
    *("lora_conv", "peers", "memcheck", "racecheck"),
)
# the op whose kernels a benchmark needs, where it has not its name
OP_OF = {"generate": "lora_decode", "quantized": "nf4"}
# the numeric contract of every op: its first file is that of most of them
CONTRACT = ("test_contract.py", "test_decode.py", "test_dora.py", "test_quantized.py")
LIBRARIES = ("bitsandbytes", "torchao", "hqq")  # that make quantized weights
UNSEEN = {"racecheck": ("cuda fused",)}  # it does not know what the hardware copies by itself
# about the CPU alone: its instruction sets, the address of its packed weights, its clock
CPU_TESTS = ("test_amx.py", "test_weights.py", "test_timing.py")
# 60 to 74 kernels to compile for each of its parameters, one after another; the contract's table has the same options
MANY_KERNELS = ("test_random.py",)
# of the contract's table, for a dry run
A_FEW = (
    *("lora_linear-f32-rank_16", "lora_group-f32-two", "lora_mlp-f32-silu_gated", "lora_embedding-f32-gemma"),
    *("lora_experts-f32-plain", "lora_mixed-f32-decode", "dora_linear-f32-rank_1", "lora_decode-f32-lead_3"),
)
MOST_WORKERS = 14  # each has a context on the GPU


class Step(NamedTuple):
    """A command line, or in `skip` why there is none; `extra` variables for its environment."""

    name: str
    command: list[str]
    skip: str = ""
    extra: dict[str, str] = {}  # noqa: RUF012


def steps(out: Path, stem: str, dry_run: bool) -> list[Step]:
    """The steps in order. A dry run has the same ones with toy sizes, kernels in Triton's interpreter."""
    interpreted = {"TRITON_INTERPRET": "1"} if dry_run and not machine.no_interpreter() else {}
    sized = ["--device", "cpu", "--tiny"] if dry_run else ["--device", "cuda"]
    bench = ["-m", "peft_fast", "bench"]

    def results(step: str, op: str) -> list[str]:
        part = out / f"{stem}-{step}"
        return [*bench, op, *sized, "--json", f"{part}.json", "--plot", f"{part}.png"]

    # bfloat16, the dtype that is measured, is judged there; the interpreter has it wrong
    few = ["--dtype", "fp16", "--repeats", "2"] if dry_run else []
    once = ["--dropout", "0.05"] if dry_run else []
    half = ["--dtype", "fp16,fp32", "--dropout", "0.05", "--model", "square"]
    others_ran = *CONTRACT, *CPU_TESTS, *MANY_KERNELS
    others = peers.installed()
    return [
        _build(dry_run),
        _plans(out / f"{stem}-plans.json", dry_run, interpreted),
        Step("doctor", ["-m", "peft_fast", "doctor"]),
        Step("gate", [*bench, "lora_linear", *sized, "--gate-only", *half]),
        _tests("contract", [f"tests/ops/{name}" for name in CONTRACT], dry_run, interpreted),
        _tune(out / f"{stem}-tune.json", interpreted, dry_run),
        Step("lora_linear", [*results("lora_linear", "lora_linear"), *few, *once], extra=interpreted),
        Step("train_step", results("train_step", "train_step")),
        *(Step(op, results(op, op)) for op in (*ALONE, "generate")),
        *(Step(op, [*results(op, op), *few, *once], extra=interpreted) for op in OPS),
        _quantized(results("quantized", "quantized"), dry_run),
        Step("lora_conv", results("lora_conv", "lora_conv")),
        Step(
            "peers",
            [*results("peers", "lora_linear"), "--peers", "--model", "square"],
            "" if others else f"none of {', '.join(peers.FUNCTIONS)} is installed",
        ),
        _tests("ops", ["tests/ops", *(f"--ignore=tests/ops/{name}" for name in others_ran)], dry_run),
        _sanitizer("memcheck", dry_run, interpreted),
        _sanitizer("racecheck", dry_run, interpreted),
    ]


def without(step: Step, broken: list[str]) -> list[str]:
    """The end of a command line that leaves broken plans, "cuda fused", or ops, "triton nf4", out of a step."""
    broken = list(dict.fromkeys([*broken, *UNSEEN.get(step.name, ())]))
    if not broken:
        return []
    if step.name in ("contract", "ops"):
        # of a plan or an op, not of a test of both
        words = (plan.split() for plan in broken)
        return ["-k", " and ".join(f"not ({b} and {op})" if op in UNPLANNED else f"not {b}-{op}" for b, op in words)]
    named = ("gate", "memcheck", "racecheck", "lora_linear", *OPS, "peers")
    return ["--without", ",".join(broken)] if step.name in named else []


def no_figures(step: Step, broken: list[str]) -> str:
    """Why a benchmark is left out whole: it has one way to run, and that is broken."""
    op = OP_OF.get(step.name, step.name)
    found = [plan for plan in broken if plan.split()[-1] == op]
    return f"its kernels are broken: {', '.join(found)}" if found else ""


def _quantized(command: list[str], dry_run: bool) -> Step:
    """The libraries' layers where there are libraries, else packed values alone."""
    there = [name for name in LIBRARIES if importlib.util.find_spec(name)]
    return Step("quantized", command if there and not dry_run else [*command, "--model", "nf4-op"])


def _build(dry_run: bool) -> Step:
    """This GPU's architecture alone: the others are compiled where there is no hurry. A dry run needs none."""
    archs = "none" if dry_run else "native"
    return Step("build", ["-m", "peft_fast.build", "--if-possible"], _built(dry_run), {"PEFT_FAST_CUDA_ARCHS": archs})


def _built(dry_run: bool) -> str:
    """Why there is nothing to build; what is built here must not take the place of a library for more machines."""
    if dry_run:
        there = native.load() or native.LIBRARY.exists()
        return "there is a library, and a dry run replaces none" if there else ""
    try:
        known = build.read_info().get("sources_hash") == build.sources_hash()
        enough = known and native.load() and set(build.cuda.native()) <= set(cuda.archs())
    except (build.CannotBuild, build.cuda.NoCuda):
        return ""
    return "the library that is there was built from these sources and has this GPU's code" if enough else ""


def _plans(part: Path, dry_run: bool, interpreted: dict[str, str]) -> Step:
    """Every plan in a process of its own, before anything that a broken one could break."""
    device = ["--device", "cpu"] if dry_run else []
    return Step("plans", ["-m", "peft_fast.benchmarks.plans", *device, "--json", str(part)], extra=interpreted)


def _tests(name: str, what: list[str], dry_run: bool, interpreted: dict[str, str] | None = None) -> Step:
    """A part of the test-suite on the device: every plan and dtype that is live there."""
    if not (ROOT / "tests" / "ops").is_dir():
        return Step(name, [], "the tests are in a clone of the repository, not in an installed package")
    if not importlib.util.find_spec("pytest"):
        return Step(name, [], "pytest is not installed")
    # not the project's own options: they need plugins that a GPU machine may not have
    command = ["-m", "pytest", *what, "-q", "-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider"]
    command += ["--maxfail=20", "-m", "not slow"]
    if dry_run:
        backends = "(torch or triton)" if interpreted else "torch"
        few = f"({' or '.join(A_FEW)}) and {backends}" if name == "contract" else "manual_seed_reproduces"
        return Step(name, [*command, "-k", few], extra=interpreted or {})
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(MOST_WORKERS, machine.cores()))]
    # what one worker compiles the others need not; the variable is for what is imported before the option is read
    cache = os.environ.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton" / "cache")
    return Step(name, [*command, "--device", "cuda"], extra={"TESTS_DEVICE": "cuda", "TRITON_CACHE_DIR": cache})


def _tune(part: Path, interpreted: dict[str, str], dry_run: bool) -> Step:
    command = ["-m", "peft_fast", "tune", "--json", str(part)]
    if not importlib.util.find_spec("triton"):
        return Step("tune", command, "triton is not installed")
    if dry_run and not interpreted:
        return Step("tune", command, machine.no_interpreter())
    return Step("tune", [*command, *(["--dry-run"] if dry_run else [])], extra=interpreted)


def _sanitizer(tool: str, dry_run: bool, interpreted: dict[str, str]) -> Step:
    """compute-sanitizer over a few awkward calls of each backend and plan."""
    subset = ["-m", "peft_fast.benchmarks.sanitize"]
    if dry_run:
        skip = "" if tool == "memcheck" else "a dry run has no GPU"
        return Step(tool, [*subset, "--device", "cpu"], skip, interpreted)
    places = (shutil.which("compute-sanitizer"), *(p / "bin" / "compute-sanitizer" for p in _cuda_homes()))
    found = next((str(place) for place in places if place and Path(place).is_file()), None)
    if not found:
        return Step(tool, [], "compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    # memory that torch's allocator hands out again would hide what is read after its end
    return Step(tool, [found, *options, sys.executable, *subset], extra={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def _cuda_homes() -> list[Path]:
    nvcc = shutil.which("nvcc")
    return [*([Path(nvcc).resolve().parent.parent] if nvcc else []), Path("/usr/local/cuda")]
