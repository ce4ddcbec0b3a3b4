"""Relations between calls that need no truth: equal bits where the mathematics says equal."""

from dataclasses import replace

import pytest
import torch

from tests import cases_lora_embedding, cases_lora_group, cases_lora_mlp, numerics
from tests.cases import Case
from tests.inputs import DTYPES, Layer

PROVIDERS = numerics.providers()
KINDS = ["f32", "bf16", "bf16_f32_adapters"]
PLAIN = Case("plain", lead=(67,), K=130, N=72, ranks=(8,), p=(0.0,), bias=True)
DROPPED = replace(PLAIN, name="dropped_rows", p=(0.3,))
FEW = Case("few", lead=(5,), K=130, N=515, ranks=(8,), p=(0.3,), bias=True)
LARGE = Case("large", lead=(300,), K=260, N=200, ranks=(16, 3), p=(0.2, 0.0), scaling=(2.0, 1.0), bias=True)
QKV = (Layer(72, bias=True), Layer(24), Layer(25, (), (), ()))
GROUP = cases_lora_group.Case("group_rows", QKV, lead=(67,), K=130)
GATED = cases_lora_mlp.Case("mlp_rows", gate=QKV[0], up=QKV[1], down=QKV[2], lead=(67,), K=130, I=72)
TABLE = cases_lora_embedding.Case("embedding_rows", lead=(67,), V=130, D=72, padding_idx=5, scale=2.5)
MANY = Layer(200, (16, 3), (0.2, 0.0), (2.0, 1.0), bias=True)
LARGE_GROUP = cases_lora_group.Case("large_group", (MANY, QKV[2], replace(MANY, N=65)), lead=(300,), K=260)
LARGE_MLP = cases_lora_mlp.Case("large_mlp", gate=MANY, up=QKV[2], down=MANY, lead=(300,), K=96, I=260, p=0.1)
LARGE_TABLE = cases_lora_embedding.Case("large_embedding", lead=(1300,), V=900, D=72, ranks=(16,))
LARGEST = LARGE, LARGE_GROUP, LARGE_MLP, LARGE_TABLE

with_dtypes = pytest.mark.parametrize("dtypes", KINDS)


def make(case, dtypes):
    return numerics.problem(case, DTYPES[dtypes])


def forward(provider, p, **changed):
    """The outputs as a list, with other leaves than the problem's."""
    ys = numerics.call(p, provider, p.tensors | changed)
    return list(ys) if isinstance(ys, tuple) else [ys]


@pytest.mark.parametrize("provider", PROVIDERS)
@with_dtypes
@pytest.mark.parametrize("dropped", [0.0, 0.3])
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("lead", [(67,), (1,), (2, 100)], ids=str)
def test_zero_B_gives_the_base(provider, dtypes, dropped, transposed, lead):
    p = make(replace(PLAIN, p=(dropped,), transposed=transposed, lead=lead), dtypes)
    t = p.tensors
    with provider.active(), torch.no_grad():
        (y,) = forward(provider, p, B0=torch.zeros_like(t["B0"]))
        base = provider(t["x"], t["W"], t["bias"], [], transposed=transposed)
    assert_base(y, base, dtypes, provider)


@numerics.each(GROUP, TABLE)
@with_dtypes
def test_zero_B_gives_the_bases(provider, case, dtypes):
    p = make(case, dtypes)
    zeros = {n: torch.zeros_like(t) for n, t in p.tensors.items() if "B" in n}
    with provider.active(), torch.no_grad():
        ys = forward(provider, p, **zeros)
        if case is TABLE:
            bases = [(p.tensors["W"][p.tensors["ids"]] * torch.tensor(case.scale)).to(ys[0].dtype)]
        else:
            bare = replace(case, layers=tuple(replace(layer, ranks=(), p=(), scaling=()) for layer in case.layers))
            bases = bare.ours(provider, p.tensors)
    for y, base in zip(ys, bases, strict=True):
        assert_base(y, base, dtypes, provider)


