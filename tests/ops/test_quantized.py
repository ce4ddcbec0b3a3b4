"""nf4, lora_quantized and lora_add by every live backend, without any of the libraries that make such weights."""

import pytest
import torch

from peft_fast import ops
from peft_fast.errors import DtypeError, ShapeError
from peft_fast.ops import Adapter, lora_add, lora_linear, lora_quantized, nf4
from peft_fast.ops.nf4 import Packed
from tests import cases_lora_add as cases
from tests import numerics
from tests.inputs import DTYPES
from tests.nf4_writer import FP4, NF4, write

PROVIDERS = numerics.providers("lora_add")
ROWS = [
    pytest.param(*p.values, case, dtypes, id=f"{p.id}-{dtypes}-{case.name}", marks=p.marks)
    for case, dtypes in cases.rows()
    for p in PROVIDERS
]


@pytest.mark.parametrize(("provider", "case", "dtypes"), ROWS)
def test_lora_add_is_no_less_accurate_than_peft(provider, case, dtypes):
    if refusal := numerics.takes(provider, DTYPES[dtypes]):
        pytest.skip(refusal)
    assert not numerics.failures(numerics.default_verdicts(provider, case, dtypes))


@pytest.mark.parametrize("case", cases.EMPTY, ids=lambda c: c.name)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_lora_add_of_no_tokens(provider, case):
    p = numerics.problem(case, DTYPES["f32"])
    with provider.active():
        out = numerics.ours(p, provider)
    assert out["y"].shape == case.outputs()["y"] and not out["dA0"].any()


@pytest.mark.parametrize("dtypes", ["bf16_f32_adapters", "f16_f32_adapters"])
@pytest.mark.parametrize("case", cases.CORNERS, ids=lambda c: c.name)
def test_lora_add_exact(case, dtypes):
    provider = numerics.Provider("torch")
    assert not numerics.failures(numerics.verdicts(provider, case, dtypes, round_adapters=False, exact=True))


def _more(base, x, adapters, **options):
    return lora_add(base, x, [a._replace(scaling=a.scaling * 1.01) for a in adapters])


def _last_row_forgotten(base, x, adapters, **options):
    y = lora_add(base, x, adapters)
    return torch.cat((y[:-1], base[-1:]))


def _undropped(base, x, adapters, **options):
    return lora_add(base, x, [a._replace(p=0.0) for a in adapters])


def _no_base_gradient(base, x, adapters, **options):
    return lora_add(base * 0.99 + base.detach() * 0.01, x, adapters)


@pytest.mark.parametrize("dtypes", ["f32", "bf16"])
@pytest.mark.parametrize("mutant", [_more, _last_row_forgotten, _undropped, _no_base_gradient])
def test_planted_faults_are_caught(mutant, dtypes):
    case = next(c for c in cases.CASES if c.name == "dropout_0.5")
    assert numerics.failures(numerics.verdicts(mutant, case, dtypes, round_adapters=False))


SHAPES = [(1, 1), (3, 7), (6, 50), (64, 128), (5, 192)]


def packed(shape, blocksize=64, nested=False, code=NF4, scale=1.0):
    torch.manual_seed(shape[1])
    return write(torch.randn(shape) * scale, code, blocksize, nested)


