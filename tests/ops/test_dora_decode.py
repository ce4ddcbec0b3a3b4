"""dora_decode: the numeric contract on every instruction set, what it leaves to dora_linear, and the probe."""

import pytest
import torch

from peft_fast import native, ops
from peft_fast.errors import ShapeError
from peft_fast.ops import Adapter, dora_decode, dora_linear, dora_norm
from peft_fast.ops.dora_decode import probe, probed
from tests import cases_dora_decode as table
from tests import numerics
from tests.inputs import DTYPES
from tests.numerics import Provider

pytestmark = [
    pytest.mark.skipif(not native.load(), reason=f"the compiled operators: {native.reason()}"),
    pytest.mark.skipif(numerics.DEVICE.type != "cpu", reason="about the compiled operator"),
]

ISAS = [Provider("cpu", isa=isa) for isa in numerics.isas()]
ROWS = [
    pytest.param(provider, case, dtypes, id=f"{provider}-{dtypes}-{case.name}")
    for case, dtypes in table.rows()
    for provider in ISAS
    if DTYPES[dtypes].compute in (torch.float32, torch.bfloat16)
    if provider is ISAS[-1] or case in table.CORNERS
]


@pytest.mark.parametrize(("provider", "case", "dtypes"), ROWS)
def test_no_less_accurate_than_peft(provider, case, dtypes):
    before = ops.fast_calls()
    assert not numerics.failures(numerics.default_verdicts(provider, case, dtypes))
    assert ops.fast_calls() > before


@pytest.mark.parametrize("case", table.EMPTY, ids=lambda case: case.name)
def test_no_tokens(case):
    problem = numerics.problem(case, DTYPES["bf16_f32_adapters"])
    out = numerics.ours(problem, ISAS[-1])
    assert {name: t.shape for name, t in out.items()} == {n: torch.Size(s) for n, s in case.outputs().items()}


# fault -> what it makes of the adapter, m and y, planted around the operator
FAULTS = {
    "scale off by 1 %": lambda a, m: (a._replace(scaling=a.scaling * 1.01), m),
    "no scale": lambda a, m: (a._replace(scaling=1.0), m),
    "sign": lambda a, m: (a._replace(B=-a.B), m),
    "magnitudes off by 1 %": lambda a, m: (a, m * 1.01),
    "one magnitude": lambda a, m: (a, torch.cat([m[1:2], m[1:]])),
}


@pytest.mark.parametrize("dtypes", ["f32", "bf16_f32_adapters"])
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_rejected(fault, dtypes):
    case = table.Case("planted", lead=(7,), K=130, N=90, ranks=(5,), bias=True)

    def faulty(x, W, bias, adapter, m, norm, **options):
        adapter, m = FAULTS[fault](adapter, m)
        return dora_decode(x, W, bias, adapter, m, norm, transposed=options["transposed"])

    assert numerics.failures(numerics.verdicts(faulty, case, dtypes, round_adapters=False))


def tensors(M=3, K=70, N=50, dtype=torch.bfloat16, r=4, seed=0):
    """x, W, bias, adapter, m, norm."""
    of = torch.Generator().manual_seed(seed)
    x, W, bias, A, B = (torch.randn(*s, generator=of) for s in ((M, K), (N, K), (N,), (r, K), (N, r)))
    W, adapter = W.to(dtype), Adapter(A, B, 0.5)
    norm = dora_norm(W, adapter)
    return x.to(dtype), W, bias.to(dtype), adapter, norm * (1 + 0.1 * torch.rand(N, generator=of)), norm


def test_what_it_leaves_to_dora_linear():
    """Gradients, dropout, dtypes without a kernel, and backends by name."""
    x, W, bias, adapter, m, norm = tensors(dtype=torch.float32)
    m.requires_grad_()
    y = dora_decode(x, W, bias, adapter, m, norm)
    assert y.requires_grad
    torch.testing.assert_close(y, dora_linear(x, W, bias, adapter, m, norm=norm))
    with torch.no_grad():
        expected = dora_linear(x, W, bias, adapter, m, norm=norm)
        torch.testing.assert_close(dora_decode(x, W, bias, adapter, m, norm), expected)
        for backend in ("torch", "reference"):
            found = dora_decode(x, W, bias, adapter, m, norm, backend=backend)
            assert torch.equal(found, dora_linear(x, W, bias, adapter, m, norm=norm, backend=backend))
        torch.manual_seed(5)
        dropped = dora_decode(x, W, bias, adapter._replace(p=0.5), m, norm)
        torch.manual_seed(5)
        assert torch.equal(dropped, dora_linear(x, W, bias, adapter._replace(p=0.5), m, norm=norm))
        wide = [t.double() for t in (x, W, bias, m, norm)]
        low = Adapter(adapter.A.double(), adapter.B.double(), torch.tensor(0.5))
        found = dora_decode(*wide[:3], low, *wide[3:])
        assert found.dtype is torch.float64
        torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-5)
        tensor = adapter._replace(scaling=torch.tensor(0.5))
        torch.testing.assert_close(dora_decode(x, W, bias, tensor, m, norm), expected)


