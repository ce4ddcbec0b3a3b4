"""lora_mixed: what needs no truth, faults that the contract must reject, and what it refuses."""

from dataclasses import replace

import pytest
import torch

from peft_fast import dispatch, errors, native
from peft_fast.backends.torch import lora_mixed as backend
from peft_fast.ops import Adapter, fast_calls, lora_linear, lora_mixed
from tests import numerics
from tests.cases_lora_mixed import STEP, Case
from tests.inputs import DTYPES

BATCH = Case("batch", owners=(2, -1, 0, 1, 2, 0), ranks=(5, 16, 33), scaling=(0.5, -1.0, 2.0), adapter_bias=True, K=130)
WORDS = Case("batch_of_words", owners=(2, -1, 0, 1, 2, 0), ranks=(5, 16, 33), scaling=(0.5, -1.0, 2.0), V=61)
KINDS = ["f32", "bf16", "bf16_f32_adapters"]
with_dtypes = pytest.mark.parametrize("dtypes", KINDS)


def make(case, dtypes):
    p = numerics.problem(case, DTYPES[dtypes])
    t = {name: tensor.detach() for name, tensor in p.tensors.items()}
    return t["ids"] if case.V else t["x"], case.base(t), case.adapters(t), list(case.owners)


def assert_close(provider, found, expected):
    """The same bits from our kernels; a vendor's GEMM may sum a row otherwise in another place."""
    if provider.backend == "cpu":
        assert numerics.same_bits(found, expected)
    else:
        low = found.dtype != torch.float32
        torch.testing.assert_close(found, expected, rtol=2e-2 if low else 1e-5, atol=2e-2 if low else 1e-5)


@numerics.each(BATCH, WORDS)
@with_dtypes
def test_permuted_rows_give_permuted_results(provider, case, dtypes):
    x, base, adapters, owners = make(case, dtypes)
    order = [3, 5, 0, 2, 4, 1]
    with provider.active():
        y = provider(x, base.clone(), adapters, owners, op="lora_mixed")
        mixed = provider(x[order], base[order], adapters, [owners[i] for i in order], op="lora_mixed")
    assert_close(provider, mixed, y[order])


@numerics.each(BATCH, WORDS)
@with_dtypes
def test_a_batch_is_its_rows(provider, case, dtypes):
    x, base, adapters, owners = make(case, dtypes)
    with provider.active():
        y = provider(x, base.clone(), adapters, owners, op="lora_mixed")
        for i, owner in enumerate(owners):
            row = provider(x[i : i + 1], base[i : i + 1].clone(), adapters, [owner], op="lora_mixed")
            # a single token is summed in another order than several
            torch.testing.assert_close(row[0], y[i], rtol=1e-2 if dtypes != "f32" else 1e-5, atol=1e-5)
            if owner < 0:
                assert numerics.same_bits(y[i], base[i]), "rows without an adapter keep the base's bits"


@numerics.each(BATCH)
@with_dtypes
def test_the_number_of_an_adapter_says_nothing(provider, case, dtypes):
    x, base, adapters, owners = make(case, dtypes)
    with provider.active():
        y = provider(x, base.clone(), adapters, owners, op="lora_mixed")
        turned = [2 - owner if owner >= 0 else -1 for owner in owners]
        assert_close(provider, provider(x, base.clone(), adapters[::-1], turned, op="lora_mixed"), y)


@numerics.each(replace(BATCH, owners=(0,) * 6))
def test_one_adapter_is_lora_linear(provider, case):
    p = numerics.problem(case, DTYPES["f32"])
    x, base, adapters, owners = make(case, "f32")
    with provider.active():
        y = provider(x, base, adapters, owners, op="lora_mixed")
    expected = lora_linear(x, p.tensors["W"], adapters=adapters[:1], backend="torch")
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@numerics.each(BATCH)
@with_dtypes
@pytest.mark.parametrize("broken", ["x", "A", "B"])
def test_one_row_s_nan_stays_its_own(provider, case, dtypes, broken):
    x, base, adapters, owners = make(case, dtypes)
    with provider.active():
        y = provider(x, base.clone(), adapters, owners, op="lora_mixed")
        if broken == "x":
            x[2] = torch.nan
        else:
            adapters[0] = adapters[0]._replace(**{broken: torch.full_like(getattr(adapters[0], broken), torch.inf)})
        found = provider(x, base.clone(), adapters, owners, op="lora_mixed")
    hit = [2] if broken == "x" else [i for i, owner in enumerate(owners) if owner == 0]
    for i in range(len(owners)):
        if i in hit:
            assert not found[i].isfinite().any()
        else:
            assert_close(provider, found[i], y[i])