def assert_base(y, base, dtypes, provider):
    if numerics.DEVICE.type == "cpu" and provider.plan != "augmented":
        assert numerics.same_bits(y, base)
    else:  # a vendor's GEMM with an addend, or of a longer inner dimension, may be another kernel than the one without
        assert_close(y, base, dtypes)


@numerics.each(GROUP)
@with_dtypes
@pytest.mark.parametrize("dropped", [0.0, 0.3])
def test_a_group_gives_what_its_layers_give(provider, case, dtypes, dropped):
    """One by one, with the masks of the group: equal within a rounding; a group of one is lora_linear, bit by bit."""
    layers = [layer if not layer.ranks else replace(layer, p=(dropped,)) for layer in case.layers]
    for members in (layers, layers[:1]):
        p = make(replace(case, layers=tuple(members)), dtypes)
        with provider.active():
            ys = forward(provider, p)
            torch.manual_seed(p.seed)
            for i, (layer, y) in enumerate(zip(members, ys, strict=True)):
                W, bias, adapters, transposed = layer.sibling(p.tensors, f"{i}_")
                if dropped and i:  # the seeds of a group are drawn at once
                    continue
                alone = provider(p.tensors["x"], W, bias, adapters, transposed=transposed)
                assert_close(y, alone, dtypes)
                if len(members) == 1:
                    assert numerics.same_bits(y, alone)


@numerics.each(PLAIN, GROUP, GATED, TABLE)
@with_dtypes
def test_permuted_tokens(provider, case, dtypes):
    p = make(case, dtypes)
    order = torch.randperm(67)
    name = "ids" if "ids" in p.tensors else "x"
    with provider.active():
        ys = forward(provider, p)
        moved = p.tensors[name].detach()[order].requires_grad_(name == "x")
        zs = forward(provider, p, **{name: moved})
        for y, z in zip(ys, zs, strict=True):
            assert_close(z, y[order], dtypes)
        if name == "x":
            gs = list(p.gs.values())
            (dx,) = torch.autograd.grad(ys, [p.tensors["x"]], gs)
            (dz,) = torch.autograd.grad(zs, [moved], [g[order] for g in gs])
            assert_close(dz, dx[order], dtypes, 2 if case is GATED else 1)


@numerics.each(PLAIN, GROUP, GATED, TABLE)
@with_dtypes
@pytest.mark.parametrize("cut", [1, 16, 33])
def test_split_batch(provider, case, dtypes, cut):
    p = make(case, dtypes)
    name = "ids" if "ids" in p.tensors else "x"
    x = p.tensors[name].detach()
    with provider.active():
        whole = numerics.ours(p, provider)
        parts = []
        for rows in (slice(None, cut), slice(cut, None)):
            leaves = p.tensors | {name: x[rows].requires_grad_(name == "x")}
            gs = {n: g[rows] for n, g in p.gs.items()}
            parts.append(p.run(lambda t: forward(provider, p, **t), leaves, gs))
    # one rounding more between x and y, and in each of the factors of a gradient
    chain = 4 if case is GATED else 1
    for out in whole:
        if out in p.gs or out == "dx":
            assert_close(torch.cat([part[out] for part in parts]), whole[out], dtypes, chain)
        else:  # a sum of two roundings against one: twice the distance of a single output
            assert_close(parts[0][out] + parts[1][out], whole[out], dtypes, 4 * chain)


@numerics.each(PLAIN, DROPPED, *LARGEST)
@with_dtypes
def test_twice_the_same_bits(provider, case, dtypes):
    p = make(case, dtypes)
    with provider.active():
        first, again = numerics.ours(p, provider), numerics.ours(p, provider)
    assert all(numerics.same_bits(first[n], again[n]) for n in first)