@pytest.mark.parametrize("name", ["m", "norm"])
def test_columns_that_do_not_fit(name):
    x, W, bias, adapter, m, norm = tensors()
    given = {"m": m, "norm": norm} | {name: torch.ones(3)}
    with pytest.raises(ShapeError, match=f"{name} \\(3,\\)"):
        dora_decode(x, W, bias, adapter, **given)


def test_the_probe_is_exact_in_bfloat16_and_always_the_same():
    for K in (1, 33, 1000):
        assert torch.equal(probe(K), probe(K).bfloat16().float())
        assert probe(K).abs().min() >= 1 and probe(K).abs().max() < 2
    state = torch.get_rng_state()
    probe.cache_clear()
    first = probe(33)
    probe.cache_clear()
    assert torch.equal(first, probe(33)) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("isa", numerics.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M", [1, 2, 5, 8, 9])
def test_what_the_probe_gives(M, dtype, isa):
    """The product with W + s·B·A, always with the same bits, and y is what it is without a probe beside it."""
    x, W, bias, adapter, m, norm = tensors(M, K=170, dtype=dtype)
    with numerics.Provider("cpu", isa=isa).active():
        y, check = probed(x, W, bias, adapter, m, norm, False)
        for _ in range(3):
            again = probed(x, W, bias, adapter, m, norm, False)
            assert torch.equal(again[0], y) and torch.equal(again[1], check)
        alone = dora_decode(x, W, bias, adapter, m, norm, backend="cpu")
    whole = W.double() + 0.5 * (adapter.B.double() @ adapter.A.double())
    expected = whole @ probe(170).double()
    assert (check - expected).abs().max() <= 1e-6 * whole.norm(dim=1).max() * 170**0.5
    eps = torch.finfo(dtype).eps
    assert (y.double() - alone.double()).abs().max() <= (
        eps if dtype is torch.bfloat16 else 16 * eps
    ) * alone.double().abs().max()


@pytest.mark.parametrize(("dtype", "units"), [(torch.float32, 1), (torch.float32, 1 << 12), (torch.bfloat16, 1)])
def test_the_probe_tells_every_change_that_a_norm_tells(dtype, units):
    """Units in the last place of one element: a row keeps its bits only where its norm does not change either."""
    x, W, bias, adapter, m, norm = tensors(1, K=300, N=64, dtype=dtype)
    W.div_(300**0.5)
    told = 0
    for seed in range(40):
        changed = W.clone()
        of = torch.Generator().manual_seed(seed)
        n, k = (int(torch.randint(0, size, (), generator=of)) for size in W.shape)
        bits = changed.view(torch.int32 if dtype is torch.float32 else torch.int16)
        bits[n, k] += units
        found = [probed(x, w, bias, adapter, m, norm, False)[1] for w in (W, changed)]
        rows = (found[0] != found[1]).nonzero().flatten().tolist()
        assert rows in ([], [n])
        told += bool(rows)
        truth = [(w.double() + 0.5 * adapter.B.double() @ adapter.A.double()).norm(dim=1) for w in (W, changed)]
        moved = ((truth[0] - truth[1]).abs() / truth[0]).max()
        assert rows or moved < torch.finfo(torch.float32).eps, (seed, moved)
    assert told > 35 or (dtype is torch.float32 and units == 1)  # which moves no norm
    A, B, s = adapter.A, adapter.B, 0.5
    before = probed(x, W, bias, adapter, m, norm, False)[1]
    for a, b, scaling in ((A.roll(1, 0), B, s), (A, -B, s), (A, B.roll(1, 0), s), (A, B, -s)):
        assert (probed(x, W, bias, Adapter(a, b, scaling), m, norm, False)[1] != before).float().mean() > 0.9
