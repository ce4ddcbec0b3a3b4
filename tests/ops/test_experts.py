"""lora_experts: planted faults that the criterion must reject, gradients by finite differences, wrong input."""

import sys
import types
from dataclasses import replace

import pytest
import torch

from peft_fast import native, ops
from peft_fast.errors import DtypeError, PeftFastError, SettingsError, ShapeError
from peft_fast.ops import Adapter, combine_experts, lora_experts, route_experts
from peft_fast.ops.lora_experts import FEW, few
from peft_fast.reference import lora_experts as reference
from tests import cases_lora_experts, numerics
from tests.cases_lora_experts import Case

CROWDED = Case("crowded", T=150, k=2, E=3, K=259, N=189, ranks=(16,), bias=True, tokens=True)
LOW = ("bf16", "bf16_f32_adapters")
HONEST = numerics.Provider("torch", "accumulate")
HALF = bool({"avx512_bf16", "amx"} & set(numerics.isas()))  # engines whose packed operands are bfloat16


class Altered(torch.autograd.Function):
    """The identity; its gradient goes through ``change``."""

    @staticmethod
    def forward(ctx, t, change):
        ctx.change = change
        return t.view_as(t)

    @staticmethod
    def backward(ctx, g):
        return ctx.change(g.clone()), None


def _adapter(change):
    def run(x, W, routing, bias, adapters, **options):
        E = W.shape[0]
        changed = [a._replace(**change(a, E)) for a in adapters]
        return HONEST(x, W, routing, bias, changed, **options)

    return run


def _result(change):
    def run(x, W, routing, bias, adapters, **options):
        y = HONEST(x, W, routing, bias, adapters, **options)
        return change(y, lambda: HONEST(x, W, routing, bias, [], **options))

    return run


def _low_alone(x, W, routing, bias, adapters, **options):
    whole = HONEST(x, W, routing, bias, adapters, **options)
    return whole - HONEST(x, W, routing, bias, [], **options)


def _truncated(y, base):
    exact = y.detach()
    return y + ((exact.view(torch.int16) & ~1).view(y.dtype) - exact)


def _no_row(y, base):
    y = y.clone()
    y[-1] = base()[-1]
    return y


def _dx_of_base(x, W, routing, bias, adapters, **options):
    return HONEST(x, W, routing, bias, [], **options) + _low_alone(x.detach(), W, routing, None, adapters, **options)


def _dropped(expert):
    def change(g):
        g.view(3, -1)[expert] = 0
        return g

    return change


def _routing(change):
    def run(x, W, routing, bias, adapters, **options):
        return HONEST(x, W, change(routing), bias, adapters, **options)

    return run


def _first(values, E):
    return values.reshape(values.shape[0], -1, E).mT.reshape(values.shape)


