"""Every kernel stays inside its tensors and stores each output element once, at any size."""

from functools import partial

import pytest
import torch
import triton
import triton.language as tl

from peft_fast.kernels import (
    device,
    dora_linear,
    dropout,
    gemm,
    lora_decode,
    lora_embedding,
    lora_group,
    lora_linear,
    lora_mlp,
    nf4,
    skinny,
    split,
    tiles,
)
from tests.kernels.interpreted.addresses import addresses
from tests.kernels.launches import OP_OF, empty, launches

BF16 = torch.bfloat16
MANY = (1 << 23) + 3
MODULES = [
    device,
    dora_linear,
    dropout,
    gemm,
    lora_decode,
    lora_embedding,
    lora_group,
    lora_linear,
    lora_mlp,
    nf4,
    skinny,
    split,
]
# M, K, N, ranks, ps
SHAPES = {
    "one": (1, 1, 1, (1,), (0.1,)),
    "prime": (67, 131, 257, (3, 17), (0.5, 0.0)),
    "even": (64, 256, 128, (16,), (0.05,)),
    "three": (33, 140, 60, (2, 8, 40), (0.1, 0.0, 1.0)),
    "plain": (35, 70, 300, (5,), (0.0,)),
    "wide_rank": (19, 130, 66, (150,), (0.1,)),
}
calls = partial(launches, adapter=torch.float32)
OPS = list(calls(1, 1, 1, (1,), (0.0,)))


def storage(t):
    return t.untyped_storage()._cdata


def of(result, found):
    """What was seen of a returned tensor, in the launches that stored to it."""
    return [seen for launch in found for seen in launch if storage(seen.tensor) == storage(result) and seen.stores]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", OPS)
def test_inside_and_once(op, shape):
    with addresses() as found:
        results = calls(*SHAPES[shape])[op]()
    for result in results:
        # where memory is zeros, all tokens are the first one
        whole = op != "scatter" or result.shape[1] == 1
        assert [seen.covered for seen in of(result, found)] == [whole], "every element is stored, by one launch"


@pytest.mark.parametrize("op", tiles.OPS)
@pytest.mark.parametrize("which", [1, 2])
def test_other_tiles(op, which):
    """Narrower, persistent and descriptor variants, by the way a tuning file takes."""
    M, K, N, ranks, ps = (67, 200, 264, (16, 3), (0.5, 0.0))
    shapes = {tiles.shape_class(op, M, K, N, r, drop) for r in (0, 19) for drop in (False, True)}
    table = {s: tiles.candidates(op, s, "bf16", "interpreter") for s in shapes}
    if which >= min(map(len, table.values())):
        pytest.skip("the table has no such tile")
    overrides = {(op, s, "bf16"): table[s][which] for s in shapes}
    names = [name for name in OPS if OP_OF.get(name.removeprefix("frozen ")) == op]
    assert names
    for name in names:
        with addresses() as found:
            results = calls(M, K, N, ranks, ps, overrides=overrides)[name]()
        for result in results:
            assert [seen.covered for seen in of(result, found)] == [True]


@pytest.mark.parametrize("op", [op for op in OPS if op != "scatter"])
@pytest.mark.parametrize("shape", [(MANY << 3, 40, 48), (300, MANY, 40), (300, 40, MANY)], ids=["M", "K", "N"])
def test_past_two_billion_elements(op, shape):
    """Offsets are computed in 64 bits: the last program reaches exactly the last element."""
    with addresses(corners=MODULES) as found:
        results = calls(*shape, (16,), (0.1,))[op]()
    # the last program makes a tile of the last sibling
    for result in results[-1:] if "group" in op else results:
        assert max(seen.high for seen in of(result, found)) == result.numel() - 1


WIDE_ROWS = [op for op in OPS if "ward" in op] + ["shrink", "outer", "shrink_outer", "activate", "decode"]


