"""DoRA's ops by the numeric contract, and what is theirs alone: norms that nearly vanish, derivatives, faults."""

import sys
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peft_fast import native
from peft_fast.ops import Adapter, dora_linear, dora_norm
from tests import cases_dora_embedding, cases_dora_linear, numerics
from tests.inputs import DTYPES

OPS = [cases_dora_linear, cases_dora_embedding]
OF = {table: numerics.providers(table.CASES[0].op) for table in OPS}
F64 = type(DTYPES["f32"])(*[torch.float64] * 3)


def rows(pairs):
    return [
        pytest.param(*p.values, case, dtypes, id=f"{p.id}-{case.op}-{dtypes}-{case.name}", marks=p.marks)
        for table, case, dtypes in pairs
        for p in OF[table]
        if numerics.shows(*p.values, dtypes, thoroughly=case in table.CORNERS)
    ]


@pytest.mark.parametrize(("provider", "case", "dtypes"), rows((table, *row) for table in OPS for row in table.rows()))
def test_no_less_accurate_than_peft(provider, case, dtypes):
    if refusal := numerics.takes(provider, DTYPES[dtypes]):
        pytest.skip(refusal)
    assert not numerics.failures(numerics.default_verdicts(provider, case, dtypes))


def test_exact_keeps_the_float32_arithmetic_of_peft():
    for case in cases_dora_linear.CORNERS:
        for dtypes in ("bf16_f32_adapters", "f16_f32_adapters"):
            found = numerics.verdicts(numerics.Provider("torch"), case, dtypes, round_adapters=False, exact=True)
            assert not numerics.failures(found), (case.name, dtypes)


@pytest.mark.parametrize("p", [0.1, 0.4])
def test_more_tokens_than_one_span(p):
    """Both products run for some tokens at a time: the rows of the mask, of H and of Z go with them."""
    if not native.load():
        pytest.skip(native.reason())
    M, K, N = 517, 24, 16500  # a span is 256 tokens
    x, W = torch.randn(M, K), torch.randn(N, K)
    adapter, m = Adapter(torch.randn(3, K), torch.randn(N, 3), 0.5, p), torch.rand(N) + 1
    g, found = torch.randn(M, N), []
    for backend in ("cpu", "torch"):
        torch.manual_seed(3)
        leaves = [t.clone().requires_grad_() for t in (x, adapter.A, adapter.B, m)]
        y = dora_linear(leaves[0], W, None, Adapter(*leaves[1:3], 0.5, p), leaves[3], backend=backend)
        found.append([y, *torch.autograd.grad(y, leaves, g)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-5 * expected.abs().max().item(), rtol=0)


SIZES = [(1, 1, 1), (13, 257, 17), (49, 513, 33), (131, 300, 40), (200, 256, 64)]


@pytest.mark.parametrize("isa", numerics.isas())
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_norms_of_every_size(size, dtype, transposed, isa):
    """Blocks of rows, stretches of columns and panels of A that are not full."""
    N, K, r = size
    A, B, W = torch.randn(r, K), torch.randn(N, r), torch.randn(N, K).to(dtype)
    wide = torch.empty(K, N + 3) if transposed else torch.empty(N, K + 3)
    stored = wide.to(dtype)[:, :-3].copy_(W.t() if transposed else W)
    truth = torch.linalg.vector_norm(W.double() + 0.3 * (B.double() @ A.double()), dim=1)
    with numerics.Provider("cpu", isa=isa).active():
        norm = dora_norm(stored, Adapter(A, B, 0.3), transposed=transposed, backend="cpu")
    assert ((norm - truth).abs() <= 4 * torch.finfo(torch.float32).eps * truth).all()


@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter])
def test_the_compiled_norm_takes_parameters(kind):
    """A model's W is one: what runs must not hang on the class."""
    if not native.load():
        pytest.skip(native.reason())
    called = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.name())
            return func(*args, **kwargs or {})

    W, A, B = (kind(torch.randn(shape)) for shape in ((24, 32), (4, 32), (24, 4)))
    for backend, expected in ((None, "peft_fast::dora_norm"), ("torch", "aten::linalg_vector_norm")):
        called.clear()
        with Log():
            dora_norm(W, Adapter(A, B, 2.0), backend=backend)
        assert expected in called and "peft_fast::torch_dora_norm" not in called


NEAR = [0.0, 1e-2, 1e-4, 1e-6]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("left", NEAR)
def test_a_norm_that_nearly_vanishes(backend, transposed, left):
    """Half of the rows are W = −s·B·A but for a small part: no worse than PEFT's float32 sum of whole rows."""
    if backend == "cpu" and not native.load():
        pytest.skip(native.reason())
    A, B = torch.randn(8, 300), torch.randn(64, 8)
    W = torch.randn(64, 300)
    W[::2] = W[::2] * left - 0.7 * (B[::2] @ A)
    stored = W.t().contiguous() if transposed else W
    truth = torch.linalg.vector_norm(W.double() + 0.7 * (B.double() @ A.double()), dim=1)
    norm = dora_norm(stored, Adapter(A, B, 0.7), transposed=transposed, backend=backend)
    stock = torch.linalg.norm(W + 0.7 * (B @ A), dim=1)
    error, theirs = (norm - truth).abs(), (stock - truth).abs()
    eps = torch.finfo(torch.float32).eps
    assert (error <= 2 * theirs + 4 * eps * truth).all()
    assert norm.dtype is torch.float32 and not norm.requires_grad


