"""Autograd around lora_linear: derivatives, what is saved, what is owned, and what checkpointing sees."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from peft_fast.ops import Adapter, lora_linear
from tests import numerics
from tests.cases import DTYPES, Case, Dtypes

PROVIDERS = numerics.providers()
F64 = Dtypes(*[torch.float64] * 3)
SMALL = Case(
    "small",
    lead=(2, 3),
    K=5,
    N=4,
    ranks=(2, 3),
    p=(0.4, 0.0),
    scaling=(0.7, -1.5),
    bias=True,
    adapter_bias=True,
)
STEP = Case("step", lead=(3, 11), K=40, N=24, ranks=(4, 8), p=(0.3, 0.0), scaling=(2.0, 0.5), bias=True)
TORCH_AND_REFERENCE = [p for p in PROVIDERS if p.values[0].backend in ("torch", "reference")]


def call(provider, problem, tensors=None, seed=None, **options):
    t = tensors or problem.tensors
    torch.manual_seed(problem.seed if seed is None else seed)
    args = (t["x"], t["W"], t.get("bias"), problem.adapters(t))
    return provider(*args, transposed=problem.case.transposed, **options)


def gradients(y, problem, retain_graph=False):
    wanted = [t for t in problem.tensors.values() if t.requires_grad]
    return torch.autograd.grad(y, wanted, problem.g.to(y.dtype), retain_graph=retain_graph)


@pytest.mark.parametrize("provider", TORCH_AND_REFERENCE)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_gradcheck_of_every_subset(provider, transposed):
    p = numerics.problem(replace(SMALL, transposed=transposed, base_trains=True), F64)
    names = ["x", "W", "bias", "A0", "B0", "b0"]
    for wanted in itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(1, len(names) + 1)):
        tensors = {n: t.detach().clone().requires_grad_(n in wanted) for n, t in p.tensors.items()}

        def run(*leaves, wanted=wanted, tensors=tensors):
            return call(provider, p, tensors | dict(zip(wanted, leaves, strict=True)))

        assert torch.autograd.gradcheck(run, [tensors[n] for n in wanted], fast_mode=len(wanted) < len(names))


@pytest.mark.parametrize("provider", TORCH_AND_REFERENCE)
def test_second_derivatives(provider):
    p = numerics.problem(SMALL, F64)
    names = ["x", "A0", "B0", "A1", "B1"]

    def run(*leaves):
        return call(provider, p, p.tensors | dict(zip(names, leaves, strict=True)))

    assert torch.autograd.gradgradcheck(run, [p.tensors[n] for n in names], fast_mode=True)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "bf16_f32_adapters"])
def test_subsets_give_the_bits_of_the_whole(provider, dtypes):
    p = numerics.problem(replace(STEP, adapter_bias=True, base_trains=True), DTYPES[dtypes])
    with provider.active():
        y = call(provider, p)
        whole = dict(zip(p.tensors, gradients(y, p), strict=True))
        for name in p.tensors:
            tensors = {n: t.detach().requires_grad_(n == name) for n, t in p.tensors.items()}
            alone = call(provider, p, tensors)
            (grad,) = torch.autograd.grad(alone, [tensors[name]], p.g)
            assert numerics.same_bits(alone, y) and numerics.same_bits(grad, whole[name]), name


@pytest.mark.parametrize("provider", PROVIDERS)
def test_undefined_gradient(provider):
    class Drop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, g):
            return None

    p = numerics.problem(STEP, DTYPES["f32"])
    with provider.active():
        y = Drop.apply(call(provider, p))
        wanted = [t for t in p.tensors.values() if t.requires_grad]
        grads = torch.autograd.grad(y, wanted, p.g, allow_unused=True)
    assert all(g is None or not g.any() for g in grads)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "bf16_f32_adapters"])
def test_second_backward_equals_the_first(provider, dtypes):
    p = numerics.problem(STEP, DTYPES[dtypes])
    saved = []
    with (
        provider.active(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        y = call(provider, p)
        before = [(t._version, t.detach().clone()) for t in saved]
        first, second = gradients(y, p, retain_graph=True), gradients(y, p)
    assert all(numerics.same_bits(a, b) for a, b in zip(first, second, strict=True))
    assert all(t._version == v and numerics.same_bits(t, bits) for t, (v, bits) in zip(saved, before, strict=True))
    assert p.untouched()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", [STEP, replace(STEP, ranks=(), p=(), scaling=())], ids=["adapters", "none"])
def test_result_owns_its_storage(provider, case):
    p = numerics.problem(case, DTYPES["f32"])
    with provider.active():
        y = call(provider, p)
        assert y._base is None and y.is_contiguous()
        assert y.untyped_storage().nbytes() == y.numel() * y.element_size()
        expected = gradients(call(provider, p).add(1).mul(3), p)
        y += 1
        y *= 3
        written = gradients(y, p)
    assert all(numerics.same_bits(a, b) for a, b in zip(written, expected, strict=True))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_used_twice(provider):
    p = numerics.problem(STEP, DTYPES["f32"])
    with provider.active():
        first, second = call(provider, p, seed=1), call(provider, p, seed=2)
        both = gradients(first + second, p)
        single = [gradients(call(provider, p, seed=s), p) for s in (1, 2)]
    for total, a, b in zip(both, *single, strict=True):
        torch.testing.assert_close(total, a + b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dtypes", ["f32", "bf16_f32_adapters"])
def test_checkpoint_with_dropout(provider, reentrant, dtypes):
    p = numerics.problem(STEP, DTYPES[dtypes])
    t = p.tensors

    def layer(x):
        return provider(x, t["W"], t["bias"], p.adapters(t))

    # a reentrant checkpoint only sees leaves through .backward()
    def train(run):
        torch.manual_seed(3)
        y = run(t["x"])
        torch.rand(7)  # the recomputation must not see that the generator moved on
        y.backward(p.g)
        grads = {n: v.grad for n, v in t.items() if v.requires_grad}
        for v in t.values():
            v.grad = None
        return y.detach(), grads, numerics.rng_state()

    with provider.active():
        plain = train(layer)
        other = train(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert numerics.same_bits(plain[0], other[0]) and torch.equal(plain[2], other[2])
    assert all(numerics.same_bits(plain[1][n], other[1][n]) for n in plain[1])


@pytest.mark.parametrize("provider", PROVIDERS)
def test_without_gradients(provider):
    p = numerics.problem(STEP, DTYPES["bf16"])
    with provider.active():
        y = call(provider, p)
        with torch.no_grad():
            quiet = call(provider, p)
        with torch.inference_mode():
            inferred = call(provider, p)
        frozen = {n: t.detach() for n, t in p.tensors.items()}
        constant = call(provider, p, frozen)
    assert y.requires_grad and not quiet.requires_grad and not constant.requires_grad and inferred.is_inference()
    for other in (quiet, inferred.clone(), constant):
        assert numerics.same_bits(other, y)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_x_without_gradient_trains_the_adapter(provider):
    p = numerics.problem(STEP, DTYPES["f32"])
    tensors = p.tensors | {"x": p.tensors["x"].detach()}
    names = ["A0", "B0", "A1", "B1"]
    with provider.active():
        whole = torch.autograd.grad(call(provider, p), [p.tensors[n] for n in names], p.g)
        y = call(provider, p, tensors)
        grads = torch.autograd.grad(y, [tensors[n] for n in names], p.g)
    assert all(numerics.same_bits(a, b) for a, b in zip(grads, whole, strict=True))


@pytest.mark.parametrize("provider", [p for p in PROVIDERS if p.values[0].backend != "reference"])
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "bf16_f32_adapters"])
def test_saves_x_h_and_the_seed(provider, dtypes):
    case = replace(STEP, lead=(64,))
    p = numerics.problem(case, DTYPES[dtypes])
    saved = {}

    def pack(t):
        saved[t.data_ptr()] = t
        return t

    with provider.active(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(provider, p)
    storages = {t.untyped_storage().data_ptr() for n, t in p.tensors.items()}
    extra = [t for t in saved.values() if t.untyped_storage().data_ptr() not in storages]
    weights = 4 * sum(case.ranks) * (case.K + case.N)  # A's and B's side by side, in at most float32
    activations = sum(t.numel() * t.element_size() for t in extra if case.M in t.shape)
    others = sum(t.numel() * t.element_size() for t in extra if case.M not in t.shape)
    assert activations <= 4 * case.M * sum(case.ranks), "of the activations only H (M, R) is saved beside x"
    assert others <= 8 * len(case.ranks) + weights + 4 * case.N
    assert not any(t.dtype == torch.bool for t in extra), "a mask was saved"


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "bf16_f32_adapters"])
def test_non_leaf_inputs(provider, dtypes):
    """x, A and B that are results of other operations: views, casts, ties."""
    p = numerics.problem(Case("tie", lead=(9,), K=16, N=16, ranks=(4,), p=(0.0,)), DTYPES[dtypes])
    t = p.tensors
    with provider.active():
        tied = provider(t["x"] * 1, t["W"], None, [Adapter(t["A0"], t["A0"].t(), 2.0)])
        (grad,) = torch.autograd.grad(tied, [t["A0"]], p.g)
        apart = {"A": t["A0"].detach().requires_grad_(), "B": t["A0"].detach().t().requires_grad_()}
        split = provider(t["x"] * 1, t["W"], None, [Adapter(apart["A"], apart["B"], 2.0)])
        dA, dB = torch.autograd.grad(split, list(apart.values()), p.g)
    assert numerics.same_bits(tied, split)
    torch.testing.assert_close(grad, dA + dB.t())


def test_default_dispatch_trains_like_peft():
    """No backend named: five steps of SGD, loss by loss next to PEFT's own sequence."""
    p = numerics.problem(replace(STEP, p=(0.0, 0.0)), DTYPES["f32"])

    def losses(forward):
        t = {n: v.detach().clone().requires_grad_(v.requires_grad) for n, v in p.tensors.items()}
        params = [v for n, v in t.items() if n[0] in "AB"]
        found = []
        for _ in range(5):
            loss = (forward(t) - p.g).square().mean()
            for v, d in zip(params, torch.autograd.grad(loss, params), strict=True):
                v.data.sub_(0.1 * d)
            found.append(loss.item())
        return torch.tensor(found)

    mine = losses(lambda t: lora_linear(t["x"], t["W"], t["bias"], p.adapters(t)))
    theirs = losses(lambda t: numerics.peft_forward(t, p.adapters(t), p.masks, False))
    assert mine[-1] < mine[0]
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)
