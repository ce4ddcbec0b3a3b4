"""The compiled kernels by several threads: the bits that one thread gives, where work is cut into tasks of its own."""

import functools
from dataclasses import replace

import pytest
import torch

from peft_fast.ops import nf4
from peft_fast.ops.nf4 import Nested, Packed
from tests import cases_dora_linear, cases_lora_experts, cases_lora_mixed, numerics
from tests.inputs import DTYPES
from tests.nf4_writer import INNER, NF4

CASES = [
    # an expert a task where no one has most of the rows
    cases_lora_experts.Case(
        "experts_threads", 700, 2, 9, 260, 189, (16, 3), (2.0, 0.5), bias=True, tokens=True, only=(0, 1, 3, 4, 5, 7, 8)
    ),
    # rows so few that weights are read as they lie
    cases_lora_experts.Case("experts_few_threads", 20, 2, 9, 1200, 700, (16, 3), (2.0, 0.5), bias=True, tokens=True),
    cases_dora_linear.Case("dora_threads", lead=(150,), K=600, N=700, ranks=(16,), p=(0.1,), bias=True),
    cases_dora_linear.Case("dora_half_threads", lead=(150,), K=600, N=700, ranks=(16,), p=(0.5,), bias=True),
    cases_dora_linear.Case("dora_conv1d_threads", lead=(150,), K=300, N=1100, ranks=(16,), p=(0.0,), transposed=True),
]
# several blocks of tokens an adapter, several stretches of columns
CROWD = cases_lora_mixed.Case("crowd", (2, -1, 0, 1, 2, 0), (150,), 700, 1500, 0, (5, 16, 33), (0.5, -1.0, 2.0))
WORDS = replace(CROWD, name="crowd_of_words", lead=(300,), V=61)


def by_threads(run):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(run())
    finally:
        torch.set_num_threads(before)
    return found


@numerics.each(*CASES, only=("cpu",), every_isa=False)
@pytest.mark.parametrize("dtypes", ["f32", "bf16"])
def test_threads_give_the_same_bits(provider, case, dtypes):
    p = numerics.problem(case, DTYPES[dtypes])
    with provider.active():
        one, *more = by_threads(lambda: [numerics.ours(p, provider) for _ in range(3)])
        with torch.no_grad():
            y, *others = by_threads(lambda: [numerics.call(p, provider) for _ in range(3)])
    for found in (one, *more):
        assert all(numerics.same_bits(one[0][name], other[name]) for other in found for name in other)
    assert all(numerics.same_bits(y[0], other) for found in (y, *others) for other in found)


@numerics.each(CROWD, WORDS, only=("cpu",), every_isa=False)
@pytest.mark.parametrize("dtypes", ["f32", "bf16"])
def test_mixed_batches_too(provider, case, dtypes):
    t = {name: tensor.detach() for name, tensor in numerics.problem(case, DTYPES[dtypes]).tensors.items()}
    # once: torch's own GEMM may split K by the number of threads
    base, x = case.base(t), t["ids"] if case.V else t["x"]
    with provider.active():
        run = functools.partial(provider, x, adapters=case.adapters(t), owners=list(case.owners), op="lora_mixed")
        one, *more = by_threads(lambda: [run(base=base.clone()) for _ in range(4)])
    assert all(numerics.same_bits(one[0], y) for ys in (one, *more) for y in ys)


@numerics.each(CROWD, only=("cpu",), every_isa=False)
@pytest.mark.parametrize("order", [[], [2, 0, 3, 1]], ids=["together", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_tokens_too(provider, case, dtype, order):
    """Columns in stretches that are long enough for two threads to meet."""
    torch.manual_seed(0)
    x, W = torch.randn(4, 3, 1200).to(dtype), (torch.randn(2600, 1200) / 30).to(dtype)
    As, Bs = [torch.randn(r, 1200) / 30 for r in (16, 5)], [torch.randn(2600, r) for r in (16, 5)]
    args = x, W, None, As, Bs, [None, torch.randn(2600)], [0.5, 2.0], False, order, [1, 3] if order else []
    with provider.active():
        one, *more = by_threads(lambda: [torch.ops.peft_fast.lora_decode(*args) for _ in range(4)])
    assert all(numerics.same_bits(one[0], y) for ys in (one, *more) for y in ys)


@numerics.each(CROWD, only=("cpu",), every_isa=False)
@pytest.mark.parametrize("K", [0, 1, 2048])
@pytest.mark.parametrize("tokens", [1, 8])
def test_adapters_of_more_rows_than_the_weight_has(provider, case, K, tokens):
    """Where rows are long enough for several threads, some have none but adapters', and the others wait for them."""
    torch.manual_seed(0)
    x, W, bias = torch.randn(tokens, K), torch.randn(40, K), torch.randn(40)
    As, Bs = [torch.randn(r, K) / 45 for r in (300, 5)], [torch.randn(40, r) for r in (300, 5)]
    args = x, W, bias, As, Bs, [None, torch.randn(40)], [0.5, 2.0], False
    with provider.active():
        one, *more = by_threads(lambda: [torch.ops.peft_fast.lora_decode(*args) for _ in range(20)])
    assert all(numerics.same_bits(one[0], y) for ys in (one, *more) for y in ys)
    y = x.double() @ W.double().T + bias + 2.0 * args[5][1].double()
    y += sum(s * (x.double() @ A.double().T @ B.double().T) for A, B, s in zip(As, Bs, args[6], strict=True))
    assert torch.allclose(one[0].double(), y, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("provider", [p for p in numerics.providers("nf4") if p.values[0].backend == "cpu"])
@pytest.mark.parametrize("blocksize", [1, 7, 64])
def test_nf4_in_several_tasks(provider, blocksize):
    """Tasks that begin within a block, at an odd value of one, and more scales than a task has."""
    n = 301 * 451
    blocks = -(-n // blocksize)
    data, absmax = (torch.randint(256, size, dtype=torch.uint8) for size in ((-(-n // 2), 1), (blocks,)))
    nested = Nested(INNER, torch.rand(-(-blocks // 256)), torch.tensor(0.3), 256)
    W = Packed(data, absmax, NF4, blocksize, (301, 451), nested)
    for dtype in (torch.float32, torch.bfloat16):
        expected = nf4.dequantize(W, torch.float32, backend="reference").to(dtype)
        with provider.active():
            for found in by_threads(lambda dtype=dtype: nf4.dequantize(W, dtype, backend="cpu")):
                assert torch.equal(found, expected)
