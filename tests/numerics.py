"""The numeric contract as a harness: ours may be no less accurate than PEFT's own sequence of torch calls.

truth: the reference in float64 on the same rounded inputs and the same dropout mask.
stock: PEFT's lora.Linear.forward, call by call, in the dtypes PEFT would use.
Small outputs are drawn again until the criterion's statistics mean something.
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
import torch.nn.functional as F

from benchmarks.criterion import ENOUGH, Verdict, check
from peft_fast import dispatch, native, settings
from peft_fast.ops import Adapter, draw_seed, dropout_mask, lora_linear
from peft_fast.reference import lora_linear as reference
from tests.cases import CASES, DTYPES, Case, Dtypes, place

MOST_DRAWS = 32
# `pytest --device cuda` moves the problems, stock and the truth to the GPU
DEVICE = torch.device(os.environ.get("TESTS_DEVICE", "cpu"))
GPU_BACKENDS = ("triton", "cuda")
Tensors = dict[str, torch.Tensor]


class Provider(NamedTuple):
    """One way to run the op: a backend, a plan of the torch one, an instruction set of the compiled one."""

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

    def __call__(self, *args: object, **options: object) -> torch.Tensor:
        return lora_linear(*args, backend=self.backend, plan=self.plan, **options)

    @property
    def rounds_adapters(self) -> bool:
        """True where float32 A and B are rounded to the activations' dtype before any use (exact=False)."""
        return self.backend in ("torch", *GPU_BACKENDS) or self.isa in ("avx512_bf16", "amx")


def isas() -> list[str]:
    """Instruction sets the compiled kernels can use on this machine."""
    usable = []
    if native.load():
        before = native.isa()
        usable = [name for name in settings.ISAS if name != "auto" and native.set_isa(name) == name]
        native.set_isa(before)
    return usable


def providers() -> list:
    """Every provider as a pytest parameter; one whose backend is not live is skipped with its reason."""
    found = [Provider("reference"), Provider("torch", "accumulate"), Provider("torch", "augmented")]
    if DEVICE.type == "cpu":
        found += [Provider("cpu", isa=isa) for isa in isas()] or [Provider("cpu")]
    found += gpu_providers()
    why = {name: reason for name, live, reason in dispatch.backends() if not live}
    required = os.environ.get("CI") == "true"
    return [
        pytest.param(p, id=str(p), marks=pytest.mark.skip(why[p.backend]) if p.backend in why and not required else ())
        for p in found
    ]


def gpu_providers() -> list[Provider]:
    """The plans of the kernels that take tensors of DEVICE: on the CPU those of Triton, where it is interpreted."""
    x = torch.empty(1, 1, device=DEVICE)
    refusals = {"triton": dispatch.triton_refuses, "cuda": dispatch.cuda_refuses}
    taking = [name for name in GPU_BACKENDS if not refusals[name](x, x.dtype, x)]
    return [Provider(name, plan) for name in taking for plan in dispatch.BACKEND_PLANS[name]]


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
    """Leaf tensors x, W, bias, Ai, Bi, bi in NaN-filled buffers, an output gradient g, and the seed."""

    case: Case
    dtypes: Dtypes
    tensors: Tensors
    g: torch.Tensor
    buffers: list[tuple[torch.Tensor, torch.Tensor, int]]  # memory, its bits, its version
    seed: int
    masks: list[torch.Tensor | None]

    def adapters(self, t: Tensors) -> list[Adapter]:
        c = self.case
        scale = torch.tensor if c.tensor_scaling else float
        return [
            Adapter(t[f"A{i}"], t[f"B{i}"], scale(s), p, t.get(f"b{i}"))
            for i, (s, p) in enumerate(zip(c.scaling, c.p, strict=True))
        ]

    def run(
        self, forward: Callable[[Tensors], torch.Tensor], tensors: Tensors, g: torch.Tensor | None = None
    ) -> Tensors:
        """forward(tensors) -> y, and the gradient of every tensor that wants one."""
        auto = self.dtypes.autocast
        with torch.autocast(DEVICE.type, dtype=auto or torch.bfloat16, enabled=auto is not None and g is None):
            y = forward(tensors)
        wanted = {name: t for name, t in tensors.items() if t.requires_grad}
        grads = torch.autograd.grad(y, list(wanted.values()), self.g if g is None else g, allow_unused=True)
        return {"y": y.detach()} | {f"d{n}": d for n, d in zip(wanted, grads, strict=True) if d is not None}

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
    kinds = case.layout
    buffers: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def make(name: str, shape: tuple[int, ...], dtype: torch.dtype, scale: float, leaf: bool = True) -> torch.Tensor:
        values = torch.randn(shape, generator=random, dtype=torch.float64, device="cpu") * scale
        values = (values.abs() if case.positive else values).to(dtype).to(DEVICE)
        view, buffer = place(values, kinds.get(name, "plain"))
        buffers.append((buffer, _bits(buffer).clone(), buffer._version))
        return view.detach().requires_grad_(leaf)

    K, N = case.K, case.N
    t = {
        "x": make("x", (*case.lead, K), dtypes.x, 1.0),
        "W": make("W", (K, N) if case.transposed else (N, K), dtypes.base, K**-0.5, case.base_trains),
    }
    if case.bias:
        t["bias"] = make("bias", (N,), dtypes.base, 1.0)
    for i, r in enumerate(case.ranks):
        t[f"A{i}"] = make("A", (r, K), dtypes.adapter, K**-0.5)
        t[f"B{i}"] = make("B", (N, r), dtypes.adapter, r**-0.5 * (1e-4 if case.young else 1.0))
        if case.adapter_bias:
            t[f"b{i}"] = make("b", (N,), dtypes.adapter, 0.5)
    g = make("g", (*case.lead, N), dtypes.compute, 1e-5 if case.young else 1.0, leaf=False)
    torch.manual_seed(seed)
    seeds = draw_seed(len(case.ranks), DEVICE) if any(case.p) else None
    masks = [dropout_mask(seeds[i], case.M, K, p).view(*case.lead, K) if p > 0 else None for i, p in enumerate(case.p)]
    return Problem(case, dtypes, t, g, buffers, seed, masks)


