"""The numeric contract of the Triton backend, kernel by kernel in Python: every plan, every dtype, awkward shapes."""

from dataclasses import replace

import pytest
import torch

from peft_fast import ops, settings
from peft_fast.backends.triton import lora_linear, tuning
from peft_fast.kernels import skinny, split, tiles
from peft_fast.ops import Adapter, draw_seed, dropout_mask
from peft_fast.reference.dropout import keep_mask
from tests import numerics
from tests.cases import DTYPES, EMPTY, Case

PROVIDERS = numerics.gpu_providers()
PLAIN = Case("plain", lead=(67,), K=130, N=72, ranks=(8,), p=(0.0,), bias=True)
CASES = [
    Case("one_token", lead=(1,), K=40, N=24, ranks=(3,), p=(0.1,), bias=True),
    Case("prime_tokens", lead=(61,), K=67, N=131, ranks=(1,), p=(0.0,)),
    Case("rank_16", lead=(3, 23), K=160, N=96, ranks=(16,), p=(0.1,), bias=True),
    Case("rank_17", lead=(45,), K=257, N=65, ranks=(17,), p=(0.5,)),
    Case("rank_64", lead=(35,), K=50, N=60, ranks=(64,), p=(0.0,)),
    Case("rank_of_two_blocks", lead=(35,), K=50, N=60, ranks=(150,), p=(0.1,)),
    Case("rank_256", lead=(19,), K=140, N=66, ranks=(256,), p=(0.1,)),
    # so long that the sums are divided among programs: over K for H, over N for D, over tokens for dA and dB
    Case("split_columns", lead=(7,), K=1170, N=40, ranks=(5,), p=(0.1,)),
    Case("split_columns_of_dy", lead=(7,), K=40, N=1030, ranks=(40,), p=(0.0,)),
    Case("split_tokens", lead=(301,), K=90, N=50, ranks=(6,), p=(0.1,), bias=True),
    Case("two_adapters", lead=(47,), K=140, N=70, ranks=(3, 16), p=(0.1, 0.5), scaling=(0.5, 3.0)),
    Case(
        "three_adapters",
        lead=(41,),
        K=70,
        N=66,
        ranks=(2, 17, 8),
        p=(0.5, 0.0, 1.0),
        scaling=(0.5, -1.25, 3.0),
        bias=True,
        adapter_bias=True,
    ),
    Case("conv1d", lead=(37,), K=48, N=40, transposed=True, bias=True, p=(0.1,)),
    Case("base_trains", lead=(37,), base_trains=True, bias=True, p=(0.3,)),
    Case("no_adapter", lead=(61,), ranks=(), p=(), scaling=(), bias=True),
    Case("positive", lead=(61,), positive=True, p=(0.1,), bias=True),
    Case(
        "awkward_views",
        lead=(3, 13),
        K=40,
        N=56,
        bias=True,
        p=(0.2,),
        layout={"x": "permuted", "W": "columns", "A": "transposed", "B": "columns", "g": "permuted"},
    ),
    Case(
        "strided_views",
        lead=(23,),
        K=40,
        N=56,
        bias=True,
        p=(0.2,),
        layout={
            "x": "every_other",
            "W": "every_other",
            "bias": "every_other",
            "A": "offset",
            "B": "transposed",
            "g": "expanded",
        },
    ),
]
KINDS = ["f32", "f16", "bf16", "bf16_f32_adapters", "f16_f32_adapters_autocast"]
# where a kernel reads does not depend on the dtype, nor what it rounds on the shape: every case in two dtypes, and
# these in all
IN_ALL = "one_token rank_17 rank_of_two_blocks split_tokens three_adapters base_trains awkward_views".split()
ROWS = [
    pytest.param(case, dtypes, id=f"{dtypes}-{case.name}")
    for dtypes in KINDS
    for case in CASES
    if case.name in IN_ALL or dtypes in ("f32", "bf16_f32_adapters")
]
pytestmark = [
    pytest.mark.parametrize("provider", PROVIDERS, ids=str),
    pytest.mark.usefixtures("poisoned_memory", "no_call_left_to_torch"),
]


