"""The numeric contract as a harness: ours may be no less accurate than PEFT's own sequence of torch calls.

truth: the reference in float64 on the same rounded inputs and the same dropout mask.
stock: PEFT's forward, call by call, in the dtypes PEFT would use (tests/stock.py).
Small outputs are drawn again until the criterion's statistics mean something.
An op is a class of cases: tests/cases.py for lora_linear, tests/cases_<op>.py for the others.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch

from benchmarks.criterion import ENOUGH, Verdict, check
from peft_fast import backends, dispatch, native, ops, settings
from peft_fast.ops import Adapter, draw_seed, dropout_mask
from tests.cases import CASES, Case
from tests.inputs import DTYPES, Dtypes, Tensors, place

MOST_DRAWS = 32
# `pytest --device cuda` moves the problems, stock and the truth to the GPU
DEVICE = torch.device(os.environ.get("TESTS_DEVICE", "cpu"))
GPU_BACKENDS = ("triton", "cuda")


class Provider(NamedTuple):
    """One way to run an op: a backend, a plan of the torch one, an instruction set of the compiled one."""

    backend: str
    plan: str | None = None
    isa: str | None = None

    def __str__(self) -> str:
        return "-".join(part for part in self if part)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Runs what is inside on this provider's instruction set."""
        if self.isa is None:
            yield
            return
        before = native.isa()
        native.set_isa(self.isa)
        try:
            yield
        finally:
            native.set_isa(before)

    def __call__(self, *args: object, op: str = "lora_linear", **options: object) -> torch.Tensor:
        plan = {} if op in dispatch.UNPLANNED else {"plan": self.plan}
        return getattr(ops, op)(*args, backend=self.backend, **plan, **options)

    @property
    def rounds_adapters(self) -> bool:
        """True where float32 A and B are rounded to the activations' dtype before any use (exact=False)."""
        return self.backend in ("torch", *GPU_BACKENDS) or self.isa in ("avx512_bf16", "amx")


@lru_cache
def isas() -> list[str]:
    """Instruction sets the compiled kernels can use on this machine."""
    usable = []
    if native.load():
        before = native.isa()
        usable = [name for name in settings.ISAS if name != "auto" and native.set_isa(name) == name]
        native.set_isa(before)
    return usable


def shows(provider: Provider, dtypes: str, thoroughly: bool) -> bool:
    """Whether a row runs compiled code that no other row does.

    float32 runs in one engine from avx512 on: it sees the one in use, bfloat16 the others. What is not asked
    ``thoroughly`` is written over engines that lora_linear's rows try: it sees the narrowest and the widest.
    """
    if provider.isa is None:
        return True
    live = isas()
    if DTYPES[dtypes].compute == torch.float32:
        live = [isa for isa in live if "512" not in isa or isa == live[-1]]
    return provider.isa in (live if thoroughly else (live[0], live[-1]))


def providers(op: str = "lora_linear") -> list:
    """Every provider of an op as a pytest parameter; one whose backend is not live is skipped with its reason."""
    found = [Provider("reference"), *(Provider("torch", plan) for plan in _plans("torch", op))]
    if DEVICE.type == "cpu" and backends.has("cpu", op):
        found += [Provider("cpu", isa=isa) for isa in isas()] or [Provider("cpu")]
    found += gpu_providers(op)
    why = {name: reason for name, live, reason in dispatch.backends() if not live}
    required = os.environ.get("CI") == "true"
    return [
        pytest.param(p, id=str(p), marks=pytest.mark.skip(why[p.backend]) if p.backend in why and not required else ())
        for p in found
    ]


def each(*cases: Case, only: tuple[str, ...] | None = None, every_isa: bool = True) -> pytest.MarkDecorator:
    """The parameters ``provider`` and ``case``: every provider of each case's op, or those of the backends ``only``.

    Unless ``every_isa``, the compiled kernels run on the best instruction set alone.
    """
    best = isas()[-1:]
    rows = [
        pytest.param(*p.values, case, id=f"{p.id}-{case.name}", marks=p.marks)
        for case in cases
        for p in providers(case.op)
        if only is None or p.values[0].backend in only
        if every_isa or p.values[0].isa in (None, *best)
    ]
    return pytest.mark.parametrize(("provider", "case"), rows)