@numerics.each(BATCH, WORDS)
@with_dtypes
def test_recording_gradients_changes_no_bit_and_not_the_base(provider, case, dtypes):
    x, base, adapters, owners = make(case, dtypes)
    with provider.active():
        plain = provider(x, base.clone(), adapters, owners, op="lora_mixed")
        kept, adapters[0] = base.clone(), adapters[0]._replace(A=adapters[0].A.clone().requires_grad_())
        recorded = provider(x, kept, adapters, owners, op="lora_mixed")
    assert recorded.requires_grad and numerics.same_bits(recorded, plain) and numerics.same_bits(kept, base)


@numerics.each(BATCH)
def test_without_gradients_the_base_is_written_into(provider, case):
    x, base, adapters, owners = make(case, "f32")
    with provider.active():
        y = provider(x, base, adapters, owners, op="lora_mixed")
        strided = torch.empty(*base.shape[:-1], 2 * base.shape[-1])[..., ::2].copy_(make(case, "f32")[1])
        other = provider(x, strided, adapters, owners, op="lora_mixed")
    assert y.data_ptr() == base.data_ptr() and numerics.same_bits(other, y)


def test_gradients_can_be_checked_and_differentiated_again():
    p = numerics.problem(replace(STEP, K=5, N=4, lead=(2,), ranks=(2, 1, 3)), type(DTYPES["f32"])(*[torch.float64] * 3))
    case, names = p.case, [n for n, t in p.tensors.items() if t.requires_grad]

    def run(*leaves):
        t = p.tensors | dict(zip(names, leaves, strict=True))
        return lora_mixed(t["x"], case.base(t), case.adapters(t), case.owners)

    leaves = [p.tensors[n] for n in names]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("frozen", [True, False])
