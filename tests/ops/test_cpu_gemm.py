"""Shapes that take the compiled GEMM down its rarer roads: many passes, deep products in layers, rows that wait."""

from dataclasses import replace

import pytest
import torch

from peft_fast import settings
from peft_fast.ops import Adapter, lora_linear
from tests import numerics
from tests.cases_lora_group import DROPPED, FROZEN, Case
from tests.inputs import DTYPES

PROVIDERS = [p for p in numerics.providers("lora_group") if p.values[0].backend == "cpu"]
# one skinny product over x through two masks, in passes that begin anywhere in x
MASKS = Case("masks_over_passes", (DROPPED, replace(DROPPED, N=33), replace(FROZEN, N=20)), lead=(50,), K=2250)
# 6200 deep for dx: too much for one chunk of enough columns, so that it runs in layers
DEEP = Case("deep", (replace(DROPPED, N=3100), replace(DROPPED, N=3100, p=(0.0,))), lead=(20,), K=264)
CASES = [MASKS, DEEP]

with_dtypes = pytest.mark.parametrize("dtypes", ["f32", "bf16"])
with_providers = pytest.mark.parametrize("provider", PROVIDERS)


@with_providers
@with_dtypes
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_less_accurate_than_peft(provider, case, dtypes):
    assert not numerics.failures(numerics.default_verdicts(provider, case, dtypes))


@with_providers
@with_dtypes
def test_threads_and_packed_weights_give_the_same_bits(provider, dtypes):
    p = numerics.problem(DEEP, DTYPES[dtypes])
    before, outs = torch.get_num_threads(), []
    try:
        for threads, pack_mb in ((1, 0), (2, 64), (3, 0), (31, 0)):
            torch.set_num_threads(threads)
            with provider.active(), settings.override(pack_mb=pack_mb):
                outs.append(numerics.ours(p, provider))
    finally:
        torch.set_num_threads(before)
    for other in outs[1:]:
        assert all(numerics.same_bits(outs[0][name], other[name]) for name in other)


def test_rows_beyond_those_that_wait_between_layers():
    torch.manual_seed(0)
    x, W = torch.randn(4200, 6200), torch.randn(512, 6200)
    adapter = Adapter(torch.randn(4, 6200), torch.randn(512, 4))
    y = lora_linear(x, W, adapters=[adapter], backend="cpu")
    for rows in (slice(0, 60), slice(4060, 4120), slice(4170, 4200)):
        alone = lora_linear(x[rows], W, adapters=[adapter], backend="cpu")
        assert numerics.same_bits(y[rows], alone)
    # equal bits of two wrong results would be equal too
    rows = slice(4090, 4100)
    truth = x[rows].double() @ (W.double() + adapter.B.double() @ adapter.A.double()).T
    assert (y[rows] - truth).norm() <= 1e-6 * truth.norm()
