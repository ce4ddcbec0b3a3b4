"""lora_mixed on the Triton backend, kernel by kernel in Python: its contract, its addresses, its mutants."""

import pytest
import torch

from peft_fast import ops
from peft_fast.kernels import device, lora_mixed, split
from tests import cases_lora_mixed, numerics
from tests.kernels.interpreted.addresses import addresses
from tests.kernels.interpreted.rows import rows
from tests.kernels.launches import empty

KINDS = {
    "bf16": "plain bias decode many_tokens words_padding",
    "bf16_f32_adapters": "bias one_token crowd_at_decode sixty_four k_in_passes n_in_groups everything_awkward"
    " words_at_decode young",
    "f32": "plain backwards ranks_to_256 tensor_scaling words x_columns A_transposed B_columns ragged_257x65",
    "f16": "plain words",
    "f16_f32_adapters_autocast": "plain",
}
(TRITON,) = [p for p in numerics.gpu_providers("lora_mixed") if p.backend == "triton"]
ROWS = rows(KINDS, cases_lora_mixed.CASES)
MANY = (1 << 23) + 3
pytestmark = pytest.mark.usefixtures("poisoned_memory", "no_call_left_to_torch")


@pytest.mark.parametrize(("case", "dtypes"), ROWS)
def test_no_less_accurate_than_peft(case, dtypes):
    assert not numerics.failures(numerics.default_verdicts(TRITON, case, dtypes))


def test_twice_the_same_bits_and_none_that_a_neighbour_changes():
    x, base = torch.randn(3, 5, 300).bfloat16(), torch.randn(3, 5, 70).bfloat16()
    adapters = [ops.Adapter(torch.randn(r, 300), torch.randn(70, r), 0.5) for r in (4, 20)]
    runs = [ops.lora_mixed(x, base.clone(), adapters, owners, backend="triton") for owners in ((1, -1, 0), (1, -1, 0))]
    assert torch.equal(*runs) and torch.equal(runs[0][1], base[1])
    x[2] = torch.nan
    spoilt = ops.lora_mixed(x, base.clone(), adapters, (1, -1, 0), backend="triton")
    assert torch.equal(spoilt[:2], runs[0][:2]) and spoilt[2].isnan().all()


def test_a_token_that_is_none_reads_nothing():
    ids, base = torch.tensor([[3, -1], [1 << 40, 8]]), torch.zeros(2, 2, 20)
    y = ops.lora_mixed(ids, base, [ops.Adapter(torch.randn(4, 9), torch.randn(20, 4))], [0, 0], backend="triton")
    assert y.isnan().all(-1).tolist() == y.isnan().any(-1).tolist() == [[False, True], [True, False]]


# rows by adapter, rows of each, ranks, tokens, K, N
SHAPES = {
    "one": ([0], [1], (1,), 1, 1, 1),
    "crowd": ([3, 0, 2, 1], [1, 2, 1], (3, 17, 40), 67, 131, 257),
    "one adapter": ([1, 0], [2], (16,), 40, 128, 128),
    "parts": ([0], [1], (16,), 5, 1030, 20),
}


def seen_of(result, found):
    return [seen for launch in found for seen in launch if seen.tensor is result and seen.stores]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inside_and_once(shape, dtype):
    order, counts, ranks, T, K, N = SHAPES[shape]
    made = lora_mixed.batch(order, counts, ranks, [2.0] * len(ranks), T)
    rows, R = len(order) * T, sum(ranks)
    A, B, y = empty(R, K, dtype=dtype), empty(N, R, dtype=dtype), empty(rows, N)
    with addresses() as found:
        H = lora_mixed.shrink(empty(rows, K), A, made)
        tokens = lora_mixed.gather(empty(rows, dtype=torch.int64), A, made)
        lora_mixed.expand_(y, H, B, empty(len(ranks), N), made)
    assert len(found) == 3 and (H.shape[0] > 1) == (shape == "parts")
    assert [seen.covered for seen in seen_of(y, found)] == [True]
    # H has a column for each of the largest rank
    own = H.shape[0] * sum(count * T * rank for count, rank in zip(counts, ranks, strict=True))
    assert sum(seen.stores for seen in seen_of(H, found)) == own
    assert sum(seen.stores for seen in seen_of(tokens, found)) == own // H.shape[0]


@pytest.mark.parametrize("shape", [(MANY << 3, 40, 48), (30, MANY << 3, 40), (30, 40, MANY << 3)], ids=["T", "K", "N"])
def test_past_two_billion_elements(shape):
    T, K, N = shape
    made = lora_mixed.batch([0], [1], (48,), [2.0], T)
    A, B, y = empty(48, K), empty(N, 48), empty(T, N)
    with addresses(corners=[device, lora_mixed, split]) as found:
        H = lora_mixed.shrink(empty(T, K), A, made)
        lora_mixed.expand_(y, H, B, None, made)
    for result in (H, y):
        assert max(seen.high for seen in seen_of(result, found)) == result.numel() - 1


def test_no_tokens_launch_nothing():
    made = lora_mixed.batch([0], [1], (4,), [2.0], 0)
    with addresses() as found:
        H = lora_mixed.shrink(empty(0, 8), empty(4, 8), made)
        lora_mixed.expand_(empty(0, 6), H, empty(6, 4), None, made)
    assert not found and H.shape == (1, 0, 4)
