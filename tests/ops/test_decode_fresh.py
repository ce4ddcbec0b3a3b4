"""lora_decode of adapters whose B is zero: the base's own bits, unless something beside B says otherwise."""

import pytest
import torch
import torch.nn.functional as F

from peft_fast import native
from peft_fast.ops import Adapter, lora_decode, lora_linear

pytestmark = pytest.mark.skipif(not native.load(), reason=native.reason())
INF, NAN = float("inf"), float("nan")


def tensors(dtype=torch.float32, M=3):
    x, W, bias = torch.randn(M, 70).to(dtype), torch.randn(50, 70).to(dtype), torch.randn(50).to(dtype)
    return x, W, bias, [Adapter(torch.randn(r, 70), torch.zeros(50, r), 0.5) for r in (4, 9)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("lead", [(1,), (5,), (2, 3)], ids=str)
def test_the_base_s_own_bits(lead, transposed, dtype):
    x, W, bias, adapters = tensors(dtype, M=torch.Size(lead).numel())
    x = x.view(*lead, 70)
    given = W.t().contiguous() if transposed else W
    for b in (None, bias):
        if transposed:  # as transformers' Conv1D multiplies
            flat = x.reshape(-1, 70)
            expected = (flat @ given if b is None else torch.addmm(b, flat, given)).view(*lead, 50)
        else:
            expected = F.linear(x, W, b)
        assert torch.equal(lora_decode(x, given, b, adapters, transposed=transposed, backend="cpu"), expected)


def _with(adapter, name, place, value):
    changed = getattr(adapter, name).clone()
    changed[place] = value
    return adapter._replace(**{name: changed})


CHANGES = {
    "the second is trained": lambda a, b: [a, b._replace(B=torch.ones_like(b.B))],
    "one element of the last": lambda a, b: [a, _with(b, "B", (-1, -1), 1.0)],
    "a bias of B": lambda a, b: [a, b._replace(bias=torch.ones(50))],
    "a scaling without end": lambda a, b: [a, b._replace(scaling=INF)],
    "a scaling that is no number": lambda a, b: [a, b._replace(scaling=NAN)],
    "an A without end": lambda a, b: [a, _with(b, "A", (-1, -1), INF)],
    "an A that is no number": lambda a, b: [_with(a, "A", (0, 0), NAN), b],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_nothing_counts(change, dtype):
    x, W, bias, adapters = tensors(dtype)
    adapters = CHANGES[change](*adapters)
    found = lora_decode(x, W, bias, adapters, backend="cpu")
    expected = lora_linear(x, W, bias, adapters, backend="torch", exact=True)
    assert not torch.equal(expected, F.linear(x, W, bias))
    rtol = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=rtol, atol=10 * rtol, equal_nan=True)


@pytest.mark.parametrize("bad", [INF, NAN])
def test_an_x_without_end_meets_a_zero(bad):
    """Infinity times zero is no number: PEFT's sum is none either, also where the base's is infinite."""
    x, W, bias, adapters = tensors()
    x[1, 5] = bad
    found = lora_decode(x, W, bias, adapters, backend="cpu")
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


def test_minus_zero_is_zero():
    x, W, bias, adapters = tensors()
    adapters = [a._replace(B=-a.B) for a in adapters]
    assert torch.equal(lora_decode(x, W, bias, adapters, backend="cpu"), F.linear(x, W, bias))