def gpu_providers(op: str = "lora_linear") -> list[Provider]:
    """The plans of the kernels that take tensors of DEVICE: on the CPU those of Triton, where it is interpreted."""
    x = torch.empty(1, 1, device=DEVICE)
    refusals = {"triton": dispatch.triton_refuses, "cuda": dispatch.cuda_refuses}
    taking = [name for name in GPU_BACKENDS if backends.has(name, op) and not refusals[name](x, x.dtype, x)]
    return [Provider(name, plan) for name in taking for plan in _plans(name, op)]


def _plans(backend: str, op: str) -> tuple[str, ...]:
    """The plans that differ for an op: an embedding has no base product, torch's block is made of its group."""
    plans = dispatch.BACKEND_PLANS[backend]
    return plans[:1] if op in dispatch.UNPLANNED or (op, backend) == ("lora_mlp", "torch") else plans


def takes(provider: Provider, dtypes: Dtypes, exact: bool = False) -> str:
    """Why this provider does not serve these dtypes; empty when it does."""
    x, W = torch.empty(1, 1, device=DEVICE), torch.empty(1, 1, dtype=dtypes.base, device=DEVICE)
    exact = exact or dtypes.exact
    if provider.backend in GPU_BACKENDS:
        refuses = dispatch.triton_refuses if provider.backend == "triton" else dispatch.cuda_refuses
        return refuses(x, dtypes.compute, W, [torch.empty(0, 1, dtype=dtypes.adapter, device=DEVICE)], exact)
    if provider.backend != "cpu" or not native.load():
        return ""  # a missing extension is not skipped here: providers() has decided on it
    return dispatch.cpu_refuses(x, dtypes.compute, W, exact=exact)


@dataclass
class Problem:
    """Leaf tensors in NaN-filled buffers, an output gradient for each output, and the seed."""

    case: Case
    dtypes: Dtypes
    tensors: Tensors
    gs: Tensors  # by the name of the output
    buffers: list[tuple[torch.Tensor, torch.Tensor, int]]  # memory, its bits, its version
    seed: int
    masks: list[torch.Tensor | None]

    @property
    def g(self) -> torch.Tensor:
        """The only output's gradient."""
        (g,) = self.gs.values()
        return g

    def adapters(self, t: Tensors) -> list[Adapter]:
        return self.case.layer.sibling(t).adapters

    def run(
        self,
        forward: Callable[[Tensors], torch.Tensor | tuple[torch.Tensor, ...]],
        tensors: Tensors,
        gs: Tensors | torch.Tensor | None = None,
    ) -> Tensors:
        """forward(tensors) -> the outputs, and the gradient of every tensor that wants one."""
        auto = self.dtypes.autocast
        with torch.autocast(DEVICE.type, dtype=auto or torch.bfloat16, enabled=auto is not None and gs is None):
            ys = forward(tensors)
        ys = dict(zip(self.gs, ys if isinstance(ys, (tuple, list)) else [ys], strict=True))
        wanted = {name: t for name, t in tensors.items() if t.requires_grad}
        gs = [gs] if isinstance(gs, torch.Tensor) else (self.gs if gs is None else gs).values()
        if not wanted:
            return {name: y.detach() for name, y in ys.items()}
        grads = torch.autograd.grad(tuple(ys.values()), list(wanted.values()), tuple(gs), allow_unused=True)
        found = {f"d{n}": d for n, d in zip(wanted, grads, strict=True) if d is not None}
        return {name: y.detach() for name, y in ys.items()} | found

    def untouched(self) -> bool:
        """True while the inputs, and the sentinels around them, hold the bits they were made with."""
        return all(
            torch.equal(_bits(memory), before) and memory._version == version
            for memory, before, version in self.buffers
        )


