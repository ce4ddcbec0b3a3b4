"""The Hopper GEMM on the host: the real launcher and kernel in a model of the hardware, and what nvcc makes of it."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch

from peft_fast.reference.dropout import keep_mask
from tests.cuda import hopper_model
from tests.cuda.hopper_model import check, operands, truth


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return hopper_model.compiled(tmp_path_factory.mktemp("hopper"))


CASES = {
    "one tile": (256, 256, 64, 0, False, 0.0, None),
    "no adapter, two blocks of columns": (130, 392, 200, 0, True, 0.0, None),
    "r 8": (128, 256, 128, 8, False, 0.0, None),
    "r 16, one row": (1, 264, 136, 16, False, 0.0, torch.bfloat16),
    "r 32, bias": (300, 72, 72, 32, False, 0.0, torch.float32),
    "r 64, turned, bias": (97, 520, 8, 64, True, 0.0, torch.bfloat16),
    "r 72, turned": (513, 256, 328, 72, True, 0.0, None),
    "dropout": (256, 256, 192, 16, True, 0.1, None),
    "dropout, r 136": (270, 8, 264, 136, True, 0.5, None),
    "dropout, more steps than draws": (257, 264, 1160, 8, True, 0.05, None),
    "dropout, weights along the sum": (200, 328, 320, 24, False, 0.25, None),
    "everything dropped": (64, 72, 64, 8, True, 1.0, None),
}


@pytest.mark.parametrize("dtype, sms", ((torch.bfloat16, 2), (torch.float16, 2), (torch.bfloat16, 40)), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(model, case, dtype, sms):
    M, N, K, R, turned, p, bias = CASES[case]
    left, right, low = operands(M, N, K, R, dtype, turned)
    seed = torch.tensor([-7_000_000_000_000_000_123])
    if bias:
        bias = torch.randn(N).to(bias if bias == torch.float32 else dtype)
    keep = keep_mask(seed[0], M, N, p) if p else None
    got, fault = hopper_model.gemm(model, left, right, low, bias, seed, p, turned, order=len(case), sms=sms)
    assert fault == ""
    check(got, *truth(left, right, low, bias, keep, p if p < 1 else 0.0, turned))


@pytest.mark.parametrize("turned", (False, True))
@pytest.mark.parametrize("M, N, sms, wide", ((520, 648, 2, True), (2048, 128, 4, False), (70, 400, 40, False)))
def test_mask_is_the_reference_bit_for_bit(model, turned, M, N, sms, wide):
    assert model.is_wide(M, N, sms // 2) == wide
    p = 0.3
    left, right, low = operands(M, N, 64, 8, torch.float16, turned)
    left.zero_(), low[0].fill_(1.0), low[1].fill_(0.125)
    seed = torch.tensor([2**62 + 12345])
    got, fault = hopper_model.gemm(model, left, right, low, None, seed, p, turned, order=3, sms=sms)
    assert fault == ""
    assert torch.equal(got != 0, keep_mask(seed[0], M, N, p))
    assert torch.equal(got[got != 0].unique(), torch.tensor([1 / (1 - p)]).half())


@pytest.mark.parametrize("eagerness", (0.1, 1.0))
@pytest.mark.parametrize("N, wide", ((512, True), (128, False)))
def test_any_order_gives_the_same_bits(model, N, wide, eagerness):
    # steps: fewer, as many and more than the ring has stages
    for at, (M, K, R) in enumerate(((512, 64, 0), (513, 264, 16), (769, 400, 80))):
        left, right, low = operands(M, N, K, R, torch.bfloat16, True)
        p, seed = (0.5, torch.tensor([at])) if R == 16 else (0.0, None)
        results = []
        for order, clusters in itertools.product(range(2), (1, 2)):
            assert model.is_wide(M, N, clusters) == wide
            got, fault = hopper_model.gemm(
                model, left, right, low, None, seed, p, True, order=order, eagerness=eagerness, sms=2 * clusters + 1
            )
            assert fault == ""
            results.append(got)
        assert all(torch.equal(results[0], other) for other in results)


def test_rows_of_wider_buffers(model):
    """Nothing beyond an operand is read into a sum, nothing beyond the result is written."""
    M, N, K, R = 150, 200, 100, 8
    wide = {}
    for name, shape in {
        "left": (M, K),
        "right": (K, N),
        "low_left": (M, R),
        "low_right": (R, N),
        "out": (M, N),
    }.items():
        wide[name] = torch.full((shape[0], (shape[1] + 15) // 8 * 8), float("nan"), dtype=torch.bfloat16)
        wide[name] = wide[name][:, : shape[1]]
        wide[name].copy_(torch.randn(*shape))
    out = wide.pop("out")
    around = out._base.clone()
    left, right, *low = wide.values()
    got, fault = hopper_model.gemm(model, left, right, low, turned=True, out=out)
    assert fault == ""
    check(got, *truth(left, right, low, turned=True))
    assert torch.equal(out._base[:, N:].isnan(), around[:, N:].isnan())


def test_a_bad_token_stays_in_its_row(model):
    left, right, low = operands(70, 136, 72, 8, torch.bfloat16, False)
    clean, _ = hopper_model.gemm(model, left, right, low)
    left[13, 5], low[0][60, 2] = float("nan"), float("inf")
    got, fault = hopper_model.gemm(model, left, right, low)
    assert fault == ""
    bad = torch.tensor([13, 60])
    assert not got[bad].isfinite().any()
    good = torch.ones(70, dtype=torch.bool)
    good[bad] = False
    assert torch.equal(got[good], clean[good])


def test_what_is_not_taken(model):
    left, right, low = operands(16, 64, 64, 8, torch.bfloat16, False)
    seed = torch.tensor([1])

    def fault(*args, **kwargs):
        return hopper_model.gemm(model, *args, **kwargs)[1]

    assert fault(left, right, low, seed=seed, p=0.5) == ""
    assert "16 bytes" in fault(left[:, 1:], right[:, 1:])
    assert "16 bytes" in fault(left[:, :63].clone(), right[:, :63].clone())
    assert "16 bytes" in fault(left, right, (low[0][:, :3].clone(), low[1][:, :3].clone()))
    assert "16 bytes" in fault(left[:1].expand(16, 64), right)
    assert "bfloat16" in fault(left.float(), right.float())
    assert "seed" in fault(left, right, low, p=0.5)
    assert "without dropout" in fault(left, right, low, torch.zeros(64), seed, 0.5)
    assert "nothing to do" in fault(left[:0], right)


def test_narrow_tiles_where_wide_ones_leave_clusters_without_work(model):
    H100 = 66
    assert all(model.is_wide(M, N, H100) for M, N in ((8192, 4096), (16384, 14336), (2048, 4096), (8192, 1024)))
    assert not any(model.is_wide(M, N, H100) for M, N in ((512, 4096), (8192, 768), (1, 64), (2048, 1024)))


@pytest.mark.parametrize("wide", (False, True))
def test_every_tile_comes_once(model, wide):
    columns = 256 if wide else 128

    def origins(tiles_m, tiles_n):
        to = (ctypes.c_int32 * (2 * tiles_m * tiles_n))()
        model.origins(wide, tiles_m, tiles_n, to)
        return [tuple(to[i : i + 2]) for i in range(0, len(to), 2)]

    for tiles_m, tiles_n in ((1, 1), (3, 5), (8, 4), (9, 3), (16, 2), (29, 7)):
        expected = [(256 * m, columns * n) for m in range(tiles_m) for n in range(tiles_n)]
        assert sorted(origins(tiles_m, tiles_n)) == expected
    # a wave of 66 clusters reads few rows and few columns
    wave = origins(32, 16)[:66]
    assert len({row for row, _ in wave}) + len({column for _, column in wave}) <= 18


def test_operand_descriptions(model):
    """The bits of PTX's matrix descriptor: start, leading and stride in 16 bytes, swizzle of 128 bytes."""
    for turned_leading in (16, 8192):
        bits = model.operand_at(0x12400, turned_leading)
        assert bits & 0x3FFF == 0x12400 >> 4
        assert bits >> 16 & 0x3FFF == turned_leading >> 4
        assert bits >> 32 & 0x3FFF == 1024 >> 4
        assert bits >> 49 & 7 == 0
        assert bits >> 62 == 1