def test_gram_alone_would_not_do():
    """The rows that are recomputed are why: without them the same case is off by more than half."""
    A, B = torch.randn(8, 300), torch.randn(64, 8)
    W = 1e-4 * torch.randn(64, 300) - 0.7 * (B @ A)
    truth = torch.linalg.vector_norm(W.double() + 0.7 * (B.double() @ A.double()), dim=1)
    squares, product = W.square().sum(1), W @ A.t()
    gram = squares + 1.4 * (product * B).sum(1) + 0.49 * ((B @ (A @ A.t())) * B).sum(1)
    assert ((gram.clamp_min(0).sqrt() - truth).abs() / truth).max() > 0.5


TINY = cases_dora_linear.Case("tiny", (2, 3), 5, 4, (2,), (0.4,), (0.7,), bias=True, base_trains=True, given_norm=True)
WORDS = cases_dora_embedding.Case("words", (7,), V=5, D=4, ranks=(2,), scale=1.7, base_trains=True, given_norm=True)
SMALL = [TINY, replace(TINY, p=(0.0,), transposed=True), replace(TINY, bias=False), WORDS]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.op}-{case.transposed if case is not WORDS else ''}")
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_derivatives(backend, case):
    p = numerics.problem(case, F64)
    names = [name for name, t in p.tensors.items() if t.requires_grad]

    def run(*leaves):
        return numerics.call(p, numerics.Provider(backend), p.tensors | dict(zip(names, leaves, strict=True)))

    leaves = [p.tensors[name] for name in names]
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def test_the_norm_is_a_constant():
    """Section 4.3 of the paper: A and B have no gradient through it."""
    p = numerics.problem(replace(cases_dora_linear.STEP, p=(0.0,)), F64)
    t = p.tensors
    W, bias, (adapter,), _ = p.case.layer.sibling(t)
    norm = dora_norm(W, adapter)
    for given in (None, norm, norm.clone().requires_grad_()):
        y = dora_linear(t["x"], W, bias, adapter, t["m"], norm=given)
        found = torch.autograd.grad(y, [adapter.A, adapter.B], p.g)
        fixed = t["x"] @ W.T + 2.0 * t["x"] @ adapter.A.T @ adapter.B.T
        expected = torch.autograd.grad(fixed * (t["m"] / norm) + bias, [adapter.A, adapter.B], p.g)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


FAULTS = {
    "scale of the columns forgotten": (lambda c: torch.ones_like(c), "y"),
    "scale off by 1 %": (lambda c: 1.01 * c, "y"),
    "a column's neighbour": (lambda c: c.roll(1), "y"),
}


@pytest.mark.parametrize("how, outputs", FAULTS.values(), ids=FAULTS)
def test_planted_faults_die(monkeypatch, how, outputs):
    case = replace(cases_dora_linear.STEP, name="planted", lead=(131,), N=72, p=(0.0,))
    module = sys.modules["peft_fast.ops.dora_linear"]
    factor = module._factor
    monkeypatch.setattr(module, "_factor", lambda m, norm: how(factor(m, norm)))
    found = numerics.failures(numerics.default_verdicts(numerics.Provider("torch"), case, "f32"))
    assert set(outputs.split()) <= set(found)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_faults_of_the_gradient_die(monkeypatch, backend, p):
    """The magnitude's gradient without its norm, and dx of a base that forgot what dropout leaves it."""
    if backend == "cpu" and not native.load():
        pytest.skip(native.reason())
    module = sys.modules[f"peft_fast.backends.{backend}.dora_linear"]
    honest = module.backward

    def wrong(*args):
        dx, dW, dbias, dA, dB, dm = honest(*args)
        norm = args[9]
        return 1.01 * dx, dW, dbias, dA, dB, dm * norm

    case = replace(cases_dora_linear.STEP, name="planted_back", lead=(131,), N=72, p=(p,))
    assert not numerics.failures(numerics.default_verdicts(numerics.Provider(backend), case, "f32"))
    monkeypatch.setattr(module, "backward", wrong)
    found = numerics.failures(numerics.default_verdicts(numerics.Provider(backend), case, "f32"))
    assert {"dx", "dm"} <= set(found)


def test_nothing_is_kept_for_a_backward_that_cannot_come(monkeypatch):
    """P (M, N) is for the magnitude's gradient alone: none without gradients, none for a magnitude that is frozen."""
    module = sys.modules["peft_fast.backends.torch.dora_linear"]
    honest, kept = module.forward, []

    def watched(*args):
        kept.append((args[-1], honest(*args)))
        return kept[-1][1]

    monkeypatch.setattr(module, "forward", watched)
    t = numerics.problem(cases_dora_linear.STEP, DTYPES["f32"]).tensors
    W, bias, (adapter,), _ = cases_dora_linear.STEP.layer.sibling(t)
    for context, m, wanted in (
        (torch.enable_grad, t["m"], True),
        (torch.no_grad, t["m"], False),
        (torch.inference_mode, t["m"], False),
        (torch.enable_grad, t["m"].detach(), False),
    ):
        with context():
            dora_linear(t["x"], W, bias, adapter, m, backend="torch")
        asked, (_, _, P) = kept.pop()
        assert asked is wanted and (P is not None) is wanted
