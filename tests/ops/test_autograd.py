"""Autograd around the ops: derivatives, what is saved, what is owned, and what checkpointing sees."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from peft_fast.ops import Adapter, lora_linear
from tests import cases_lora_embedding, cases_lora_group, cases_lora_mlp, numerics, stock
from tests.cases import Case
from tests.inputs import DTYPES, Dtypes, Layer

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
OTHERS = [table.STEP for table in (cases_lora_group, cases_lora_mlp, cases_lora_embedding)]
ALL = [STEP, *OTHERS]
# every layer kind in few elements: finite differences take one call an element
MATHEMATICS = ("torch", "reference")
LITTLE = Layer(4, (2,), (0.4,), (0.7,), bias=True, base_trains=True)
TINY = [
    cases_lora_group.Case("tiny_group", (LITTLE, Layer(3, (), (), ()), Layer(2, (1,))), lead=(2, 3), K=5),
    cases_lora_mlp.Case("tiny_mlp", gate=LITTLE, up=Layer(), down=LITTLE, lead=(3,), K=5, I=6, p=0.2),
    cases_lora_mlp.Case("tiny_halves", "gelu", "second", up=LITTLE, down=Layer(3, (2,)), lead=(3,), K=5, I=4),
    cases_lora_embedding.Case("tiny_embedding", lead=(7,), V=5, D=4, ranks=(2,), scale=1.7, base_trains=True),
]


def call(provider, problem, tensors=None, seed=None):
    """The outputs as a list."""
    ys = numerics.call(problem, provider, tensors, seed)
    return list(ys) if isinstance(ys, tuple) else [ys]


def gradients(ys, problem, retain_graph=False):
    wanted = [t for t in problem.tensors.values() if t.requires_grad]
    gs = [g.to(y.dtype) for y, g in zip(ys, problem.gs.values(), strict=True)]
    return torch.autograd.grad(ys, wanted, gs, retain_graph=retain_graph)


@numerics.each(SMALL, replace(SMALL, name="small_conv1d", transposed=True), only=MATHEMATICS)
def test_gradcheck_of_every_subset(provider, case):
    p = numerics.problem(replace(case, base_trains=True), F64)
    names = ["x", "W", "bias", "A0", "B0", "b0"]
    for wanted in itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(1, len(names) + 1)):
        check_gradients(provider, p, wanted, fast_mode=len(wanted) < len(names))


@numerics.each(*TINY, only=MATHEMATICS)
def test_gradcheck_of_each_and_all(provider, case):
    p = numerics.problem(case, F64)
    names = [n for n, t in p.tensors.items() if t.requires_grad]
    for wanted in ([n] for n in names):
        check_gradients(provider, p, wanted, fast_mode=True)
    check_gradients(provider, p, names, fast_mode=False)


def check_gradients(provider, p, wanted, fast_mode):
    tensors = {n: t.detach().clone().requires_grad_(n in wanted) for n, t in p.tensors.items()}

    def run(*leaves):
        ys = call(provider, p, tensors | dict(zip(wanted, leaves, strict=True)))
        return tuple(y for y in ys if y.requires_grad)  # those that a wanted tensor reaches

    assert torch.autograd.gradcheck(run, [tensors[n] for n in wanted], fast_mode=fast_mode)


FROZEN = Layer(3, (), (), ())
SECOND = [
    SMALL,
    *TINY,
    cases_lora_group.Case("frozen_group", (FROZEN, FROZEN), lead=(3,), K=5),
    cases_lora_mlp.Case("frozen_mlp", gate=FROZEN, up=FROZEN, down=FROZEN, lead=(3,), K=5, I=4),
]


@numerics.each(*SECOND, only=MATHEMATICS)
def test_second_derivatives(provider, case):
    p = numerics.problem(case, F64)
    names = [n for n, t in p.tensors.items() if t.requires_grad]

    def run(*leaves):
        return tuple(call(provider, p, p.tensors | dict(zip(names, leaves, strict=True))))

    assert torch.autograd.gradgradcheck(run, [p.tensors[n] for n in names], fast_mode=True)


@numerics.each(replace(STEP, adapter_bias=True, base_trains=True), *OTHERS)
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "bf16_f32_adapters"])
def test_subsets_give_the_bits_of_the_whole(provider, case, dtypes):
    p = numerics.problem(case, DTYPES[dtypes])
    with provider.active():
        ys = call(provider, p)
        names = [n for n, t in p.tensors.items() if t.requires_grad]
        whole = dict(zip(names, gradients(ys, p), strict=True))
        for name in names:
            tensors = {n: t.detach().requires_grad_(n == name) for n, t in p.tensors.items()}
            alone = call(provider, p, tensors)
            used = [(y, g) for y, g in zip(alone, p.gs.values(), strict=True) if y.requires_grad]
            (grad,) = torch.autograd.grad([y for y, _ in used], [tensors[name]], [g for _, g in used])
            assert all(numerics.same_bits(a, y) for a, y in zip(alone, ys, strict=True))
            assert numerics.same_bits(grad, whole[name]), name


class Drop(torch.autograd.Function):
    """The identity, whose gradient is undefined."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        return None