def problem(case: Case, dtypes: Dtypes, draw: int = 0) -> Problem:
    """A fresh problem, the same for the same arguments."""
    seed = zlib.crc32(case.name.encode()) % 10_000 + 10_007 * draw
    random = torch.Generator().manual_seed(seed)
    buffers: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def make(
        name: str, shape: tuple[int, ...], dtype: torch.dtype, scale: float, leaf: bool = True, mean: float = 0.0
    ) -> torch.Tensor:
        if dtype in (torch.int32, torch.int64):
            values, leaf = torch.randint(int(scale), shape, generator=random, dtype=dtype, device="cpu"), False
        else:
            values = torch.randn(shape, generator=random, dtype=torch.float64, device="cpu") * scale + mean
            values = (values.abs() if case.positive else values).to(dtype)
        # leaves of one kind share a layout: "gate_A0" has that of "A"
        kind = name.rpartition("_")[2].rstrip("0123456789")
        view, buffer = place(values.to(DEVICE), case.layout.get(kind, "plain"))
        buffers.append((buffer, _bits(buffer).clone(), buffer._version))
        return view.detach().requires_grad_(leaf)

    kinds = {"base": dtypes.base, "x": dtypes.x, "adapter": dtypes.adapter, "ids": getattr(case, "ids_dtype", None)}
    kinds["magnitude"] = dtypes.adapter
    tensors = {
        name: make(name, leaf.shape, kinds[leaf.kind], leaf.scale, leaf.trains, leaf.mean)
        for name, leaf in case.leaves()
    }
    dtype = dtypes.base if case.op.endswith(("_embedding", "_experts")) else dtypes.compute
    gs = {
        name: make("g", shape, dtype, 1e-5 if case.young else 1.0, leaf=False) for name, shape in case.outputs().items()
    }
    torch.manual_seed(seed)
    dropouts = case.dropouts()
    seeds = draw_seed(len(dropouts), DEVICE) if any(p > 0 for p, _ in dropouts) else None
    masks = [
        dropout_mask(seeds[i], torch.Size(shape[:-1]).numel(), shape[-1], p).view(shape) if p > 0 else None
        for i, (p, shape) in enumerate(dropouts)
    ]
    return Problem(case, dtypes, tensors, gs, buffers, seed, masks)


def ours(problem: Problem, provider: Callable[..., torch.Tensor], exact: bool = False) -> Tensors:
    """What the provider computes, from the problem's own awkward views."""
    options = {"exact": True} if exact else {}
    return problem.run(lambda t: call(problem, provider, t, **options), problem.tensors)


