"""The interpreter's bfloat16 patch is itself held to torch, bit for bit."""

import pytest
import torch
import triton
import triton.language as tl

from tests import numerics

BF16 = torch.bfloat16
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")


@triton.jit
def _cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@triton.jit
def _binary_kernel(a_ptr, b_ptr, y_ptr, OP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    if OP == "add":
        y = a + b
    elif OP == "sub":
        y = a - b
    elif OP == "mul":
        y = a * b
    elif OP == "maximum":
        y = tl.maximum(a, b)
    elif OP == "where":
        y = tl.where(a > b, a, b)
    elif OP == "neg":
        y = -a
    elif OP == "abs":
        y = tl.abs(a)
    else:
        y = tl.full((N,), 1.7, tl.bfloat16)
    tl.store(y_ptr + i, y.to(tl.bfloat16))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k)
    b = tl.load(b_ptr + k[:, None] * N + n)
    tl.store(y_ptr + m[:, None] * N + n, tl.dot(a, b, input_precision="ieee"))


@triton.jit
def _sum_kernel(x_ptr, y_ptr, N: tl.constexpr):
    tl.store(y_ptr, tl.reduce(tl.load(x_ptr + tl.arange(0, N)), 0, tl.standard._sum_combine))


def every_value():
    """All 65536 bit patterns."""
    return torch.arange(65536, dtype=torch.int32).sub(32768).to(torch.int16).view(BF16)


def same(a, b):
    """Equal bits, or NaN on both sides."""
    return bool(((a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())).all())


def cast(x, dtype):
    y = torch.zeros(x.shape, dtype=dtype)
    _cast_kernel[(1,)](x, y, x.numel())
    return y


def test_rounding_from_float32():
    bits = torch.randint(-(2**31), 2**31, (1 << 17,), dtype=torch.int64).to(torch.int32)
    bits[: 1 << 15] &= ~0xFFFF  # ties, and values that need no rounding
    bits[: 1 << 14] |= 0x8000
    x = bits.view(torch.float32)
    assert same(cast(x, BF16), x.to(BF16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
def test_casts_of_every_value(dtype):
    assert same(cast(every_value(), dtype), every_value().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32], ids=str)
def test_casts_from_other_types(dtype):
    x = (torch.randn(4096, dtype=torch.float64) * 300).to(dtype)
    assert same(cast(x, BF16), x.to(BF16))


def test_casts_to_integers():
    x = (torch.randn(4096) * 300).to(BF16)
    assert torch.equal(cast(x, torch.int32), x.to(torch.int32))


OPS = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "maximum": torch.maximum,
    "where": lambda a, b: torch.where(a > b, a, b),
    "neg": lambda a, b: -a,
    "abs": lambda a, b: a.abs(),
    "full": lambda a, b: torch.full_like(a, 1.7),
}


@pytest.mark.parametrize("op", OPS)
def test_elementwise(op):
    # values of every size; NaN would ask which of two NaNs wins
    a, b = (torch.where(v.isnan(), 1, v) for v in (every_value(), every_value()[torch.randperm(65536)]))
    y = torch.zeros_like(a)
    _binary_kernel[(1,)](a, b, y, op, a.numel())
    if op in ("maximum", "where", "neg"):
        assert torch.equal(y.float(), OPS[op](a, b).float())  # zeros of either sign; Triton's -x is 0 - x
    else:
        assert same(y, OPS[op](a, b))


def test_products():
    # 8 significant bits each, so that float32 sums are exact in any order
    a, b = (torch.randint(-128, 129, shape).to(BF16) / 64 for shape in ((32, 64), (64, 16)))
    y = torch.zeros(32, 16)
    _dot_kernel[(1,)](a, b, y, 32, 16, 64)
    assert numerics.same_bits(y, a.float() @ b.float())


def test_a_reduction_of_raw_bfloat16_is_refused():
    with pytest.raises(Exception, match="convert to float32 first"):
        _sum_kernel[(1,)](torch.ones(16, dtype=BF16), torch.zeros(1), 16)
