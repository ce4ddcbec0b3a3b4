"""Times the tiles that kernels may be launched with, and the plans, on one device; keeps what is faster and right.

A kernel's tile depends on the rank and on whether there is a mask, so one tile must serve every (K, N): the one with
the least sum of times relative to the shipped tile's wins. The plan is chosen for each (K, N).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

LEAST_GAIN = 1.02  # less is noise
# the most expensive kernels first: time may end anywhere
ORDER = ("fused", "outer", "shrink_outer", "shrink", "expand", "decode")
WITHOUT_MASK = ("shrink_outer", "decode")
DECODED = 4  # tokens: what a kernel for few of them is timed with
LORA = "lora_linear"


class Job(NamedTuple):
    """What is tuned for: layers (K, N), tokens, ranks, dropouts, one dtype."""

    pairs: Sequence[tuple[int, int]]
    tokens: int
    ranks: Sequence[int]
    ps: Sequence[float]
    dtype: torch.dtype
    device: torch.device


class Choice(NamedTuple):
    """One entry of the tuning file, and what it replaces; `gain` is shipped time / chosen time."""

    op: str
    shape: str
    dtype: str
    shipped: object
    chosen: object
    gain: float
    tried: int
    refused: tuple[str, ...] = ()  # candidates that failed or computed something else, with the reason

    @property
    def changed(self) -> bool:
        return self.chosen != self.shipped

    def entry(self) -> dict:
        """As the tuning file holds it."""
        kind = {"plan": self.chosen} if self.op == LORA else {"tile": self.chosen._asdict()}
        return {"op": self.op, "shape": self.shape, "dtype": self.dtype, **kind, "gain": round(self.gain, 3)}


Measure = Callable[[Callable[[], object]], float]  # fn -> seconds


class Question(NamedTuple):
    """One choice to make: what it is about, and the work, given the choices made before it."""

    name: str
    answer: Callable[[Sequence[Choice]], Choice]


def tune(job: Job, measure: Measure, deadline: float, screen) -> list[Choice]:
    """Every choice there was time for; the screen hears of each before and after it is made."""
    made: list[Choice] = []
    asked = [*_tiles(job, measure), *_plans(job, measure)]
    for number, question in enumerate(asked, 1):
        if made and time.monotonic() > deadline:
            break
        screen.asked(question.name, number, len(asked))
        try:
            made.append(question.answer(made))
        except KeyboardInterrupt:  # what was found until now is kept
            break
        screen.row(made[-1], number, len(asked))
    return made


def overrides(made: Sequence[Choice]) -> dict:
    """The choices so far, as kernels and dispatch take them."""
    return {(c.op, c.shape, c.dtype): c.chosen for c in made}


def _tiles(job: Job, measure: Measure) -> Iterator[Question]:
    from peft_fast.kernels import tiles
    from peft_fast.kernels.device import target

    dtype = tiles.dtype_name(job.dtype)
    seen = set()
    for rank, p, op in itertools.product(job.ranks, job.ps, ORDER):
        if op in WITHOUT_MASK and p:
            continue
        if op == "shrink_outer" and rank > tiles.MOST_SHARED_RANK:
            continue  # past that rank the other kernels do its work
        shape = tiles.shape_class(op, job.tokens, *job.pairs[0], rank, p > 0)
        found = list(dict.fromkeys(tiles.candidates(op, shape, dtype, target().arch)))
        if (op, shape) in seen or len(found) == 1:
            continue
        seen.add((op, shape))
        work = partial(_tile, op, shape, dtype, found, rank, p, job, measure)
        yield Question(f"{op} {shape} {dtype}, {len(found)} tiles", work)


def _tile(op, shape, dtype, found, rank, p, job, measure, made) -> Choice:
    calls = [kernel(op, K, N, rank, p, job) for K, N in job.pairs]
    return _best(op, shape, dtype, found, calls, measure)


def _best(op: str, shape: str, dtype: str, found: list, calls: Sequence[Callable], measure: Measure) -> Choice:
    """calls: one a (K, N), each takes overrides; found: candidates, the shipped one first."""
    base, right = [], []
    for call in calls:
        right.append(call({(op, shape, dtype): found[0]}))
        base.append(measure(lambda call=call: call({(op, shape, dtype): found[0]})))
    best, ratio, refused = found[0], 1.0, []
    for tile in found[1:]:
        override = {(op, shape, dtype): tile}
        try:
            wrong = any(not _same(call(override), out) for call, out in zip(calls, right, strict=True))
            times = [] if wrong else [measure(lambda call=call: call(override)) for call in calls]  # noqa: B023
        except Exception as error:  # a tile that does not compile or launch here is no candidate
            refused.append(f"{label(tile)}: {type(error).__name__}")
            continue
        if wrong:
            refused.append(f"{label(tile)}: other results than the shipped tile")
            continue
        found_ratio = sum(t / b for t, b in zip(times, base, strict=True)) / len(times)
        if found_ratio < min(ratio, 1 / LEAST_GAIN):
            best, ratio = tile, found_ratio
    return Choice(op, shape, dtype, found[0], best, 1 / ratio, len(found), tuple(refused))


def kernel(op: str, K: int, N: int, r: int, p: float, job: Job) -> Callable[[dict], object]:
    """The launcher `op` on random tensors of a layer; what is returned takes overrides."""
    from peft_fast.kernels import lora_decode, lora_linear, skinny

    M, ranks, ps, one = job.tokens, (r,), (p,), (2.0,)
    seed = torch.zeros(1, dtype=torch.int64, device=job.device)
    x, A, g, B, HD = (partial(_draw, job, *shape) for shape in ((M, K), (r, K), (M, N), (N, r), (M, r)))
    if op == "shrink":
        return partial(_call, skinny.shrink, x(), A(True), seed, ranks, one, ps)
    if op == "shrink_outer":
        return partial(_call, skinny.shrink_outer, g(), B(True), HD(), ranks, one, torch.float32)
    if op == "outer":
        return partial(_call, skinny.outer, x(), HD(), seed, ranks, ps, torch.float32)
    if op == "expand":
        return partial(_call, lora_linear.expand, HD(), A(True), seed, ranks, ps, job.dtype)
    W = _draw(job, N, K)
    if op == "decode":
        return partial(_call, lora_decode.decode, _draw(job, DECODED, K), W, None, A(True), B(True), ranks, one, False)
    if p:  # only dx has the mask
        return partial(_call, lora_linear.fused, g(), W.t(), None, HD(), A(True).t(), seed, ranks, ps, job.dtype)
    return partial(_call, lora_linear.fused, x(), W, None, HD(), B(True), seed, ranks, ps, job.dtype)


def _call(launcher: Callable, *args: object) -> object:
    *args, overrides = args
    return launcher(*args, overrides=overrides)


def _draw(job: Job, rows: int, columns: int, adapter: bool = False) -> torch.Tensor:
    """Normal values in the job's dtype; adapters in float32, as PEFT keeps them, if kernels take them beside it."""
    dtype = torch.float32 if adapter and job.dtype != torch.float16 else job.dtype
    return torch.randn(rows, columns, device=job.device).to(dtype)


