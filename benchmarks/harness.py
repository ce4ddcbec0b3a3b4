"""Inputs and providers in, honest figures out: gate, interleave, pair, repeat until the A/A pair agrees.

A benchmark declares cases; a case builds providers; a provider is a few callables that run in order (forward,
backward, ...). Every figure is a median over rounds; in a round each provider runs once, in rotating
order; ratios are taken within a round. The baseline runs twice a round: the ratio of the two must be 1.00
within its own interval, otherwise the row gets more rounds and, if that does not help, is marked noisy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from peft_fast import dispatch, settings
from peft_fast.errors import DataError, PeftFastError, fail

from . import clock, machine, memory, stats
from .criterion import Verdict

SCHEMA = "peft_fast.bench/1"
AGAIN = " (again)"


class GateError(PeftFastError, ArithmeticError):
    """A provider's results are not as good as stock's, so it has no speed to report."""


class NotForThese(PeftFastError):
    """A provider that is not made for these tensors or this device, and says so: nothing has failed."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user may narrow; empty tuples mean the benchmark's own choice."""

    scale: str = "full"
    device: str = "cpu"
    threads: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    dropouts: tuple[float, ...] = ()
    repeats: int = 0
    deadline: float = math.inf  # time.monotonic() after which no case is started
    gate_only: bool = False
    peers: bool = False  # other projects' functions too, where they import
    without: tuple[str, ...] = ()  # plans to leave alone, "cuda fused"


@dataclasses.dataclass
class Provider:
    """One way to do the work. `phases` run in order; the first is the forward, whose saved bytes count."""

    name: str
    phases: dict[str, Callable[[], object]]
    kept: Sequence[Tensor] = ()  # parameters and buffers: alive anyway, not counted as saved
    gate: Callable[[], dict[str, Verdict]] | None = None
    reset: Callable[[], object] = lambda: None  # before each run, not timed
    optional: bool = False  # refused, failing or too large, it leaves the row instead of taking it along
    backlog: float = 1e-3  # seconds of spinning before a sample on a GPU; 0: timed as it is launched
    starved: bool = False  # the GPU waited for the host in some sample, whatever the backlog


@dataclasses.dataclass
class Case:
    """One row: `settings` describe it in the result, `providers()` builds it, ratios are to `baseline`."""

    title: str
    settings: dict
    providers: Callable[[], list[Provider]]
    threads: int
    seconds: float = 20.0  # for its rounds; reached, it ends after MIN_ROUNDS
    baseline: str = "frozen"
    against: str = "stock"
    as_used: bool = False  # few tokens go where a user's settings send them, not always to our kernels
    smaller: Case | None = None  # what to measure instead where the memory is not enough


MIN_ROUNDS = 8
REPEATS = {"full": 20, "quick": 6, "tiny": 3}
SAMPLE_S = {"full": 0.004, "quick": 0.002, "tiny": 0.0}  # shorter calls are repeated within a sample
MOST_RUNS = {"cpu": 1000, "cuda": 10}  # in a sample; a GPU's queue holds about a thousand launches


def run(bench: str, cases: Sequence[Case], options: Options, show, save: Path | None = None) -> dict:
    """Measures the cases; returns the document that is also written to `save` after each case."""
    device = torch.device(options.device)
    document = {
        "schema": SCHEMA,
        "bench": bench,
        "scale": options.scale,
        "machine": machine.header(device),
        "rows": [],
        "refused": [],  # {"title", "reason"}: a gate said no, nothing was timed
        "skipped": [],  # titles the deadline or the memory left no room for
    }
    show.header(document)
    with show.progress(len(cases)) as progress:
        for case in cases:
            while case:
                case = _one(case, options, document, progress, show)
            if failed := dispatch.failures():
                document["kernel_failures"] = failed  # torch ran in their place
            if save:
                write(save, document)
    return document