@numerics.each(replace(OTHERS[2], scale=None))
def test_a_scale_that_trains(provider, case):
    p = numerics.problem(case, F64 if provider.backend in MATHEMATICS else DTYPES["f32"])
    t, scale = p.tensors, torch.tensor(1.5, requires_grad=True)
    with provider.active():
        plain = case.ours(provider, t)
        y = provider(t["ids"], t["W"], case.adapters(t), padding_idx=1, scale=scale, op="lora_embedding")
    (dscale,) = torch.autograd.grad(y, [scale], p.g)
    torch.testing.assert_close(dscale, (plain * p.g).sum().to(dscale.dtype), rtol=1e-4, atol=1e-4)


@numerics.each(*ALL)
def test_undefined_gradient(provider, case):
    p = numerics.problem(case, DTYPES["f32"])
    with provider.active():
        ys = [Drop.apply(y) for y in call(provider, p)]
        wanted = [t for t in p.tensors.values() if t.requires_grad]
        grads = torch.autograd.grad(ys, wanted, list(p.gs.values()), allow_unused=True)
    assert all(g is None or not g.any() for g in grads)


@numerics.each(OTHERS[0])
@pytest.mark.parametrize("dtypes", ["f32", "bf16_f32_adapters"])
@pytest.mark.parametrize("used", [(0,), (2,), (0, 1), (1, 2), (0, 2)], ids=str)
def test_siblings_without_a_gradient(provider, case, dtypes, used):
    """As if their gradients were zero, in the bits of a group of the others."""
    p = numerics.problem(case, DTYPES[dtypes])
    wanted = [t for t in p.tensors.values() if t.requires_grad]
    gs = list(p.gs.values())
    with provider.active():
        ys = call(provider, p)
        some = torch.autograd.grad([ys[i] for i in used], wanted, [gs[i] for i in used], allow_unused=True)
        ys = call(provider, p)
        zeros = [g if i in used else torch.zeros_like(g) for i, g in enumerate(gs)]
        every = torch.autograd.grad(ys, wanted, zeros)
    eps = torch.finfo(DTYPES[dtypes].compute).eps
    for a, b in zip(some, every, strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, rtol=eps, atol=8 * eps * b.abs().max())