@pytest.mark.parametrize("op", WIDE_ROWS)
def test_rows_far_apart(op):
    x = torch.empty_strided((67, 72), (1 << 29, 1), dtype=BF16, device="meta")
    with addresses() as found:
        calls(67, 72, 72, (16,), (0.1,), x=x)[op]()
    reads = [seen for launch in found for seen in launch if storage(seen.tensor) == storage(x)]
    assert reads and all((seen.low, seen.high) == (0, x.numel() - 1) for seen in reads)


@pytest.mark.parametrize("padding", [-1, 4])
def test_scatter_stores_the_columns_of_its_tokens_once(padding):
    """A run longer than a program's step, the first and the last token, and numbers that are no token."""
    R, V, far = 20, 50, 1 << 29
    ids = torch.tensor([4] * 70 + [0, V - 1, 17, 17, -3, V, 1 << 40])[torch.randperm(77)]
    D = torch.empty_strided((77, R), (far, 1), dtype=BF16, device="meta")
    with addresses() as found:
        dA = lora_embedding.scatter(ids, D, empty(2), V, padding, torch.float32)
    (seen,) = of(dA, found)
    stored = seen.counts.reshape(R, V)
    tokens = {0, V - 1, 17} | ({4} if padding != 4 else set())
    assert set(stored.sum(0).nonzero()[0]) == tokens and set(stored[:, sorted(tokens)].ravel()) == {1}
    reads = [s for launch in found for s in launch if storage(s.tensor) == storage(D)]
    assert sum(s.loads for s in reads) == R * (77 - 3 - (70 if padding == 4 else 0))


def test_a_vocabulary_past_two_billion_elements():
    ids, D = torch.tensor([(1 << 28) - 1]), empty(1, 20)
    with addresses() as found:
        dA = lora_embedding.scatter(ids, D, None, 1 << 28, -1, torch.float32)
        H = lora_embedding.gather(ids, dA)
    assert {seen.high for seen in of(dA, found)} == {dA.numel() - 1}
    reads = [seen for seen in found[-1] if storage(seen.tensor) == storage(dA)]
    assert H.shape == (1, 20) and reads[0].high == dA.numel() - 1


@pytest.mark.parametrize("op", [op for op in OPS if "nf4" not in op])
def test_no_tokens_launch_nothing(op):
    with addresses() as found:
        results = calls(0, 40, 30, (16,), (0.1,))[op]()
    stored = [seen.stores for launch in found for seen in launch]
    assert not any(stored)
    assert all(0 in result.shape or result.dtype == torch.float32 for result in results)


@triton.jit
def _copy_kernel(x_ptr, y_ptr, M, N, WIDE: tl.constexpr, MASKED: tl.constexpr, STEP: tl.constexpr, BM: tl.constexpr):
    rows = tl.program_id(0) * STEP + tl.arange(0, BM)[:, None]
    if WIDE:
        rows = rows.to(tl.int64)
    cols = tl.arange(0, 16)[None, :]
    mask = (rows < M) & (cols < N) if MASKED else cols < N
    tl.store(y_ptr + rows * N + cols, tl.load(x_ptr + rows * N + cols, mask=mask), mask=mask)


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        ({}, ""),
        ({"WIDE": False}, "outside"),
        ({"MASKED": False}, "outside"),
        ({"STEP": 8}, "stored twice"),
    ],
    ids=["none", "offsets of 32 bits", "no mask", "overlapping blocks"],
)
def test_planted_faults_are_seen(planted, said):
    options = {"WIDE": True, "MASKED": True, "STEP": 16, "BM": 16} | planted
    M = (1 << 27) + 3 if said == "outside" else 1003

    def run():
        with addresses(corners=MODULES if said == "outside" else ()):
            _copy_kernel[(triton.cdiv(M, options["STEP"]),)](empty(M, 16), empty(M, 16), M, 16, **options)

    if not said:
        return run()
    with pytest.raises(triton.runtime.errors.InterpreterError, match=said):
        run()