@pytest.mark.parametrize(("case", "dtypes"), ROWS)
def test_no_less_accurate_than_peft(provider, case, dtypes):
    assert not numerics.failures(numerics.default_verdicts(provider, case, dtypes))


def test_long_sums_are_divided(provider, monkeypatch):
    counts = []
    monkeypatch.setattr(skinny, "split", lambda *args: counts.append(split.split(*args)[0]) or split.split(*args))
    for name in ("split_columns", "split_columns_of_dy", "split_tokens"):
        counts.clear()
        numerics.ours(numerics.problem(next(c for c in CASES if c.name == name), DTYPES["f32"]), provider)
        assert max(counts) > 1


@pytest.mark.parametrize("dtypes", ["f32_autocast", "bf16_f32_adapters_f32_x_autocast"])
def test_under_autocast(provider, dtypes):
    case = numerics.by_name("three_adapters")
    assert not numerics.failures(numerics.default_verdicts(provider, case, dtypes))


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("dtypes", ["f32", "bf16"])
def test_other_tiles(provider, which, dtypes):
    """Narrower, persistent and descriptor variants, by the way a tuning file takes."""
    # rows of 16 bytes and more, which descriptors ask for
    case = Case("other_tiles", lead=(67,), K=200, N=264, ranks=(16, 3), p=(0.5, 0.0), scaling=(2.0, 0.5), bias=True)
    name, entries = tiles.dtype_name(DTYPES[dtypes].compute), {}
    for op in tiles.OPS:
        for rank in (0, *case.ranks, sum(case.ranks)):
            for dropout in (False, True):
                shape = tiles.shape_class(op, 1, case.K, case.N, rank, dropout)
                found = tiles.candidates(op, shape, name, "interpreter")
                entries[op, shape, name] = found[min(which, len(found) - 1)]
    with tuning.using(entries):
        assert not numerics.failures(numerics.default_verdicts(provider, case, dtypes))


@pytest.mark.parametrize("dtypes", KINDS)
@pytest.mark.parametrize("case", EMPTY, ids=lambda c: c.name)
def test_no_tokens(provider, case, dtypes):
    p = numerics.problem(case, DTYPES[dtypes])
    out = numerics.ours(p, provider)
    assert out["y"].shape == (*case.lead, case.N)
    for name, t in p.tensors.items():
        if t.requires_grad:
            assert numerics.same_bits(out[f"d{name}"], torch.zeros_like(t))


@pytest.mark.parametrize("dtypes", ["f32", "bf16_f32_adapters"])
@pytest.mark.parametrize("name", ["rank_17", "three_adapters"])
def test_twice_the_same_bits(provider, name, dtypes):
    p = numerics.problem(next(c for c in CASES if c.name == name), DTYPES[dtypes])
    first, again = numerics.ours(p, provider), numerics.ours(p, provider)
    assert all(numerics.same_bits(first[n], again[n]) for n in first)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (67, 131), (5, 300)], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_one_mask_everywhere(provider, shape, p):
    """The mask kernel's, the forward's and the backward's are the reference's, bit for bit."""
    M, K = shape
    torch.manual_seed(4)
    seed = draw_seed(1)
    mask = keep_mask(seed[0], M, K, p)
    assert torch.equal(torch.ops.peft_fast.triton_dropout_mask(seed[0], M, K, p), mask)
    # with A = B = I and W = 0, y of all ones and dx of all ones are the scaled mask
    eye, x = torch.eye(K), torch.ones(M, K, requires_grad=True)
    torch.manual_seed(4)
    y = provider(x, torch.zeros(K, K), None, [Adapter(eye, eye, 1.0, p)])
    (dx,) = torch.autograd.grad(y, [x], torch.ones_like(y))
    assert torch.equal(y != 0, mask) and torch.equal(dx != 0, mask)