def call(
    problem: Problem,
    provider: Callable[..., torch.Tensor],
    tensors: Tensors | None = None,
    seed: int | None = None,
    **options: object,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """The outputs alone, with the problem's masks, or those of another seed."""
    torch.manual_seed(problem.seed if seed is None else seed)
    return problem.case.ours(provider, problem.tensors if tensors is None else tensors, **options)


def stock(problem: Problem, round_adapters: bool = False) -> Tensors:
    """What PEFT computes: its own defaults, or with the adapters held in the activations' dtype."""
    tensors = problem.tensors
    if round_adapters:
        low, kinds = problem.dtypes.compute, dict(problem.case.leaves())
        tensors = {
            n: t.detach().to(low).requires_grad_() if kinds[n].kind == "adapter" else t for n, t in tensors.items()
        }
    return problem.run(lambda t: problem.case.stock(t, problem.masks), tensors)


def truth(problem: Problem, round_adapters: bool = False) -> Tensors:
    """The reference in float64 on the inputs as the compute dtype rounds them."""
    low, kinds = problem.dtypes.compute, dict(problem.case.leaves())

    def widen(name: str, t: torch.Tensor) -> torch.Tensor:
        kind = kinds[name].kind
        if kind == "ids":
            return t
        keeps = (
            problem.case.op.endswith("_embedding") or (kind == "adapter" and not round_adapters) or kind == "magnitude"
        )
        rounded = t.detach() if keeps else t.detach().to(low)
        return rounded.double().requires_grad_(t.requires_grad)

    tensors = {n: widen(n, t) for n, t in problem.tensors.items()}
    gs = {name: g.double() for name, g in problem.gs.items()}
    return problem.run(lambda t: problem.case.truth(t, problem.masks, problem.dtypes), tensors, gs)


def roundings(case: Case) -> int:
    """Independent roundings that an output hangs on, at least: the elements of the smallest one."""
    return max(1, min(case.roundings()))


def draws(case: Case) -> int:
    """How often a case is drawn so that its smallest output fills the statistics."""
    return min(MOST_DRAWS, -(-ENOUGH // roundings(case)))


def answers(case: Case, dtypes: str, round_adapters: bool) -> tuple[list[Problem], list[Tensors], list[Tensors]]:
    """(problems, stock, truth) of every draw of one row, shared by the providers."""
    return _answers(case, dtypes, round_adapters, draws(case))


@lru_cache(maxsize=4)
def _answers(
    case: Case, dtypes: str, round_adapters: bool, count: int
) -> tuple[list[Problem], list[Tensors], list[Tensors]]:
    problems = [problem(case, DTYPES[dtypes], i) for i in range(count)]
    return (
        problems,
        [stock(p, round_adapters) for p in problems],
        [truth(p, round_adapters) for p in problems],
    )


def judge(
    case: Case, outs: list[Tensors], stocks: list[Tensors], truths: list[Tensors], dtype: torch.dtype | None = None
) -> dict[str, Verdict]:
    """One verdict for each output and gradient, over all draws together."""
    assert set(outs[0]) == set(truths[0]) == set(stocks[0])

    def pooled(many: list[Tensors], name: str) -> torch.Tensor:
        return torch.cat([one[name].reshape(-1) for one in many])

    known = roundings(case) * len(outs)
    return {n: check(pooled(outs, n), pooled(stocks, n), pooled(truths, n), dtype, known) for n in outs[0]}


def verdicts(
    provider: Callable[..., torch.Tensor], case: Case, dtypes: str, round_adapters: bool, exact: bool = False
) -> dict[str, Verdict]:
    """The contract for one row of the table; also that inputs and their surroundings keep their bits."""
    problems, stocks, truths = answers(case, dtypes, round_adapters)
    outs = [ours(p, provider, exact) for p in problems]
    for p, out, other in zip(problems, outs, stocks, strict=True):
        assert p.untouched(), "an input, or memory around it, was written to"
        for name in p.gs:
            assert out[name].dtype == other[name].dtype and out[name].shape == other[name].shape, name
        for name, t in p.tensors.items():
            if t.requires_grad:
                assert out[f"d{name}"].dtype == t.dtype and out[f"d{name}"].shape == t.shape, f"d{name}"
    # gradients of rounded adapters are float32 sums of rounded products: the products' precision counts
    return judge(case, outs, stocks, truths, DTYPES[dtypes].compute if round_adapters else None)


def default_verdicts(provider: Provider, case: Case, dtypes: str) -> dict[str, Verdict]:
    """The contract of the default mode: adapters rounded for the truth too where this provider rounds them."""
    with provider.active():
        rounded = DTYPES[dtypes].mixed and not DTYPES[dtypes].exact
        rounded = rounded and provider.rounds_adapters and case.rounds_adapters
        return verdicts(provider, case, dtypes, rounded)


def failures(found: dict[str, Verdict]) -> dict[str, str]:
    """The outputs that fail the criterion, and why."""
    return {name: verdict.reason for name, verdict in found.items() if not verdict}


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch.empty and its kin hand out is full of NaN, in Python and in compiled operators."""
    flags = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(flags[0])
        torch.utils.deterministic.fill_uninitialized_memory = flags[1]


def rng_state() -> torch.Tensor:
    """State of the generator that draws the seeds."""
    return torch.get_rng_state() if DEVICE.type == "cpu" else torch.cuda.get_rng_state()


def set_rng_state(state: torch.Tensor) -> None:
    """Brings a state back."""
    torch.set_rng_state(state) if DEVICE.type == "cpu" else torch.cuda.set_rng_state(state)


def by_name(name: str) -> Case:
    """The row of tests/cases.py with this name."""
    return next(case for case in CASES if case.name == name)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bit patterns; NaN equals NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(t: torch.Tensor) -> torch.Tensor:
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16}.get(t.element_size())
    return t.detach() if whole is None or not t.is_floating_point() else t.detach().view(whole)
