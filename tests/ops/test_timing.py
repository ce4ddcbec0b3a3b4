"""Regression timings for `pytest --benchmark-compare`, never asserted; benchmarks/ measures."""

from dataclasses import replace

import pytest
import torch

from tests import numerics
from tests.cases import DTYPES, Case

SHAPE = Case("timed", lead=(256,), K=512, N=512, ranks=(16,), p=(0.0,))


def fastest():
    """The plans of torch, and the compiled kernels on the best instruction set only."""
    found = [p for p in numerics.providers() if p.values[0].backend != "reference"]
    return [p for p in found if p.values[0].backend == "torch"] + [p for p in found if p.values[0].backend == "cpu"][
        -1:
    ]


@pytest.mark.parametrize("dropped", [0.0, 0.05])
@pytest.mark.parametrize("dtypes", ["f32", "bf16_f32_adapters"])
@pytest.mark.parametrize("provider", fastest())
def test_step(benchmark, provider, dtypes, dropped):
    p = numerics.problem(replace(SHAPE, p=(dropped,)), DTYPES[dtypes])
    torch.use_deterministic_algorithms(False)  # no filling of fresh memory while timing
    with provider.active():
        benchmark.pedantic(numerics.ours, (p, provider), rounds=5, iterations=1, warmup_rounds=1)


@pytest.mark.parametrize("dtypes", ["f32", "bf16_f32_adapters"])
def test_stock_step(benchmark, dtypes):
    p = numerics.problem(SHAPE, DTYPES[dtypes])
    torch.use_deterministic_algorithms(False)
    benchmark.pedantic(numerics.stock, (p,), rounds=5, iterations=1, warmup_rounds=1)