def test_a_bad_token_stays_in_its_row(provider):
    p = numerics.problem(replace(PLAIN, p=(0.3,)), DTYPES["f32"])
    clean = numerics.ours(p, provider)
    p.tensors["x"].data[13, 5] = torch.nan
    p.g[13, 3] = torch.nan
    bad = numerics.ours(p, provider)
    others = torch.arange(67) != 13
    for name in ("y", "dx"):
        assert bad[name][13].isnan().all() and torch.equal(bad[name][others], clean[name][others])


def test_zero_B_gives_the_base(provider):
    p = numerics.problem(PLAIN, DTYPES["bf16"])
    t = p.tensors
    y = provider(t["x"], t["W"], t["bias"], [Adapter(t["A0"], torch.zeros_like(t["B0"]), 2.0)])
    assert numerics.same_bits(y, provider(t["x"], t["W"], t["bias"], []))


SUBJECT = Case("subject", lead=(67,), K=130, N=72, ranks=(16,), p=(0.3,), bias=True)


def rescaled(factor):
    return lambda a: a._replace(scaling=a.scaling * factor(a))


# fault -> (what the caller changes in x and each adapter, outputs that must be rejected)
FAULTS = {
    "none": (None, None, ()),
    "scale off by 1 %": (None, rescaled(lambda a: 1.01), ("y", "dx", "dA0", "dB0")),
    "no 1/(1-p)": (None, rescaled(lambda a: 1 - a.p), ("y", "dx", "dA0", "dB0")),
    "last K column skipped": (lambda x: torch.cat((x[..., :-1], torch.zeros_like(x[..., -1:])), -1), None, ("y", "dx")),
    "last row skipped": (lambda x: torch.cat((x[:-1], torch.zeros_like(x[-1:]))), None, ("y", "dx")),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtypes", ["bf16", "f16_f32_adapters_autocast"])
def test_planted_faults_are_rejected(provider, fault, dtypes):
    in_x, in_adapter, outputs = FAULTS[fault]

    def faulty(x, W, bias, adapters, **options):
        x = x if in_x is None else in_x(x)
        return provider(x, W, bias, adapters if in_adapter is None else [in_adapter(a) for a in adapters], **options)

    found = numerics.verdicts(faulty, SUBJECT, dtypes, DTYPES[dtypes].mixed)
    assert set(outputs) <= set(numerics.failures(found)) and bool(outputs) == bool(numerics.failures(found))


def test_another_mask_in_backward_is_rejected(provider, monkeypatch):
    run = lora_linear.run_backward
    monkeypatch.setattr(lora_linear, "run_backward", lambda *args: run(*args[:7], args[7] + 1, *args[8:]))
    rejected = numerics.failures(numerics.verdicts(provider, SUBJECT, "bf16", False))
    assert set(rejected) == {"dx", "dA0"}


def test_a_kernel_that_fails_falls_back_with_its_reason(provider, monkeypatch):
    def broken(*_):
        raise RuntimeError("PTXAS error: planted")

    with monkeypatch.context() as planted:
        planted.setattr(lora_linear.guarded, "failed", {})
        planted.setattr(lora_linear, "run_forward", broken)
        planted.setattr(lora_linear, "run_backward", broken)
        with pytest.warns(RuntimeWarning, match="planted"):
            assert not numerics.failures(numerics.default_verdicts(provider, SUBJECT, "bf16"))
        assert any("planted" in reason for reason in lora_linear.failures())


def test_settings_take_it_by_name(provider):
    with settings.override(backend="triton"):
        y = ops.lora_linear(torch.ones(2, 8), torch.ones(4, 8))
    assert torch.equal(y, torch.full((2, 4), 8.0))
    assert dropout_mask(torch.tensor(3), 5, 9, 0.5).shape == (5, 9)