def _one(case: Case, options: Options, document: dict, progress, show) -> Case | None:
    """Measures a case into the document; a smaller case to try instead, if the memory was not enough."""
    if time.monotonic() > options.deadline:
        document["skipped"].append(case.title)
        return None
    progress.case(case.title)
    reason = ""
    try:
        row = measure(case, options, progress)
    except GateError as error:
        reason = str(error)
    except torch.cuda.OutOfMemoryError:
        document["skipped"].append(f"{case.title}: out of memory")
        torch.cuda.empty_cache()
        return case.smaller
    except RuntimeError as error:
        if options.device == "cpu":
            raise
        # a kernel that fails costs its row, not the rows after it
        reason = f"given: {case.title}\nneeded: kernels that run\ndo: {_first_line(error)}"
    if reason:
        document["refused"].append({"title": case.title, "reason": reason})
        show.refused(case.title, reason)
        return None
    for name, why in row.get("left_out", {}).items():
        if name.startswith("peft_fast") and name not in row["not_for_these"]:
            document["refused"].append({"title": f"{case.title}: {name}", "reason": why})
    document["rows"].append(row)
    show.row(row)
    return None


def measure(case: Case, options: Options, progress) -> dict:
    """One case -> one row of the document; raises GateError before anything is timed."""
    device = torch.device(options.device)
    with _threads(case.threads), _few_tokens(case.as_used):
        providers = case.providers()
        facts = {**case.settings, "threads": case.threads}
        row = {"title": case.title, "settings": facts, "baseline": case.baseline}
        left_out: dict[str, str] = {}
        row["not_for_these"] = []  # of those left out, the ones where nothing has failed
        row["match"] = _each([p for p in providers if p.gate], gate, left_out, row["not_for_these"])
        if options.gate_only:
            return row | ({"left_out": left_out} if left_out else {})
        providers = [p for p in providers if p.name not in left_out]
        row["bytes"] = _each(providers, partial(_bytes, device=device), left_out, row["not_for_these"])
        providers = [p for p in providers if p.name not in left_out]
        first = next(p for p in providers if p.name == case.baseline)
        providers.append(dataclasses.replace(first, name=first.name + AGAIN))
        inner = {p.name: _warm(p, device, options.scale) for p in providers}
        samples = {p.name: {} for p in providers}
        repeats = options.repeats or REPEATS[options.scale]
        rounds = 0
        # one time in twenty an A/A pair is outside by chance: pool more rounds before calling it noise
        for _ in range(1 if options.scale == "tiny" else 3):
            end = min(time.monotonic() + case.seconds, options.deadline)
            rounds = _rounds(providers, inner, samples, device, rounds, repeats, end, progress)
            twins = (samples[name]["total"]["wall"] for name in (first.name + AGAIN, first.name))
            aa = stats.ratio(*twins)
            if stats.contains(aa, 1.0) or time.monotonic() > options.deadline:
                break
    row["rounds"] = rounds
    if left_out:
        row["left_out"] = left_out  # provider -> why it has no figures
    if starved := [p.name for p in providers if p.starved]:
        row["starved"] = starved  # their times hold waiting for the host
    row["aa"] = {"ratio": _short(aa), "ok": stats.contains(aa, 1.0)}
    row["providers"] = {
        p.name: _figures(samples, p.name, case)
        for p in providers
        if p.name != first.name + AGAIN  # its figure is the A/A ratio
    }
    return row


def _each(
    providers: Sequence[Provider], ask: Callable[[Provider], object], left_out: dict[str, str], not_for: list[str]
) -> dict:
    """name -> ask(provider); an optional provider that fails goes to `left_out` with its reason.

    So does one that is not made for these tensors, and its name to `not_for` too.
    """
    found = {}
    for provider in providers:
        try:
            found[provider.name] = ask(provider)
        except (PeftFastError, RuntimeError, TypeError, ValueError) as error:
            if not provider.optional:
                raise
            left_out[provider.name] = _first_line(error) if not isinstance(error, PeftFastError) else str(error)
            not_for += [provider.name] * isinstance(error, NotForThese)
    return found


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def gate(provider: Provider) -> float:
    """Largest error as a fraction of the allowed one; GateError when any output is refused."""
    verdicts = provider.gate()
    wrong = {name: v.reason for name, v in verdicts.items() if not v}
    if wrong:
        fail(
            GateError,
            f"provider {provider.name!r}: " + "; ".join(f"{name}: {why}" for name, why in wrong.items()),
            "results within the numeric criterion, judged against float64 and stock PEFT",
            "run `python -m peft_fast doctor`; until it is right there is nothing to time",
        )
    return round(max(v.match for v in verdicts.values()), 3)