@pytest.mark.parametrize("provider", numerics.providers("nf4"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_is_the_definition_rounded_once(shape, dtype, provider):
    if provider.backend == "cpu" and dtype not in (torch.float32, torch.bfloat16):
        pytest.skip("the compiled kernels have no such dtype")
    for blocksize in (32, 64, 4096):
        for nested in (False, True):
            for code in (NF4, FP4):
                W = packed(shape, blocksize, nested, code)
                with provider.active():
                    got = nf4.dequantize(W, dtype, backend=provider.backend)
                wide = torch.promote_types(dtype, torch.float32)
                assert torch.equal(got, nf4.dequantize(W, wide, backend="reference").to(dtype))


def test_nf4_by_hand():
    """Two rows of three in blocks of two: a block reaches over the end of a row, the last is half empty."""
    data = torch.tensor([[0x0F], [0x71], [0xE0]], dtype=torch.uint8)
    W = Packed(data, torch.tensor([2.0, 10.0, 0.5]), NF4, 2, (1, 5))
    expected = torch.tensor([[-2.0, 2.0, 0.0, 10 * NF4[1], 0.5 * NF4[14]]])
    assert torch.equal(W.dense(torch.float32), expected)
    W = W._replace(shape=(5, 1))
    assert torch.equal(W.dense(torch.float32), expected.t())


@pytest.mark.parametrize("nested", [False, True])
def test_the_writer_takes_the_nearest_value(nested):
    W = torch.randn(40, 96)
    got = write(W, nested=nested).dense(torch.float32)
    scales = W.reshape(-1, 64).abs().amax(1, keepdim=True)
    widest = (NF4[1:] - NF4[:-1]).max() / 2
    slack = 0.02 if nested else 1e-6
    assert ((got - W).reshape(-1, 64).abs() <= scales * (widest + slack)).all()


def test_nf4_refuses_what_does_not_fit():
    W = packed((6, 50))
    with pytest.raises(ShapeError, match="scales"):
        W._replace(absmax=W.absmax[:-1]).dense(torch.float32)
    with pytest.raises(ShapeError, match="bytes"):
        W._replace(data=W.data[:-1]).dense(torch.float32)
    with pytest.raises(DtypeError, match="bfloat16"):
        W._replace(absmax=W.absmax.bfloat16()).dense(torch.float32)
    with pytest.raises(DtypeError, match="uint8"):
        packed((6, 50), nested=True)._replace(absmax=W.absmax).dense(torch.float32)
    with pytest.raises(ShapeError, match="offset"):
        nested = packed((6, 50), nested=True)
        nested._replace(nested=nested.nested._replace(code=W.absmax)).dense(torch.float32)


class Counted:
    """A weight that counts how often it is made dense."""

    def __init__(self, W):
        self.W, self.shape, self.times = W, W.shape, 0

    def dense(self, dtype):
        self.times += 1
        return self.W.dense(dtype)


@pytest.mark.parametrize("provider", numerics.providers("lora_linear"))
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "bf16_f32_adapters", "f32_autocast"])
def test_lora_quantized_is_lora_linear_on_the_dense_weight(provider, dtypes):
    kinds = DTYPES[dtypes]
    if refusal := numerics.takes(provider, kinds):
        pytest.skip(refusal)
    torch.manual_seed(0)
    with numerics.DEVICE:
        W = Counted(packed((56, 72), nested=True, scale=72**-0.5))
        x = torch.randn(3, 11, 72).to(kinds.x).requires_grad_()
        A = (torch.randn(5, 72) / 8).to(kinds.adapter).requires_grad_()
        B = torch.randn(56, 5).to(kinds.adapter).requires_grad_()
        bias = torch.randn(56).to(kinds.compute).requires_grad_()
    adapters = [Adapter(A, B, 2.0, 0.3), Adapter(A.detach() * 2, B, -0.5, 0.0, B.detach()[:, 0])]
    options = {"backend": provider.backend, "plan": provider.plan}
    found = []
    for run in (lora_quantized, lora_linear):
        torch.manual_seed(7)
        weight = W if run is lora_quantized else W.W.dense(kinds.compute)
        with provider.active(), torch.autocast(numerics.DEVICE.type, kinds.compute, enabled=kinds.autocast is not None):
            y = run(x, weight, bias, adapters, **options)
        g = torch.ones_like(y)
        with provider.active():
            found.append((y, *torch.autograd.grad(y, (x, A, B, bias), g)))
    assert all(torch.equal(a, b) and a.dtype is b.dtype for a, b in zip(*found, strict=True))
    assert W.times == (1 if provider.backend == "reference" else 2)


def test_a_dense_weight_is_made_only_where_it_is_needed():
    W = Counted(packed((8, 16)))
    A, B = torch.randn(2, 16, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    lora_quantized(torch.randn(4, 16), W, None, [Adapter(A, B)]).sum().backward()
    assert W.times == 1 and A.grad.isfinite().all() and B.grad.isfinite().all()


@pytest.mark.parametrize("op", ["lora_quantized", "lora_add"])
def test_gradcheck_and_second_derivatives(op):
    torch.manual_seed(0)
    W = packed((5, 8), 16)
    x, A, B = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 8), (2, 8), (5, 2)))
    base = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def run(base, x, A, B):
        if op == "lora_add":
            return ops.lora_add(base, x, [Adapter(A, B, 1.5)])
        return ops.lora_quantized(x, W, None, [Adapter(A, B, 1.5)]) + base

    torch.autograd.gradcheck(run, (base, x, A, B))
    torch.autograd.gradgradcheck(run, (base, x, A, B))


def test_lora_add_is_a_tensor_of_its_own():
    base, x = torch.randn(4, 5), torch.randn(4, 8)
    before = base.clone()
    y = lora_add(base, x, [Adapter(torch.randn(2, 8), torch.randn(5, 2))])
    y += 1
    assert torch.equal(base, before)
    with pytest.raises(ShapeError, match="leading"):
        lora_add(base[:2], x, [])