@numerics.each(DROPPED, GROUP, GATED, TABLE)
@with_dtypes
def test_scratch_memory_never_shows(provider, case, dtypes):
    """Larger calls full of NaN in between leave no trace."""
    p = make(case, dtypes)
    with provider.active():
        first = numerics.ours(p, provider)
        for large in (replace(LARGE, transposed=True), LARGE_GROUP, LARGE_MLP):
            other = make(large, dtypes)
            nan = {n: torch.full_like(t, torch.nan).requires_grad_(t.requires_grad) for n, t in other.tensors.items()}
            out = other.run(lambda t, other=other: forward(provider, other, **t), nan)
            assert all(out[n].isnan().all() for n in other.gs)
        again = numerics.ours(p, provider)
    assert all(numerics.same_bits(first[n], again[n]) for n in first)


# torch's own GEMMs may split K by the number of threads
@numerics.each(
    PLAIN,
    DROPPED,
    LARGE,
    FEW,
    replace(FEW, name="thirteen", lead=(13,)),
    LARGE_GROUP,
    LARGE_MLP,
    LARGE_TABLE,
    only="cpu",
)
@with_dtypes
def test_threads_give_the_same_bits(provider, case, dtypes):
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


@numerics.each(PLAIN, DROPPED, GROUP, GATED)
@with_dtypes
@pytest.mark.parametrize(
    ("row", "value"),
    # the first row, one inside a tile, the last one, which shares its tile with rows that are not there
    [(0, torch.nan), (13, torch.nan), (66, torch.nan), (13, -torch.inf), (66, torch.inf)],
    ids=["0-nan", "13-nan", "66-nan", "13-minus_inf", "66-inf"],
)
def test_bad_token_stays_in_its_row(provider, case, dtypes, value, row):
    p = make(case, dtypes)
    x = p.tensors["x"].detach().clone()
    x[row, 5] = value
    with provider.active():
        clean = forward(provider, p)
        bad = forward(provider, p, x=x.requires_grad_())
        # silu(-inf) = 0: infinite values may end in a block's gate
        for y, z in zip(clean, bad, strict=True):
            assert_only(row, z, y, everywhere=case is not GATED or value != value)
        gs = [g.clone() for g in p.gs.values()]
        for g in gs:
            g[row, 3] = value
        (dx,) = torch.autograd.grad(clean, [p.tensors["x"]], list(p.gs.values()), retain_graph=True)
        (dz,) = torch.autograd.grad(clean, [p.tensors["x"]], gs)
        assert_only(row, dz, dx)


@numerics.each(TABLE)
@with_dtypes
def test_a_bad_word_stays_in_its_rows(provider, case, dtypes):
    """NaN in one word's column of A reaches the tokens of that word, and of the gradients dB alone."""
    p = make(case, dtypes)
    word = p.tensors["ids"][13].item()
    with provider.active():
        clean = numerics.ours(p, provider)
        p.tensors["A0"].data[:, word] = torch.nan
        bad = numerics.ours(p, provider)
    its = p.tensors["ids"] == word
    assert bad["y"][its].isnan().all() and bad["dB0"].isnan().all()
    assert torch.equal(bad["y"][~its], clean["y"][~its]) and numerics.same_bits(bad["dA0"], clean["dA0"])


def assert_only(row, bad, clean, everywhere=True):
    finite = bad.isfinite()
    assert not everywhere or not finite[row].any(), "the whole row of the bad token is bad"
    others = torch.arange(len(clean)) != row
    assert torch.equal(bad[others], clean[others]), "other rows keep their bits"


def assert_close(a, b, dtypes, factor=1.0):
    """Within two roundings of the activations' dtype at the size of the tensor's largest values."""
    eps = torch.finfo(DTYPES[dtypes].compute).eps * (8 if dtypes == "f32" else 1)
    assert a.shape == b.shape
    assert (a.double() - b.double()).abs().max() <= factor * eps * b.double().abs().max()
