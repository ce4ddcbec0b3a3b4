"""Weights of the libraries as our kernels read them: their own values, never made dense; and what merged() says."""

import copy

import pytest
import torch
from torch import nn

import peft_fast
from peft_fast import native
from peft_fast.errors import UnsupportedError
from peft_fast.ops import nf4
from peft_fast.patch import packed
from tests.quantized import models
from tests.quantized.models import inputs, layers, ready, toy

pytestmark = pytest.mark.skipif(bool(native.reason()), reason="no compiled kernels")
BASES = {
    "nf4": (models.four_bits, {}),
    "fp4": (models.four_bits, {"quant_type": "fp4", "nested": False}),
    "int8": (models.eight_bits, {}),
    "torchao int8": (models.torchao_int8, {}),
    "torchao int4": (models.torchao_int4, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("quantize", "options"), BASES.values(), ids=BASES)
def test_no_weight_is_made_dense(quantize, options, dtype, monkeypatch):
    if quantize is models.four_bits:
        options = {**options, "compute": dtype}
    model = ready(toy(quantize, dtype, options=options), dtype)
    expected = model(inputs(dtype=dtype))

    def dense(self, dtype):
        raise AssertionError("made dense")

    for kind in (nf4.Packed, packed.Rows, packed.Groups, packed.Called):
        monkeypatch.setattr(kind, "dense", dense)
    x = inputs(dtype=dtype)
    got = model(x)
    got.sum().backward()
    assert torch.equal(got, expected) and x.grad.isfinite().all()
    assert peft_fast.report(model).handed_back == {}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_librarys_values_bit_for_bit(dtype, quant_type, nested):
    import bitsandbytes.functional as F

    for shape in ((128, 64), (96, 256)):
        W, state = F.quantize_4bit(torch.randn(shape).to(dtype), quant_type=quant_type, compress_statistics=nested)
        layer = models.four_bits(nn.Linear(shape[1], shape[0]), quant_type, nested)
        layer.weight = type(layer.weight)(W, requires_grad=False, quant_state=state, quant_type=quant_type)
        layer.weight.quant_state, layer.compute_type_is_set, layer.bias = state, True, None
        found = packed.base_of(layer).W
        for backend in ("cpu", "torch"):
            assert torch.equal(nf4.dequantize(found, dtype, backend=backend), F.dequantize_4bit(W, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchaos_groups_with_zeros(dtype):
    """Zeros other than 0, which weights alone do not get: what the library makes of them."""
    layer = models.torchao_int4(nn.Linear(64, 96).to(dtype))
    zero = layer.weight.zero_point
    zero.copy_(torch.randint(-5, 5, zero.shape))
    W = packed.base_of(layer).W
    data, scales, _, zeros, block = W.codes(dtype)
    values = data.float() - zeros.float().repeat_interleave(block).view(data.shape)
    assert torch.equal((values * scales.repeat_interleave(block).view(data.shape)).to(dtype), W.dense(dtype))
    assert packed.base_of(models.torchao_int4(nn.Linear(64, 96).bfloat16())).W.codes(torch.float32) is None


@pytest.mark.parametrize(("quantize", "options"), [*BASES.values(), (models.hqq, {})], ids=[*BASES, "hqq"])
def test_merged_refuses_what_would_be_rounded_anew(quantize, options):
    model = ready(toy(quantize, options=options)).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedError, match="rounds its weight anew") as error, peft_fast.merged(model):
        pytest.fail("not reached")
    assert "and 1 more" in str(error.value) and "without merged()" in str(error.value)
    assert not any(layer.merged for layer in layers(model)) and before.keys() == model.state_dict().keys()


def test_the_benchmark_of_every_kind(tmp_path):
    from peft_fast.benchmarks import harness
    from peft_fast.cli import bench

    result = tmp_path / "out.json"
    assert bench.app(["quantized", "--tiny", "--gate-only", "--dropout", "0.05", "--json", str(result)]) == 0
    rows = harness.read(result)["rows"]
    assert len(rows) == 8 and all({"peft_fast", "peft_fast added"} <= set(row["match"]) for row in rows[1:])