def test_adapters_of_two_dtypes(frozen):
    torch.manual_seed(0)
    x, base = torch.randn(2, 3, 16).bfloat16(), torch.randn(2, 3, 24).bfloat16()
    adapters = [
        Adapter(torch.randn(4, 16, dtype=dtype) / 4, torch.randn(24, 4, dtype=dtype) / 2, 1.0)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    adapters[0].A.requires_grad_(not frozen)
    truth = lora_mixed(x.float(), base.float(), [Adapter(a.A.float(), a.B.float(), 1.0) for a in adapters], [1, 0])
    y = lora_mixed(x, base.clone(), adapters, [1, 0])
    torch.testing.assert_close(y.float(), truth, rtol=2e-2, atol=2e-2)


ONE_PASS = replace(BATCH, owners=(2, 0, 0, 1, 2, 0), lead=(3,), bias=True)


@pytest.mark.skipif(not native.load(), reason=native.reason())
@pytest.mark.parametrize("isa", numerics.isas() or ["none"])
@with_dtypes
def test_one_pass_over_W_keeps_the_contract(isa, dtypes):
    """lora_decode, each row of its batch with the adapter that it owns."""
    order, counts = [1, 2, 5, 3, 0, 4], [3, 1, 2]
    outs, stocks, truths = [], [], []
    for draw in range(numerics.draws(ONE_PASS)):
        p = numerics.problem(ONE_PASS, DTYPES[dtypes], draw)
        t, adapters = p.tensors, ONE_PASS.adapters(p.tensors)
        As, Bs, scalings, _, biases = (list(part) for part in zip(*adapters, strict=True))
        with numerics.Provider("cpu", isa=isa).active(), torch.no_grad():
            args = t["x"], t["W"], t["bias"], As, Bs, biases, scalings, False, order, counts
            outs.append({"y": torch.ops.peft_fast.lora_decode(*args)})
        stocks.append({"y": numerics.stock(p)["y"]})
        truths.append({"y": numerics.truth(p)["y"]})
    assert not numerics.failures(numerics.judge(ONE_PASS, outs, stocks, truths))


@pytest.mark.skipif(not native.load(), reason=native.reason())
@pytest.mark.parametrize("order, counts", [([0, 0], [1]), ([0, 2], [1]), ([0], [1]), ([0, 1], [3]), ([0, 1], [1, 1])])
def test_rows_that_are_none_are_refused(order, counts):
    with pytest.raises(RuntimeError, match="shapes that do not fit"):
        torch.ops.peft_fast.lora_decode(
            X, torch.zeros(6, 8), None, [GOOD.A], [GOOD.B], [None], [1.0], False, order, counts
        )


def doubled(run, y, x, As, Bs, biases, spec):
    return run(y, x, As, Bs, biases, spec._replace(scalings=[1.01 * s for s in spec.scalings]))


def shifted(run, y, x, As, Bs, biases, spec):
    return run(y, x, As, Bs, biases, spec._replace(order=spec.order[1:] + spec.order[:1]))


def one_short(run, y, x, As, Bs, biases, spec):
    return run(
        y, x, As, Bs, biases, spec._replace(order=spec.order[:-1], counts=[*spec.counts[:-1], spec.counts[-1] - 1])
    )


FAULTS = {
    "one per cent of scaling": doubled,
    "rows of the neighbour": shifted,
    "the last row forgotten": one_short,
    "the last rank forgotten": lambda run, y, x, As, Bs, b, spec: run(y, x, As, [*Bs[:-1], _last(Bs[-1])], b, spec),
    "no bias": lambda run, y, x, As, Bs, b, spec: run(y, x, As, Bs, [None] * len(b), spec),
    "bias not scaled": lambda run, y, x, As, Bs, b, spec: run(
        y, x, As, Bs, [c / s for c, s in zip(b, spec.scalings, strict=True)], spec
    ),
    "all rows of the first": lambda run, y, x, As, Bs, b, spec: run(
        y, x, As[:1], Bs[:1], b[:1], spec._replace(counts=[len(spec.order)], scalings=spec.scalings[:1])
    ),
}


def _last(B):
    kept = B.clone()
    kept[:, -1] = 0
    return kept


PLANTED = replace(BATCH, name="planted_mixed", ranks=(5, 16, 9), lead=(41,), N=72)


@with_dtypes
@pytest.mark.parametrize("fault", [None, *FAULTS], ids=str)
def test_the_contract_rejects_faults(fault, dtypes, monkeypatch):
    if fault:
        right = backend.forward
        monkeypatch.setattr(backend, "forward", lambda *args: FAULTS[fault](right, *args))
    rejected = numerics.failures(numerics.default_verdicts(numerics.Provider("torch"), PLANTED, dtypes))
    assert set(rejected) == ({"y"} if fault else set())


X, Y = torch.zeros(2, 3, 8), torch.zeros(2, 3, 6)
GOOD = Adapter(torch.zeros(4, 8), torch.zeros(6, 4))
BAD = {
    "owners": ((X, Y, [GOOD], [0]), errors.ShapeError, "1 owners for 2 rows"),
    "an owner that is none": ((X, Y, [GOOD], [0, 1]), errors.ShapeError, "number of an adapter"),
    "an owner below": ((X, Y, [GOOD], [0, -2]), errors.ShapeError, "number of an adapter"),
    "base": ((X, Y[:1], [GOOD], [0, 0]), errors.ShapeError, "base layer's output"),
    "one row": ((X[0, 0], Y[0, 0], [GOOD], [0]), errors.ShapeError, "base layer's output"),
    "A": ((X, Y, [GOOD._replace(A=torch.zeros(4, 7))], [0, 0]), errors.ShapeError, "belongs to this layer"),
    "B": ((X, Y, [GOOD._replace(B=torch.zeros(6, 3))], [0, 0]), errors.ShapeError, "belongs to this layer"),
    "rank": ((X, Y, [Adapter(torch.zeros(0, 8), torch.zeros(6, 0))], [0, 0]), errors.ShapeError, "r = 0"),
    "bias": ((X, Y, [GOOD._replace(bias=torch.zeros(5))], [0, 0]), errors.ShapeError, "lora_B's own bias"),
    "scaling": ((X, Y, [GOOD._replace(scaling=torch.ones(2))], [0, 0]), errors.ShapeError, "one scaling"),
    "dropout": ((X, Y, [GOOD._replace(p=0.1)], [0, 0]), errors.SettingsError, "call eval"),
    "two dtypes": ((X, Y, [GOOD._replace(A=GOOD.A.double())], [0, 0]), errors.DtypeError, "one float dtype"),
    "whole numbers": ((X, Y.int(), [GOOD], [0, 0]), errors.DtypeError, "base of torch.int32"),
    "booleans": ((X.bool(), Y, [GOOD], [0, 0]), errors.DtypeError, "or tokens"),
    "meta": ((X, Y, [GOOD._replace(A=GOOD.A.to("meta"))], [0, 0]), errors.DeviceError, "to_empty"),
}


@pytest.mark.parametrize("args, kind, words", BAD.values(), ids=BAD)
def test_refused(args, kind, words):
    with pytest.raises(kind, match=words):
        lora_mixed(*args)


@numerics.each(WORDS)
@pytest.mark.parametrize("token", [61, -1])
def test_a_token_that_is_none_is_never_read(provider, case, token):
    ids, base, adapters, owners = make(case, "f32")
    ids[3, 2] = token
    if provider.backend in numerics.GPU_BACKENDS:
        pytest.skip("a device raises nothing: such a row is NaN")
    with provider.active(), pytest.raises((IndexError, RuntimeError)):
        provider(ids, base, adapters, owners, op="lora_mixed")


def test_what_is_picked_and_counted():
    before = fast_calls()
    lora_mixed(X, Y.clone(), [GOOD], [0, -1])
    assert fast_calls() == before + 1
    choice = dispatch.pick(X, X.dtype, Y, [GOOD.A], op="lora_mixed")
    assert (choice.backend, choice.plan) == (
        "cpu" if not dispatch.cpu_refuses(X, X.dtype, Y) else "torch",
        "accumulate",
    )
    assert dispatch.pick(X, torch.float64, Y.double(), op="lora_mixed").backend == "torch"
