"""Plan "fused" of the cuda backend on the host: the numeric contract through the Hopper GEMM in its model."""

from __future__ import annotations

import pytest
import torch

from peft_fast import dispatch
from peft_fast.backends.cuda import selftest
from tests import numerics
from tests.cases import CASES
from tests.numerics import Provider, by_name

OURS = Provider("cuda", "fused")
# cases whose products Hopper's GEMM takes
TAKEN = """
tokens_1 tokens_131 rank_1 rank_17 rank_256 both_biases base_trains conv1d conv1d_base_trains two_adapters
""".split()
FAST = [
    *[(name, "bf16") for name in TAKEN],
    ("conv1d", "f16"),
    ("both_biases", "bf16_f32_adapters"),
]


def rows() -> list:
    slow = [(case.name, dtypes) for case in CASES for dtypes in ("bf16", "f16") if (case.name, dtypes) not in FAST]
    return FAST + [pytest.param(*row, marks=pytest.mark.slow) for row in slow]


@pytest.mark.parametrize("name, dtypes", rows())
def test_contract(on_the_host, name, dtypes):
    watch = dispatch.Watch()
    found = numerics.default_verdicts(OURS, by_name(name), dtypes)
    assert not numerics.failures(found)
    if (name, dtypes) in FAST:
        assert not watch.failed() and not watch.refused(), "Hopper's GEMM did not run the call"


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_the_self_test_finds_nothing(on_the_host, dtype):
    # the second: more tiles than clusters, more steps than stages and than draws of the mask
    for sizes in selftest.PROBLEMS[0], (260, 136, 1096, (24,), (0.5,)):
        assert not selftest.mismatches(sizes, torch.device("cpu"), dtype, "fused")
