"""Weights of the libraries as our kernels read them: their own values, never made dense; and what merged() says."""

import copy

import pytest
import torch
from torch import nn

import peft_fast
from peft_fast import native
from peft_fast.errors import UnsupportedError
from peft_fast.ops import nf4
from peft_fast.ops.lora_quantized import product
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
    "hqq 8-bit": (models.hqq, {"bits": 8}),
    "hqq 4-bit": (models.hqq, {}),
    "hqq 2-bit": (models.hqq, {"bits": 2}),
    "hqq 1-bit": (models.hqq, {"bits": 1}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("quantize", "options"), BASES.values(), ids=BASES)
def test_no_weight_is_made_dense(quantize, options, dtype, monkeypatch):
    if quantize in (models.four_bits, models.hqq):
        options = {**options, "compute": dtype}
    model = ready(toy(quantize, dtype, options=options), dtype)
    expected = model(inputs(dtype=dtype))

    def dense(self, dtype):
        raise AssertionError("made dense")

    for kind in (nf4.Packed, packed.Rows, packed.Groups, packed.Planes, packed.Called):
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


@pytest.mark.parametrize(("quantize", "options"), BASES.values(), ids=BASES)
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


# bits, values a group, compute dtype, further choices
HQQ = [
    (bits, group, dtype, {"view_as_float": view})
    for bits in (8, 6, 4, 2, 1)
    for group, view in ((64, False), (8, False), (128, True), (None, False))
    for dtype in (torch.float32, torch.bfloat16)
]


def hqq_layer(bits, group, dtype, choices, N=96, K=256):
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    linear = nn.Linear(K, N).requires_grad_(False)
    config = BaseQuantizeConfig(nbits=bits, group_size=group)
    config["weight_quant_params"].update(choices)
    return HQQLinear(linear, config, compute_dtype=dtype, device="cpu")


@pytest.mark.parametrize(("bits", "group", "dtype", "choices"), HQQ, ids=str)
def test_hqqs_values_bit_for_bit(bits, group, dtype, choices):
    """The kernels applied to the unit vectors, whose sums have one term, forward and backward."""
    torch.manual_seed(bits)
    layer = hqq_layer(bits, group, dtype, choices)
    found = packed.base_of(layer)
    assert type(found.W) is packed.Planes and found.W.codes(dtype) is not None
    W = layer.dequantize()
    x, g = torch.eye(256, dtype=dtype).requires_grad_(), torch.eye(96, dtype=dtype)
    y = product(x, found.W, None, backend="cpu")
    (dx,) = torch.autograd.grad(y[:96], x, g)
    assert torch.equal(y.T, W) and torch.equal(dx[:96], W)
    assert packed.trusted(layer, found, dtype)


@pytest.mark.parametrize(
    ("bits", "choices"), [(3, {}), (4, {"axis": 0}), (8, {"axis": 0}), (4, {"channel_wise": False})], ids=str
)
def test_hqqs_other_layouts_are_made_dense(bits, choices):
    layer = hqq_layer(bits, 64, torch.float32, choices)
    found = packed.base_of(layer)
    assert type(found.W) is packed.Called
    x = torch.randn(5, 256)
    torch.testing.assert_close(product(x, found.W, layer.bias), layer(x), rtol=1e-5, atol=1e-5)
    assert packed.trusted(layer, found, torch.float32)


def test_hqq_in_another_dtype_is_made_dense():
    """It rounds to what it computes in, which the kernels do not where x has another dtype."""
    layer = hqq_layer(4, 64, torch.float32, {})
    assert packed.base_of(layer).W.codes(torch.bfloat16) is None
    layer.meta["scale"] = layer.meta["scale"].bfloat16()
    assert type(packed.base_of(layer).W) is packed.Called