def ours(problem: Problem, provider: Callable[..., torch.Tensor], exact: bool = False) -> Tensors:
    """What the provider computes, from the problem's own awkward views."""
    torch.manual_seed(problem.seed)
    options = {"transposed": problem.case.transposed, **({"exact": True} if exact else {})}
    return problem.run(
        lambda t: provider(t["x"], t["W"], t.get("bias"), problem.adapters(t), **options), problem.tensors
    )


def stock(problem: Problem, round_adapters: bool = False) -> Tensors:
    """What PEFT computes: its own defaults, or with the adapters held in the activations' dtype."""
    tensors = problem.tensors
    if round_adapters:
        low = problem.dtypes.compute
        tensors = {
            n: t.detach().to(low).requires_grad_() if n[0] in "ABb" and n != "bias" else t for n, t in tensors.items()
        }
    return problem.run(lambda t: peft_forward(t, problem.adapters(t), problem.masks, problem.case.transposed), tensors)


def peft_forward(t: Tensors, adapters: list[Adapter], masks: list, transposed: bool) -> torch.Tensor:
    """lora.Linear.forward of PEFT 0.21: casts, dropout, products and sums in its order."""
    x, W, bias = t["x"], t["W"], t.get("bias")
    result = F.linear(x, W.t() if transposed else W, bias)
    dtype = result.dtype
    for a, keep in zip(adapters, masks, strict=True):
        x = x.to(a.A.dtype)
        dropped = x
        if keep is not None:
            dropped = _stock_dropout(x, keep, a.p)
        result = result + F.linear(F.linear(dropped, a.A), a.B, a.bias) * a.scaling
    return result.to(dtype)


def _stock_dropout(x: torch.Tensor, keep: torch.Tensor, p: float) -> torch.Tensor:
    if p >= 1:
        return x * 0
    if x.is_cuda:
        # one kernel, which scales in float32 and rounds once
        return torch.where(keep, x.to(torch.promote_types(x.dtype, torch.float32)) * (1 / (1 - p)), 0).to(x.dtype)
    # on the CPU: noise in x's dtype, divided by 1 - p, times x
    return x * keep.to(x.dtype).div_(1 - p)


def truth(problem: Problem, round_adapters: bool = False) -> Tensors:
    """The reference in float64 on the inputs as the compute dtype rounds them."""
    low = problem.dtypes.compute

    def widen(name: str, t: torch.Tensor) -> torch.Tensor:
        adapter = name[0] in "ABb" and name != "bias"
        rounded = t.detach() if adapter and not round_adapters else t.detach().to(low)
        return rounded.double().requires_grad_(t.requires_grad)

    tensors = {n: widen(n, t) for n, t in problem.tensors.items()}
    masks = problem.masks
    return problem.run(
        lambda t: reference.forward(t["x"], t["W"], t.get("bias"), problem.adapters(t), masks, problem.case.transposed),
        tensors,
        problem.g.double(),
    )


def roundings(case: Case) -> int:
    """Elements of the smallest of y, dx, dA, dB and of H and D, on whose roundings the others hang."""
    return max(1, min([case.M * case.N, case.M * case.K, *(r * min(case.K, case.N, case.M) for r in case.ranks)]))


def draws(case: Case) -> int:
    """How often a case is drawn so that its smallest output fills the statistics."""
    return min(MOST_DRAWS, -(-ENOUGH // roundings(case)))


@lru_cache(maxsize=4)
def answers(case: Case, dtypes: str, round_adapters: bool) -> tuple[list[Problem], list[Tensors], list[Tensors]]:
    """(problems, stock, truth) of every draw of one row, shared by the providers."""
    problems = [problem(case, DTYPES[dtypes], i) for i in range(draws(case))]
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
        assert out["y"].dtype == other["y"].dtype and out["y"].shape == other["y"].shape
        for name, t in p.tensors.items():
            if t.requires_grad:
                assert out[f"d{name}"].dtype == t.dtype and out[f"d{name}"].shape == t.shape, f"d{name}"
    # gradients of rounded adapters are float32 sums of rounded products: the products' precision counts
    return judge(case, outs, stocks, truths, DTYPES[dtypes].compute if round_adapters else None)


def default_verdicts(provider: Provider, case: Case, dtypes: str) -> dict[str, Verdict]:
    """The contract of the default mode: adapters rounded for the truth too where this provider rounds them."""
    with provider.active():
        rounded = DTYPES[dtypes].mixed and not DTYPES[dtypes].exact and provider.rounds_adapters
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