# fault -> (what runs, outputs that must be rejected)
FAULTS = {
    "scale off by 1 %": (_adapter(lambda a, E: {"scaling": a.scaling * 1.01}), ("y", "dx", "dA0", "dB0")),
    "B expert after expert": (_adapter(lambda a, E: {"B": _first(a.B, E)}), ("y", "dx", "dB0")),
    "A rank after rank": (
        _adapter(lambda a, E: {"A": a.A.reshape(-1, E, a.A.shape[1]).transpose(0, 1).reshape(a.A.shape)}),
        ("y", "dA0"),
    ),
    "the next expert's A": (_adapter(lambda a, E: {"A": a.A.roll(a.A.shape[0] // E, 0)}), ("y", "dA0")),
    "the next expert's B": (_adapter(lambda a, E: {"B": a.B.roll(1, 1)}), ("y", "dB0")),
    "last K column of the adapter": (
        _adapter(lambda a, E: {"A": torch.cat([a.A[:, :-1], a.A[:, -1:] * 0], 1)}),
        ("y", "dA0"),
    ),
    "last row without the adapter": (_result(_no_row), ("y",)),
    "dx of the adapter forgotten": (_dx_of_base, ("dx",)),
    "dA of one expert forgotten": (
        _adapter(lambda a, E: {"A": Altered.apply(a.A, _dropped(1))}),
        ("dA0",),
    ),
    "dB expert after expert": (_adapter(lambda a, E: {"B": Altered.apply(a.B, lambda g: _first(g, 3))}), ("dB0",)),
    "dA twice": (_adapter(lambda a, E: {"A": Altered.apply(a.A, lambda g: g * 1.01)}), ("dA0",)),
    "a row of the wrong expert": (
        _routing(lambda r: r._replace(counts=r.counts + torch.tensor([1, -1, 0]))),
        ("y", "dA0", "dB0"),
    ),
    "a token of the wrong place": (_routing(lambda r: r._replace(order=r.order.roll(1))), ("y", "dA0")),
}
LOW_FAULTS = {"y truncated": (_result(_truncated), ("y",))}


@pytest.mark.parametrize("dtypes", ["f32", *LOW])
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_rejected(fault, dtypes):
    run, wrong = FAULTS[fault]
    found = numerics.verdicts(run, CROWDED, dtypes, dtypes == "bf16_f32_adapters")
    assert set(wrong) <= set(numerics.failures(found)), found


@pytest.mark.parametrize("dtypes", LOW)
@pytest.mark.parametrize("fault", LOW_FAULTS)
def test_planted_faults_of_rounding_are_rejected(fault, dtypes):
    run, wrong = LOW_FAULTS[fault]
    found = numerics.verdicts(run, replace(CROWDED, name="crowded_positive", positive=True), dtypes, True)
    assert set(wrong) <= set(numerics.failures(found)), found


@pytest.mark.parametrize("dtypes", ["f32", *LOW])
def test_honest_work_is_accepted(dtypes):
    assert not numerics.failures(numerics.verdicts(HONEST, CROWDED, dtypes, dtypes == "bf16_f32_adapters"))


def small(transposed=False, tokens=True):
    torch.manual_seed(0)
    E, N, K, r = 3, 4, 5, 2
    rand = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    routing = route_experts(torch.tensor([[0, 2], [2, 0], [0, 2]]), E)
    W = rand(*((E, K, N) if transposed else (E, N, K))).detach()
    return rand(3 if tokens else 6, K), W, routing, rand(E, N), rand(r * E, K), rand(N, r * E)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [False, True])
def test_gradients_by_finite_differences(transposed, tokens):
    x, W, routing, bias, A, B = small(transposed, tokens)

    def run(x, bias, A, B):
        return lora_experts(x, W, routing, bias, [Adapter(A, B, 0.7)], tokens=tokens, transposed=transposed)

    leaves = [x, bias, A, B]
    assert torch.autograd.gradcheck(run, leaves)
    for i in range(4):  # one gradient wanted at a time
        some = [t if j == i else t.detach() for j, t in enumerate(leaves)]
        assert torch.autograd.gradcheck(run, some)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_without_an_adapter(transposed):
    x, W, routing, bias, *_ = small(transposed)
    run = lambda x, bias: lora_experts(x, W, routing, bias, tokens=True, transposed=transposed)  # noqa: E731
    for leaves in ((x, bias), (x, bias.detach()), (x.detach(), bias)):
        assert torch.autograd.gradcheck(run, leaves) and torch.autograd.gradgradcheck(run, leaves)


def test_gradients_of_the_weighted_sum():
    _, _, routing, *_ = small()
    z = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    run = lambda z, w: combine_experts(z, w, routing)  # noqa: E731
    assert torch.autograd.gradcheck(run, (z, weights)) and torch.autograd.gradgradcheck(run, (z, weights))
    assert torch.autograd.gradcheck(run, (z, weights.detach())) and torch.autograd.gradcheck(run, (z.detach(), weights))


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
def test_the_weighted_sum_has_the_bits_of_transformers(low):
    _, _, routing, *_ = small()
    z, weights = torch.randn(6, 40).to(low).requires_grad_(), torch.rand(3, 2).requires_grad_()
    y = combine_experts(z, weights, routing)
    expected = reference.combine(z, weights, routing.inverse)
    g = torch.randn_like(y)
    assert numerics.same_bits(y, expected)
    for one, other in zip(
        torch.autograd.grad(y, [z, weights], g), torch.autograd.grad(expected, [z, weights], g), strict=True
    ):
        torch.testing.assert_close(one, other)
        assert one.dtype == other.dtype


def test_routing():
    chosen = torch.tensor([[1, 3], [3, 0], [1, 3]], dtype=torch.int32)
    order, inverse, counts, k = route_experts(chosen, 5)
    assert (order.tolist(), counts.tolist(), k) == ([3, 0, 4, 1, 2, 5], [1, 2, 0, 3, 0], 2)
    assert order[inverse].tolist() == list(range(6))
    assert route_experts(chosen[:0], 5).counts.tolist() == [0] * 5


def test_two_runs_have_the_same_bits_and_a_second_backward_works():
    problem = numerics.problem(cases_lora_experts.CASES[2], cases_lora_experts.Dtypes(*[torch.bfloat16] * 3))
    one, other = (numerics.ours(problem, ops_default) for _ in range(2))
    assert all(numerics.same_bits(one[name], other[name]) for name in one)
    y = numerics.call(problem, ops_default)
    leaves = [t for t in problem.tensors.values() if t.requires_grad]
    first = torch.autograd.grad(y, leaves, problem.g, retain_graph=True)
    again = torch.autograd.grad(y, leaves, problem.g)
    assert all(map(numerics.same_bits, first, again))


def ops_default(*args, op, **options):
    return getattr(ops, op)(*args, **options)


def test_nan_stays_in_its_row():
    x, W, routing, bias, A, B = (t.detach().float() if isinstance(t, torch.Tensor) else t for t in small())
    clean = lora_experts(x, W, routing, bias, [Adapter(A, B)], tokens=True)
    x[1, 2] = torch.nan
    y = lora_experts(x, W, routing, bias, [Adapter(A, B)], tokens=True)
    hit = routing.order // routing.k == 1
    assert y[hit].isnan().all() and torch.equal(y[~hit], clean[~hit])


def test_no_adapter_and_trained_weights_are_the_definition():
    x, W, routing, bias, A, B = small()
    expected = reference.forward(x[routing.order // 2], W, bias, [], routing.counts.tolist())
    torch.testing.assert_close(lora_experts(x, W, routing, bias, tokens=True), expected)
    W.requires_grad_()
    y = lora_experts(x, W, routing, bias, [Adapter(A, B)], tokens=True)
    assert torch.autograd.grad(y.sum(), W)[0].abs().max() > 0


INFERRED = [c for c in cases_lora_experts.CASES if "g" not in c.layout]
compiled = pytest.mark.skipif(not native.load(), reason=native.reason() or "live")


@compiled
@pytest.mark.parametrize("few", [0, 10**9], ids=["packed", "as_it_lies"])
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "bf16_f32_adapters"])
@pytest.mark.parametrize("case", INFERRED, ids=lambda c: c.name)
def test_inference_is_no_less_accurate(case, dtypes, few, monkeypatch):
    """Without gradients adapters are read as PEFT keeps them, and W as it lies, or packed, whatever the rows."""
    monkeypatch.setattr(torch.ops.peft_fast, "lora_experts", None)
    monkeypatch.setattr(sys.modules[lora_experts.__module__], "few", lambda transposed: few)
    rounds = dtypes == "bf16_f32_adapters" and few == 0 and HALF
    problems, stocks, truths = numerics.answers(case, dtypes, rounds)
    with torch.no_grad():
        outs = [{"y": numerics.call(p, numerics.Provider("cpu", "accumulate"))} for p in problems]
    only = [[{"y": one["y"]} for one in many] for many in (stocks, truths)]
    assert not numerics.failures(numerics.judge(case, outs, *only))
    assert all(p.untouched() for p in problems)


@compiled
@pytest.mark.parametrize("isa", numerics.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_rows_on_every_instruction_set_and_number_of_threads(isa, dtype):
    case = Case("spread", T=40, k=2, E=7, K=130, N=389, ranks=(5, 33), scaling=(0.5, -2.0), bias=True, tokens=True)
    problem = numerics.problem(case, cases_lora_experts.Dtypes(*[dtype] * 3))
    expected = numerics.truth(problem)["y"]
    threads, found = torch.get_num_threads(), []
    with torch.no_grad(), numerics.Provider("cpu", isa=isa).active():
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                found.append(numerics.call(problem, numerics.Provider("cpu")))
        finally:
            torch.set_num_threads(threads)
    assert all(numerics.same_bits(found[0], y) for y in found)
    bound = 2e-6 if dtype == torch.float32 else 0.02
    assert (found[0].double() - expected).abs().max() < bound * expected.abs().max()


@compiled
def test_what_is_read_as_it_lies(monkeypatch):
    """Few rows an expert and no gradient; one row more, or a gradient, takes packed operands."""
    seen = []
    ops_of = torch.ops.peft_fast
    infer = ops_of.lora_experts_infer.default
    spy = types.SimpleNamespace(default=lambda *args: seen.append(args[-1]) or infer(*args))
    monkeypatch.setattr(ops_of, "lora_experts_infer", spy)
    A, B, W = torch.randn(6, 5), torch.randn(4, 6), torch.randn(3, 4, 5)

    def run(rows, A=A):
        routing = route_experts(torch.arange(rows).view(-1, 1) % 2, 3)
        seen.clear()
        y = lora_experts(torch.ones(rows, 5), W, routing, None, [Adapter(A, B)], backend="cpu")
        return list(seen), y

    for rows in (0, 1, 2 * few(False), 2 * few(False) + 1):
        wanted, same = run(rows, A.clone().requires_grad_())
        calls, y = run(rows)
        assert calls == [few(False)] and not wanted and (same.requires_grad or not rows)
        torch.testing.assert_close(y, same.detach())


def test_how_many_rows_are_few(monkeypatch):
    """More only where that was measured."""
    found = []
    for isa in ("portable", "avx512_bf16", "amx", "none"):
        monkeypatch.setattr(native, "isa", lambda isa=isa: isa)
        found.append((few(False), few(True)))
    assert found == [(FEW, FEW), (FEW, FEW), (64, FEW), (FEW, FEW)]


WRONG = {
    "W of two dimensions": (ShapeError, lambda a: a | {"W": a["W"][0]}),
    "x of another width": (ShapeError, lambda a: a | {"x": a["x"][:, 1:]}),
    "x of too few rows": (ShapeError, lambda a: a | {"x": a["x"][1:]}),
    "another number of experts": (ShapeError, lambda a: a | {"routing": route_experts(torch.zeros(3, 2).long(), 4)}),
    "bias of another size": (ShapeError, lambda a: a | {"bias": a["bias"][:, 1:]}),
    "A of another size": (ShapeError, lambda a: a | {"adapters": [Adapter(a["A"][1:], a["B"])]}),
    "rank zero": (ShapeError, lambda a: a | {"adapters": [Adapter(a["A"][:0], a["B"][:, :0])]}),
    "dropout": (SettingsError, lambda a: a | {"adapters": [Adapter(a["A"], a["B"], 1.0, 0.1)]}),
    "one adapter": (SettingsError, lambda a: a | {"adapters": Adapter(a["A"], a["B"])}),
    "a vector of scalings": (ShapeError, lambda a: a | {"adapters": [Adapter(a["A"], a["B"], torch.ones(2))]}),
    "two dtypes": (DtypeError, lambda a: a | {"adapters": [Adapter(a["A"].float(), a["B"])]}),
    "whole numbers": (DtypeError, lambda a: a | {"W": a["W"].long()}),
}


@pytest.mark.parametrize("error, change", WRONG.values(), ids=WRONG)
def test_wrong_input_says_what_is_wrong(error, change):
    x, W, routing, bias, A, B = small()
    given = change({"x": x, "W": W, "routing": routing, "bias": bias, "A": A, "B": B, "adapters": [Adapter(A, B)]})
    with pytest.raises(error, match="given: .*\nneeded: .*\ndo: "):
        lora_experts(*[given[n] for n in ("x", "W", "routing", "bias", "adapters")], tokens=True)


@pytest.mark.parametrize(
    "chosen", [torch.tensor([[0, 3]]), torch.tensor([[-1, 0]]), torch.zeros(2).long(), torch.ones(2, 2)]
)
def test_wrong_routing(chosen):
    with pytest.raises(PeftFastError, match="needed: "):
        route_experts(chosen, 3)
