"""Values that the compiled kernels read as they are kept: the bits of a dense weight, which is never made."""

import math
from typing import NamedTuple

import pytest
import torch

from peft_fast.benchmarks import memory
from peft_fast.errors import ShapeError
from peft_fast.ops import Adapter, lora_linear, lora_quantized, nf4
from peft_fast.ops.nf4 import Codes
from tests import numerics
from tests.nf4_writer import FP4, NF4, write

CPU = [p for p in numerics.providers("lora_quantized") if p.values[0].backend == "cpu"]


class Bytes(NamedTuple):
    """int8 in blocks, with zeros or without."""

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    block: int

    @property
    def shape(self):
        return self.values.shape

    def dense(self, dtype):
        flat = self.values.reshape(-1).float()
        if self.zeros is not None:
            flat = flat - self.zeros.float().repeat_interleave(self.block)[: flat.numel()]
        return (flat * self.scales.repeat_interleave(self.block)[: flat.numel()]).view(self.shape).to(dtype)

    def codes(self, dtype):
        return Codes(self.values, self.scales, None, self.zeros, self.block)


class Planes(NamedTuple):
    """Unsigned values, 8/bits a byte that lie far apart, less a zero, rounded, times a scale, rounded."""

    values: torch.Tensor  # (n,) uint8, below 2**bits
    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int
    block: int
    shape: tuple[int, int]

    def dense(self, dtype):
        q, s, z = self.values.float().view(-1, self.block), self.scales.view(-1, 1), self.zeros.view(-1, 1)
        return ((q - z).to(dtype).float() * s).to(dtype).view(self.shape)

    def codes(self, dtype):
        data = torch.zeros(self.values.numel() * self.bits // 8, dtype=torch.uint8)
        for plane in self.values.view(8 // self.bits, -1):
            data = (data << self.bits if self.bits < 8 else data) | plane
        return Codes(data, self.scales, None, self.zeros, self.block)


class Kept:
    """A weight that nobody may make dense; ``change`` plants a fault in its codes."""

    def __init__(self, W, change=lambda codes: codes):
        self.W, self.shape, self.change, self.asked = W, W.shape, change, 0

    def dense(self, dtype):
        raise AssertionError("made dense")

    def codes(self, dtype):
        self.asked += 1
        return self.change(self.W.codes(dtype))


def in_bytes(shape, block, zeros=False):
    blocks = math.ceil(math.prod(shape) / block)
    values = torch.randint(-128, 128, shape, dtype=torch.int8)
    zeros = torch.randint(-128, 128, (blocks,), dtype=torch.int8) if zeros else None
    return Bytes(values, torch.rand(blocks) * 0.01, zeros, block)


def in_planes(shape, bits, blocks=1):
    """``blocks``: in each row of the planes, which are as many rows."""
    shape = shape[0] * 8 // bits, shape[1]
    block = shape[1] if blocks == 1 else shape[0] * shape[1] * bits // 8
    n = math.prod(shape)
    scales, zeros = torch.rand(n // block) * 0.01, torch.randn(n // block) * 2**bits
    return Planes(torch.randint(2**bits, (n,), dtype=torch.uint8), scales, zeros, bits, block, shape)


KINDS = {
    "nf4": lambda shape: write(torch.randn(shape)),
    "nf4 nested, blocks of 32": lambda shape: write(torch.randn(shape), NF4, 32, True),
    "fp4": lambda shape: write(torch.randn(shape), FP4),
    "an odd block": lambda shape: write(torch.randn(shape), NF4, 7),
    "one block": lambda shape: write(torch.randn(shape), NF4, 4096),
    "rows of int8": lambda shape: in_bytes(shape, shape[1]),
    "one scale": lambda shape: in_bytes(shape, math.prod(shape)),
    "groups with zeros": lambda shape: in_bytes(shape, 32, zeros=True),
    "planes of 8 bits": lambda shape: in_planes(shape, 8),
    "planes of 4 bits": lambda shape: in_planes(shape, 4),
    "planes of 2 bits": lambda shape: in_planes(shape, 2),
    "planes of 1 bit": lambda shape: in_planes(shape, 1),
    "a block a plane": lambda shape: in_planes(shape, 4, None),
}
# N, K: below a tile, odd rows that share a byte, several strips of both directions
SHAPES = [(1, 1), (5, 7), (33, 131), (70, 300), (300, 70), (520, 600)]


def run(op, W, x, A, B, bias, **options):
    torch.manual_seed(3)
    y = op(x, W, bias, [Adapter(A, B, 2.0, 0.3), Adapter(A.detach(), B.detach(), -0.5)], **options)
    return y, *torch.autograd.grad(y, (x, A, B, bias), torch.ones_like(y))


def problem(shape, M, dtype, adapter=torch.float32):
    (N, K), bias = shape, torch.randn(shape[0]).to(dtype)
    leaves = torch.randn(M, K).to(dtype), (torch.randn(5, K) / 8).to(adapter), torch.randn(N, 5).to(adapter), bias
    return [t.requires_grad_() for t in leaves]


@pytest.mark.parametrize("provider", CPU)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_of_a_dense_weight(kind, provider):
    for shape in SHAPES:
        torch.manual_seed(shape[0])
        W = KINDS[kind](shape)
        for M, dtype in ((1, torch.bfloat16), (37, torch.bfloat16), (37, torch.float32)):
            given, kept = problem(W.shape, M, dtype), Kept(W)
            with provider.active():
                expected = run(lora_linear, W.dense(dtype), *given, backend="cpu")
                got = run(lora_quantized, kept, *given, backend="cpu")
            assert kept.asked == 2
            for name, a, b in zip(("y", "dx", "dA", "dB", "dbias"), expected, got, strict=True):
                assert torch.equal(a, b), (name, shape, M, dtype)


FAULTS = {
    "halves swapped": lambda c: c._replace(data=c.data << 4 | c.data >> 4),
    "the next block's scale": lambda c: c._replace(scales=c.scales.roll(-1)),
    "another meaning": lambda c: c._replace(meaning=c.meaning.roll(1)),
    "a bit": lambda c: c._replace(data=torch.cat((c.data[:-1], c.data[-1:] ^ 16))),
    "the last scale": lambda c: c._replace(scales=torch.cat((c.scales[:-1], c.scales[-1:] * 1.01))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault):
    torch.manual_seed(0)
    W, given = write(torch.randn(33, 130)), problem((33, 130), 19, torch.float32)
    expected = run(lora_linear, W.dense(torch.float32), *given)
    y, dx, *_ = run(lora_quantized, Kept(W, FAULTS[fault]), *given, backend="cpu")
    assert not torch.equal(y, expected[0]) and not torch.equal(dx, expected[1])


PLANES = {
    "halves swapped": lambda c: c._replace(data=c.data << 4 | c.data >> 4),
    "the next block's scale": lambda c: c._replace(scales=c.scales.roll(-1)),
    "the next block's zero": lambda c: c._replace(zeros=c.zeros.roll(-1)),
    "the last scale": lambda c: c._replace(scales=torch.cat((c.scales[:-1], c.scales[-1:] * 1.01))),
    "a zero a little off": lambda c: c._replace(zeros=c.zeros * (1 + 2**-12)),
}


@pytest.mark.parametrize("fault", PLANES)
def test_faults_in_planes_are_seen(fault):
    torch.manual_seed(0)
    W = in_planes((33, 130), 4)
    given = problem(W.shape, 19, torch.bfloat16)
    y, dx, *_ = run(lora_linear, W.dense(torch.bfloat16), *given)
    got = run(lora_quantized, Kept(W, PLANES[fault]), *given, backend="cpu")
    assert not torch.equal(y, got[0]) and not torch.equal(dx, got[1])


def test_forgotten_zeros_are_seen():
    W, given = in_bytes((33, 128), 32, zeros=True), problem((33, 128), 19, torch.float32)
    expected = run(lora_linear, W.dense(torch.float32), *given)
    y, dx, *_ = run(lora_quantized, Kept(W, lambda c: c._replace(zeros=None)), *given, backend="cpu")
    assert not torch.equal(y, expected[0]) and not torch.equal(dx, expected[1])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads):
    torch.manual_seed(0)
    W, given = write(torch.randn(520, 600), nested=True), problem((520, 600), 70, torch.bfloat16)
    expected, before = run(lora_quantized, Kept(W), *given, backend="cpu"), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = run(lora_quantized, Kept(W), *given, backend="cpu")
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(512, 6200), (6200, 512)], ids=str)
def test_a_weight_packed_in_layers(shape, dtype):
    """So deep that a product packs it in several goes, of which only the first begins with the weight."""
    torch.manual_seed(0)
    W, given = in_bytes(shape, 64, zeros=True), problem(shape, 3, dtype)
    expected = run(lora_linear, W.dense(dtype), *given, backend="cpu")
    got = run(lora_quantized, Kept(W), *given, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_no_dense_copy_is_allocated():
    W = write(torch.randn(512, 768))
    x, A, B, _ = problem((512, 768), 8, torch.bfloat16)

    def step(W):
        lora_quantized(x, W, None, [Adapter(A, B)], backend="cpu").sum().backward()

    dense = 512 * 768 * 2
    assert memory.peak_bytes(lambda: step(W), x.device) < dense / 4

    # nor is it between, where the weight has no codes
    class Plain:
        shape, dense = W.shape, W.dense

    assert memory.peak_bytes(lambda: step(Plain), x.device) >= dense


def test_second_derivatives():
    W = write(torch.randn(6, 9))
    x, A, B, _ = problem((6, 9), 4, torch.float32)

    def penalty(op, W):
        y = op(x, W, None, [Adapter(A, B, 2.0)])
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (A, B))

    for a, b in zip(penalty(lora_quantized, W), penalty(lora_linear, W.dense(torch.float32)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_first_layer_reads_no_weight_backward():
    """Where x needs no gradient, backward has no use for W."""
    W = Kept(write(torch.randn(8, 16)))
    A, B = torch.randn(2, 16, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    lora_quantized(torch.randn(4, 16), W, None, [Adapter(A, B)], backend="cpu").sum().backward()
    assert W.asked == 1 and A.grad.isfinite().all()


def test_what_does_not_fit_is_refused():
    W = write(torch.randn(6, 50))
    x, A, B, _ = problem((6, 50), 3, torch.float32)
    with pytest.raises(ShapeError, match="scales"):
        lora_quantized(x, W._replace(absmax=W.absmax[:-1]), None, [Adapter(A, B)])
    c, like = W.codes(torch.float32), torch.empty(6, 50)
    for wrong in (
        {"scales": c.scales[:-1]},
        {"data": c.data[:-1]},
        {"meaning": c.meaning[:8]},
        {"meaning": None},
        {"scales": c.scales.double()},
        {"block": 0},
        {"zeros": c.data[:1]},
    ):
        with pytest.raises(RuntimeError, match="codes and scales"):
            torch.ops.peft_fast.lora_quantized(x, like, *c._replace(**wrong), None, A, B, None, [5], [1.0], [0.0])


WRONG = {
    "signed": lambda c: c._replace(data=c.data.char()),
    "a scale less": lambda c: c._replace(scales=c.scales[:-1]),
    "a zero less": lambda c: c._replace(zeros=c.zeros[:-1]),
    "zeros of more digits": lambda c: c._replace(zeros=c.zeros.double()),
    "a block over the end of a plane": lambda c: c._replace(block=60, scales=c.scales[:5], zeros=c.zeros[:5]),
    "three planes": lambda c: c._replace(data=c.data[:100]),
    "a byte less": lambda c: c._replace(data=c.data[:-1]),
    "every second byte": lambda c: c._replace(data=c.data.repeat_interleave(2)[::2]),
    "a meaning too": lambda c: c._replace(meaning=torch.zeros(16)),
    "blocks of none": lambda c: c._replace(block=0),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_planes_that_do_not_fit_are_refused(wrong):
    W = in_planes((3, 50), 4)
    x, A, B, _ = problem(W.shape, 3, torch.float32)

    def call(codes):
        torch.ops.peft_fast.lora_quantized(x, torch.empty(W.shape), *codes, None, A, B, None, [5], [1.0], [0.0])

    call(W.codes(torch.float32))
    with pytest.raises(RuntimeError, match="codes and scales"):
        call(WRONG[wrong](W.codes(torch.float32)))


@pytest.mark.parametrize("op", ["nf4", "nf4_scales", "lora_quantized", "lora_quantized_backward"])
def test_opcheck(op):
    W = write(torch.randn(6, 50), nested=True)
    x, A, B, _ = (t.detach() for t in problem((6, 50), 3, torch.float32))
    c, like, lists = W.codes(torch.float32), torch.empty(6, 50), ([5], [1.0], [0.0])
    H = torch.randn(3, 5)
    code, outer, offset, size = W.nested
    arguments = {
        "nf4": (c.data, c.scales, c.meaning, 64, 6, 50, True),
        "nf4_scales": (W.absmax, code, outer, offset, size),
        "lora_quantized": (x, like, *c, None, A, B, None, *lists),
        "lora_quantized_backward": (torch.randn(3, 6), x, like, *c, A, B, H, None, *lists, [True] * 4, False),
    }[op]
    torch.library.opcheck(getattr(torch.ops.peft_fast, op).default, arguments)


@pytest.mark.parametrize("provider", numerics.providers("nf4"))
def test_special_scales(provider):
    """Scales that are infinite, no number, zero or denormal mean what the definition says."""
    W = write(torch.randn(6, 64))
    W = W._replace(absmax=torch.tensor([float("inf"), float("nan"), 0.0, 1e-40, 0.0, 0.0]))
    # no numbers of which a rounding like any other would make a zero
    W.absmax.view(torch.int32)[4:] = torch.tensor([2**31 - 1, -1], dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        with provider.active():
            got = nf4.dequantize(W, dtype, backend=provider.backend)
        expected = nf4.dequantize(W, torch.float32, backend="reference").to(dtype)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
