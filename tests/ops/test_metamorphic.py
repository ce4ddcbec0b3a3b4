"""Relations between calls that need no truth: equal bits where the mathematics says equal."""

from dataclasses import replace

import pytest
import torch

from tests import numerics
from tests.cases import DTYPES, Case

PROVIDERS = numerics.providers()
KINDS = ["f32", "bf16", "bf16_f32_adapters"]
PLAIN = Case("plain", lead=(67,), K=130, N=72, ranks=(8,), p=(0.0,), bias=True)
DROPPED = replace(PLAIN, name="dropped_rows", p=(0.3,))
FEW = Case("few", lead=(5,), K=130, N=515, ranks=(8,), p=(0.3,), bias=True)
LARGE = Case("large", lead=(300,), K=260, N=200, ranks=(16, 3), p=(0.2, 0.0), scaling=(2.0, 1.0), bias=True)

pytestmark = pytest.mark.parametrize("provider", PROVIDERS)
with_dtypes = pytest.mark.parametrize("dtypes", KINDS)


def make(case, dtypes):
    return numerics.problem(case, DTYPES[dtypes])


def forward(provider, p, **changed):
    t = p.tensors | changed
    torch.manual_seed(p.seed)
    return provider(t["x"], t["W"], t.get("bias"), p.adapters(t), transposed=p.case.transposed)


@with_dtypes
@pytest.mark.parametrize("dropped", [0.0, 0.3])
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("lead", [(67,), (1,), (2, 100)], ids=str)
def test_zero_B_gives_the_base(provider, dtypes, dropped, transposed, lead):
    p = make(replace(PLAIN, p=(dropped,), transposed=transposed, lead=lead), dtypes)
    t = p.tensors
    with provider.active(), torch.no_grad():
        y = forward(provider, p, B0=torch.zeros_like(t["B0"]))
        base = provider(t["x"], t["W"], t["bias"], [], transposed=transposed)
    if numerics.DEVICE.type == "cpu":
        assert numerics.same_bits(y, base)
    else:  # a vendor's GEMM with an addend may be another kernel than the one without
        assert_close(y, base, dtypes)


@with_dtypes
def test_permuted_tokens(provider, dtypes):
    p = make(PLAIN, dtypes)
    order = torch.randperm(67)
    x, g = p.tensors["x"], p.g
    with provider.active():
        y = forward(provider, p)
        (dx,) = torch.autograd.grad(y, [x], g)
        moved = x.detach()[order].requires_grad_()
        z = forward(provider, p, x=moved)
        (dz,) = torch.autograd.grad(z, [moved], g[order])
    assert_close(z, y[order], dtypes)
    assert_close(dz, dx[order], dtypes)


@with_dtypes
@pytest.mark.parametrize("cut", [1, 16, 33])
def test_split_batch(provider, dtypes, cut):
    p = make(PLAIN, dtypes)
    x = p.tensors["x"].detach()
    with provider.active():
        whole = numerics.ours(p, provider)
        parts = []
        for rows in (slice(None, cut), slice(cut, None)):
            leaves = p.tensors | {"x": x[rows].requires_grad_()}
            parts.append(p.run(lambda t: forward(provider, p, **t), leaves, p.g[rows]))
    for name in ("y", "dx"):
        assert_close(torch.cat([part[name] for part in parts]), whole[name], dtypes)
    for name in ("dA0", "dB0", "dbias"):
        # a sum of two roundings against one: twice the distance of a single output
        assert_close(parts[0][name] + parts[1][name], whole[name], dtypes, 4)


@with_dtypes
@pytest.mark.parametrize("case", [PLAIN, DROPPED, LARGE], ids=lambda c: c.name)
def test_twice_the_same_bits(provider, dtypes, case):
    p = make(case, dtypes)
    with provider.active():
        first, again = numerics.ours(p, provider), numerics.ours(p, provider)
    assert all(numerics.same_bits(first[n], again[n]) for n in first)


@with_dtypes
def test_scratch_memory_never_shows(provider, dtypes):
    """A larger call full of NaN in between leaves no trace."""
    p, other = make(DROPPED, dtypes), make(replace(LARGE, transposed=True), dtypes)
    nan = {n: torch.full_like(t, torch.nan).requires_grad_(t.requires_grad) for n, t in other.tensors.items()}
    with provider.active():
        first = numerics.ours(p, provider)
        assert other.run(lambda t: forward(provider, other, **t), nan)["y"].isnan().all()
        again = numerics.ours(p, provider)
    assert all(numerics.same_bits(first[n], again[n]) for n in first)


@with_dtypes
@pytest.mark.parametrize(
    "case", [PLAIN, DROPPED, LARGE, FEW, replace(FEW, lead=(13,))], ids=lambda c: f"{c.M}_{c.name}"
)
def test_threads_give_the_same_bits(provider, dtypes, case):
    if provider.backend != "cpu":
        pytest.skip("torch's own GEMMs may split K by the number of threads")
    p = make(case, dtypes)
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8, 31):  # more than blocks of rows: the columns are cut too
            torch.set_num_threads(threads)
            with provider.active():
                outs.append(numerics.ours(p, provider))
    finally:
        torch.set_num_threads(before)
    for other in outs[1:]:
        assert all(numerics.same_bits(outs[0][n], other[n]) for n in other)


@with_dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("row", [0, 13, 66])
@pytest.mark.parametrize("case", [PLAIN, DROPPED], ids=lambda c: c.name)
def test_bad_token_stays_in_its_row(provider, dtypes, value, row, case):
    p = make(case, dtypes)
    x = p.tensors["x"].detach().clone()
    x[row, 5] = value
    with provider.active():
        clean = forward(provider, p)
        y = forward(provider, p, x=x.requires_grad_())
        assert_only(row, y, clean)
        g = p.g.clone()
        g[row, 3] = value
        (dx,) = torch.autograd.grad(clean, [p.tensors["x"]], p.g, retain_graph=True)
        (bad,) = torch.autograd.grad(clean, [p.tensors["x"]], g)
        assert_only(row, bad, dx)


def assert_only(row, bad, clean):
    finite = bad.isfinite()
    assert not finite[row].any(), "the whole row of the bad token is bad"
    others = torch.arange(len(clean)) != row
    assert torch.equal(bad[others], clean[others]), "other rows keep their bits"


def assert_close(a, b, dtypes, factor=1.0):
    """Within two roundings of the activations' dtype at the size of the tensor's largest values."""
    eps = torch.finfo(DTYPES[dtypes].compute).eps * (8 if dtypes == "f32" else 1)
    assert a.shape == b.shape
    assert (a.double() - b.double()).abs().max() <= factor * eps * b.double().abs().max()
