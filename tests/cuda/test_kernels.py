"""The CUDA kernels' index logic, masks and arithmetic on the host: the numeric contract through the cuda backend."""

from __future__ import annotations

import pytest
import torch

from peft_fast.backends.cuda import lora_linear as cuda
from peft_fast.backends.cuda import selftest
from peft_fast.reference.dropout import keep_mask
from tests import numerics
from tests.cases import CASES, EMPTY
from tests.numerics import Provider, by_name

OURS = Provider("cuda", "accumulate")
# a few cases of each kind in make test; fibers are slow
FAST = """
tokens_131 rank_1 rank_17 rank_256 ragged_127x33 ragged_65x259 wider_than_a_tile k_in_passes adapter_bias base_trains
conv1d no_adapter three_adapters dropout_0.05 dropout_1.0 x_columns x_transposed x_every_other A_transposed B_columns
g_expanded bias_every_other everything_awkward
""".split()
OTHER_DTYPES = [
    ("bias", "f16_f32_adapters_autocast"),
    ("wider_than_a_tile", "f32_autocast"),
    ("rank_17", "f32"),
    ("ragged_65x259", "f32"),
    ("conv1d", "f16"),
]


def rows() -> list:
    fast = [(name, "bf16") for name in FAST] + OTHER_DTYPES
    every = [
        (case.name, d) for case in CASES for d in ("bf16", "f32", "f16_f32_adapters_autocast", "bf16_f32_adapters")
    ]
    slow = [pytest.param(*row, marks=pytest.mark.slow) for row in every if row not in fast]
    return fast + slow


@pytest.mark.parametrize("name, dtypes", rows())
def test_contract(on_the_host, name, dtypes):
    before = cuda.fallbacks()
    found = numerics.default_verdicts(OURS, by_name(name), dtypes)
    assert not numerics.failures(found)
    assert cuda.fallbacks() == before, "torch ran the call"


@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_empty(on_the_host, case):
    problem = numerics.problem(case, numerics.DTYPES["bf16"])
    out = numerics.ours(problem, OURS)
    assert all(torch.isfinite(t).all() for t in out.values())


@pytest.mark.parametrize("dtype", selftest.NAMES, ids=str)
def test_the_self_test_finds_nothing(on_the_host, dtype):
    for sizes in selftest.PROBLEMS:
        assert not selftest.mismatches(sizes, torch.device("cpu"), dtype, "accumulate")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_order_of_threads_changes_nothing(on_the_host, monkeypatch, dtype):
    """Threads that run from the last to the first find a barrier that is missing, or a sum in no fixed order."""
    monkeypatch.setenv("PEFT_FAST_SHIM_ORDER", "reversed")
    for sizes in selftest.PROBLEMS[:2]:
        assert not selftest.mismatches(sizes, torch.device("cpu"), dtype, "accumulate")


@pytest.mark.parametrize("M, K, p", [(1, 1, 0.5), (5, 130, 0.1), (33, 257, 0.95), (3, 128, 1.0), (2, 64, 0.0)])
def test_the_mask_is_the_references(operators, M, K, p):
    for seed in (0, 2**63 - 2, 0x123456789ABCDEF):
        seed = torch.tensor(seed)
        assert torch.equal(torch.ops.peft_fast.shim_mask(seed, M, K, p), keep_mask(seed, M, K, p))


@pytest.mark.parametrize("op", ["shrink", "outer", "shrink_outer", "expand"])
def test_a_wrong_call_is_refused(operators, op):
    ops, x, narrow = torch.ops.peft_fast, torch.ones(4, 8), torch.ones(3, 7)
    calls = {
        "shrink": lambda: ops.lora_shrink(x, narrow, None, [3], [1.0], [0.0]),
        "outer": lambda: ops.lora_outer(torch.ones(5, 3), x, x, None, [3], [0.0], False),
        "shrink_outer": lambda: ops.lora_shrink_outer(x, narrow, torch.ones(4, 3), [3], [1.0]),
        "expand": lambda: ops.lora_expand(torch.ones(4, 2), narrow, None, None, [2], [0.0]),
    }
    with pytest.raises(RuntimeError, match="needed:"):
        calls[op]()


def test_dropout_without_seeds_is_refused(operators):
    with pytest.raises(RuntimeError, match="dropout without seeds"):
        torch.ops.peft_fast.lora_shrink(torch.ones(4, 8), torch.ones(3, 8), None, [3], [1.0], [0.5])