def _plans(job: Job, measure: Measure) -> Iterator[Question]:
    from peft_fast import dispatch
    from peft_fast.kernels import tiles

    dtype, known = tiles.dtype_name(job.dtype), dispatch.BACKEND_PLANS["triton"]
    for (K, N), rank, p in itertools.product(job.pairs, job.ranks, job.ps):
        shape = tiles.shape_class(LORA, job.tokens, K, N, rank, p > 0)
        work = partial(_plan, shape, dtype, known, K, N, rank, p, job, measure)
        yield Question(f"plan {shape} {dtype}, {len(known)} plans", work)


def _plan(shape, dtype, known, K, N, rank, p, job, measure, made) -> Choice:
    from peft_fast.backends.triton import lora_linear, tuning

    step, shipped = layer(K, N, rank, p, job)
    names = [shipped, *(plan for plan in known if plan != shipped)]
    with tuning.using(overrides(made)):
        times, refused = {}, []
        for plan in names:
            before = lora_linear.fallbacks()
            try:
                step(plan)
                if lora_linear.fallbacks() > before:  # torch ran it: its time is another plan's
                    refused.append(f"{plan}: a kernel failed")
                    continue
                times[plan] = measure(lambda plan=plan: step(plan))
            except Exception as error:  # the other plans still count
                refused.append(f"{plan}: {type(error).__name__}")
    base = times.get(shipped, math.inf)
    best = min(times, key=times.get, default=shipped)
    if best != shipped and base / times[best] < LEAST_GAIN:
        best = shipped
    gain = base / times[best] if math.isfinite(base) and best in times else 1.0
    return Choice(LORA, shape, dtype, shipped, best, gain, len(names), tuple(refused))


def layer(K: int, N: int, r: int, p: float, job: Job) -> tuple[Callable[[str], object], str]:
    """(forward and backward of one adapted layer in a plan of the triton backend, the plan shipped for it)."""
    from peft_fast.backends.triton import tuning
    from peft_fast.ops import Adapter, lora_linear

    x, W, g = _draw(job, job.tokens, K).requires_grad_(), _draw(job, N, K), _draw(job, job.tokens, N)
    A, B = _draw(job, r, K, adapter=True).requires_grad_(), _draw(job, N, r, adapter=True).requires_grad_()

    def step(plan: str) -> None:
        y = lora_linear(x, W, None, [Adapter(A, B, 2.0, p)], backend="triton", plan=plan)
        torch.autograd.grad(y, (x, A, B), g)

    with tuning.using({}):
        return step, tuning.plan(N, K, r, p > 0, job.dtype, 0)


def _same(out: object, other: object) -> bool:
    """Is one tile's result another's, but for the order of summation? A row or column left out is a hundredth."""
    pairs = [(out, other)] if isinstance(out, torch.Tensor) else zip(out, other, strict=True)
    for a, b in pairs:
        eps = max(torch.finfo(a.dtype).eps, 1e-3)
        a, b = a.double(), b.double()
        if not (a - b).norm() <= eps * b.norm():
            return False
    return True


def label(choice: object) -> str:
    """A plan's name, or a tile in one short word: 128×256×64 r32 w8 s3 tma."""
    if isinstance(choice, str):
        return choice
    sizes = "×".join(str(size) for size in (choice.BM, choice.BN, choice.BK) if size)
    flags = [name for name in ("persistent", "tma") if getattr(choice, name, 0)]
    ranks = [] if getattr(choice, "BR", 64) == 64 else [f"r{choice.BR}"]
    return " ".join([sizes, *ranks, f"w{choice.num_warps}", f"s{choice.num_stages}", *flags])