def _figures(samples: dict, name: str, case: Case) -> dict:
    """phase -> median and quartiles in ms, CPU ms, and paired ratios [mid, low, high]."""
    figures = {}
    for phase, own in samples[name].items():
        q1, q3 = stats.quartiles(own["wall"])
        figures[phase] = {
            "ms": _ms(stats.median(own["wall"])),
            "q1_ms": _ms(q1),
            "q3_ms": _ms(q3),
            "cpu_ms": _ms(stats.median(own["cpu"])),
        }
        base = samples[case.baseline].get(phase)
        if base:
            figures[phase]["ratio"] = _short(stats.ratio(own["wall"], base["wall"]))
            figures[phase]["cpu_ratio"] = _short(stats.ratio(own["cpu"], base["cpu"]))
        if case.against in samples and phase in samples[case.against]:
            figures[phase]["speedup"] = _short(stats.ratio(samples[case.against][phase]["wall"], own["wall"]))
    return figures


def _rounds(providers, inner, samples, device, done, repeats, end, progress) -> int:
    """Adds up to `repeats` rounds to `samples`; returns how many there are now."""
    gc.collect()
    gc.disable()
    try:
        for count in range(1, repeats + 1):
            for i in stats.rotation(len(providers), done + count - 1):
                _sample(providers[i], inner[providers[i].name], device, samples[providers[i].name])
            progress.round(count, repeats)
            if time.monotonic() > end and count >= min(MIN_ROUNDS, repeats):
                break
    finally:
        gc.enable()
    return done + count


def _sample(provider: Provider, inner: int, device: torch.device, samples: dict) -> None:
    """Runs the provider `inner` times and appends seconds per run to samples[phase]["wall" | "cpu"]."""
    for _ in range(4):
        clocks = clock.Device(device, provider.backlog) if device.type == "cuda" else clock.Host()
        for _ in range(inner):
            provider.reset()
            for phase, fn in provider.phases.items():
                clocks.start()
                fn()
                clocks.stop(phase)
        spans = clocks.read()
        if not clocks.starved or provider.starved:
            break
        provider.backlog = clock.longer(clocks)
    provider.starved |= clocks.starved
    wall = dict.fromkeys(provider.phases, 0.0)
    cpu = dict.fromkeys(provider.phases, 0.0)
    for phase, w, c in spans:
        wall[phase] += w / inner
        cpu[phase] += c / inner
    wall["total"], cpu["total"] = sum(wall.values()), sum(cpu.values())
    for phase in wall:
        kept = samples.setdefault(phase, {"wall": [], "cpu": []})
        kept["wall"].append(wall[phase])
        kept["cpu"].append(max(cpu[phase], 1e-9))


def _warm(provider: Provider, device: torch.device, scale: str) -> int:
    """One more warm-up run after those of _bytes; returns how many runs make one sample."""
    once: dict = {}
    _sample(provider, 1, device, once)
    seconds = max(once["total"]["wall"][0], 1e-6)
    return max(1, min(MOST_RUNS[device.type], math.ceil(SAMPLE_S[scale] / seconds)))


def _bytes(provider: Provider, device: torch.device) -> dict:
    """Saved and peak bytes of one run, taken after a first one, so that what is made once does not count."""
    forward, *rest = provider.phases.values()

    def everything() -> None:
        for fn in provider.phases.values():
            fn()

    provider.reset()
    everything()
    provider.reset()
    saved = memory.saved_bytes(forward, provider.kept)
    for fn in rest:
        fn()
    provider.reset()
    return {"saved": saved, "peak": memory.peak_bytes(everything, device)}


@contextlib.contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _few_tokens(as_used: bool) -> contextlib.AbstractContextManager:
    """The command counts every call as large enough; ``as_used``: not this time."""
    return settings.override(min_tokens=settings.Settings().min_tokens) if as_used else contextlib.nullcontext()


def write(path: Path, document: dict) -> None:
    """Writes a document; a half-written file never replaces a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(document, indent=1) + "\n")
    part.replace(path)


def read(path: Path) -> dict:
    """A document of this schema; DataError otherwise."""
    do = "write it with `python -m peft_fast bench ... --json FILE`"
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        fail(DataError, f"{path.name}: {error}", "a benchmark result in JSON", do, error)
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        fail(DataError, f"{path.name} with schema {schema!r}", f"schema {SCHEMA!r}", do)
    return document


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 4)


def _short(interval: Sequence[float]) -> list[float]:
    return [round(v, 4) for v in interval]