@numerics.each(OTHERS[0])
def test_siblings_go_back_one_by_one(provider, case):
    """Losses of their own, as layers apart allow: the sum is that of one backward; none goes back twice."""
    p = numerics.problem(case, DTYPES["f32"])
    wanted = [t for t in p.tensors.values() if t.requires_grad]
    with provider.active():
        together = gradients(call(provider, p), p)
        ys, total = call(provider, p), None
        for y, g in zip(ys, p.gs.values(), strict=True):
            grads = torch.autograd.grad(y, wanted, g, allow_unused=True)
            grads = [torch.zeros_like(t) if d is None else d for t, d in zip(wanted, grads, strict=True)]
            total = grads if total is None else [a + b for a, b in zip(total, grads, strict=True)]
        for a, b in zip(total, together, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(ys[0], wanted, p.gs["y0"], allow_unused=True)
        if provider.backend == "reference":
            return  # no node of ours keeps anything
        ys = call(provider, p)
        torch.autograd.grad(ys[0], wanted, p.gs["y0"], allow_unused=True)
        with torch.no_grad():
            p.tensors["0_A0"].mul_(2)  # an optimizer of its own
        torch.autograd.grad(ys[1], wanted, p.gs["y1"], allow_unused=True)
        with torch.no_grad():
            p.tensors["2_A0"].mul_(2)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(ys[2], wanted, p.gs["y2"], allow_unused=True)


@numerics.each(*ALL)
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "bf16_f32_adapters"])
def test_second_backward_equals_the_first(provider, case, dtypes):
    p = numerics.problem(case, DTYPES[dtypes])
    saved = []
    with (
        provider.active(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        ys = call(provider, p)
        before = [(t._version, t.detach().clone()) for t in saved]
        first, second = gradients(ys, p, retain_graph=True), gradients(ys, p)
    assert all(numerics.same_bits(a, b) for a, b in zip(first, second, strict=True))
    assert all(t._version == v and numerics.same_bits(t, bits) for t, (v, bits) in zip(saved, before, strict=True))
    assert p.untouched()


BARE = Layer(24, (), (), ())
OWNERS = [
    *ALL,
    replace(STEP, name="none", ranks=(), p=(), scaling=()),
    cases_lora_group.Case("group_none", (BARE, replace(BARE, N=9))),
    cases_lora_mlp.Case("mlp_none", "relu", up=BARE, down=BARE),
]


@numerics.each(*OWNERS)
def test_results_own_their_storage(provider, case):
    p = numerics.problem(case, DTYPES["f32"])
    with provider.active():
        ys = call(provider, p)
        for y in ys:
            assert y._base is None and y.is_contiguous()
            assert y.untyped_storage().nbytes() == y.numel() * y.element_size()
        expected = gradients([y.add(1).mul(3) for y in call(provider, p)], p)
        for y in ys:
            y += 1
            y *= 3
        written = gradients(ys, p)
    assert all(numerics.same_bits(a, b) for a, b in zip(written, expected, strict=True))


@numerics.each(*ALL)
def test_used_twice(provider, case):
    p = numerics.problem(case, DTYPES["f32"])
    with provider.active():
        first, second = call(provider, p, seed=1), call(provider, p, seed=2)
        both = gradients([a + b for a, b in zip(first, second, strict=True)], p)
        single = [gradients(call(provider, p, seed=s), p) for s in (1, 2)]
    for total, a, b in zip(both, *single, strict=True):
        torch.testing.assert_close(total, a + b, rtol=1e-6, atol=1e-5)


@numerics.each(*ALL[:3])  # PEFT's embeddings have no dropout
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dtypes", ["f32", "bf16_f32_adapters"])
def test_checkpoint_with_dropout(provider, case, reentrant, dtypes):
    p = numerics.problem(case, DTYPES[dtypes])
    t = p.tensors

    def layer(x):
        return case.ours(provider, t | {"x": x})

    # a reentrant checkpoint only sees leaves through .backward()
    def train(run):
        torch.manual_seed(3)
        ys = run(t["x"])
        ys = ys if isinstance(ys, tuple) else (ys,)
        torch.rand(7)  # the recomputation must not see that the generator moved on
        torch.autograd.backward(ys, tuple(p.gs.values()))
        grads = {n: v.grad for n, v in t.items() if v.requires_grad}
        for v in t.values():
            v.grad = None
        return [y.detach() for y in ys], grads, numerics.rng_state()

    with provider.active():
        plain = train(layer)
        other = train(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert all(numerics.same_bits(a, b) for a, b in zip(plain[0], other[0], strict=True))
    assert torch.equal(plain[2], other[2])
    assert all(numerics.same_bits(plain[1][n], other[1][n]) for n in plain[1])


@numerics.each(*ALL)
def test_without_gradients(provider, case):
    p = numerics.problem(case, DTYPES["bf16"])
    with provider.active():
        ys = call(provider, p)
        with torch.no_grad():
            quiet = call(provider, p)
        with torch.inference_mode():
            inferred = call(provider, p)
        frozen = {n: t.detach() for n, t in p.tensors.items()}
        constant = call(provider, p, frozen)
    assert all(y.requires_grad for y in ys) and all(y.is_inference() for y in inferred)
    assert not any(y.requires_grad for y in (*quiet, *constant))
    for others in (quiet, [y.clone() for y in inferred], constant):
        assert all(numerics.same_bits(a, b) for a, b in zip(others, ys, strict=True))


@numerics.each(*ALL[:3])
def test_x_without_gradient_trains_the_adapter(provider, case):
    p = numerics.problem(case, DTYPES["f32"])
    names = [n for n in p.tensors if n.rpartition("_")[2][0] in "AB"]
    gs = list(p.gs.values())

    def grads_of(tensors):
        used = [(y, g) for y, g in zip(call(provider, p, tensors), gs, strict=True) if y.requires_grad]
        return torch.autograd.grad([y for y, _ in used], [tensors[n] for n in names], [g for _, g in used])

    with provider.active():
        whole = grads_of(p.tensors)
        grads = grads_of(p.tensors | {"x": p.tensors["x"].detach()})
    assert all(numerics.same_bits(a, b) for a, b in zip(grads, whole, strict=True))


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
    theirs = losses(lambda t: stock.lora_linear(t["x"], p.case.layer.sibling(t), p.masks))
    assert mine[-1] < mine[0]
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)
