"""Small PEFT models over quantized bases, a layer of each library."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import peft_fast
from peft_fast.patch import quantized
from tests.patch import toys
from tests.patch.toys import assert_same, both

K, N = 64, 128


def four_bits(linear: nn.Linear, quant_type="nf4", nested=True, compute=None, storage=torch.uint8) -> nn.Module:
    """bitsandbytes' Linear4bit of a layer."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=compute,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def eight_bits(linear: nn.Linear, threshold=0.0) -> nn.Module:
    """bitsandbytes' Linear8bitLt of a layer."""
    import bitsandbytes as bnb

    bias = linear.bias is not None
    layer = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=bias, has_fp16_weights=False, threshold=threshold
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def torchao_int8(linear: nn.Linear, granularity=None) -> nn.Module:
    """torchao's int8 weight-only layer."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    options = {} if granularity is None else {"granularity": granularity}
    quantize_(linear, Int8WeightOnlyConfig(version=2, **options))
    return linear


def torchao_int4(linear: nn.Linear) -> nn.Module:
    """torchao's int4 weight-only layer, unpacked to int8: what runs on any device."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    quantize_(linear, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    return linear


def hqq(linear: nn.Linear, bits=4, compute=torch.float32) -> nn.Module:
    """HQQ's layer."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=32)
    # else its bias is a clone with a graph behind it
    return HQQLinear(linear.requires_grad_(False), config, compute_dtype=compute, device="cpu")


class Toy(nn.Module):
    """x (..., K) -> up (N) -> tanh -> down (K), quantized."""

    def __init__(self, quantize, dtype=torch.float32, bias=True, **options):
        super().__init__()
        self.up = quantize(nn.Linear(K, N, bias=bias).to(dtype), **options)
        self.down = quantize(nn.Linear(N, K, bias=bias).to(dtype), **options)
        self.is_loaded_in_4bit, self.is_loaded_in_8bit = quantize is four_bits, quantize is eight_bits

    def forward(self, x, **kwargs):
        return self.down(torch.tanh(self.up(x, **kwargs)), **kwargs)


def toy(quantize, base_dtype=torch.float32, bias=True, seed=0, options=None, **config):
    """An accelerated PEFT model around a quantized Toy, with adapters that are not zero."""
    torch.manual_seed(seed)
    base = Toy(quantize, base_dtype, bias, **(options or {}))
    config = {"r": 4, "init_lora_weights": False, "target_modules": ["up", "down"], **config}
    autocast = config.pop("autocast_adapter_dtype", True)
    model = get_peft_model(base, LoraConfig(**config), autocast_adapter_dtype=autocast)
    return peft_fast.accelerate(model)


def inputs(*shape, dtype=torch.float32, seed=1):
    """Random x that wants a gradient."""
    return toys.inputs(*(shape or (2, 5, K)), dtype=dtype, seed=seed)


def layers(model):
    """The LoRA layers over quantized bases."""
    return [m for m in model.modules() if type(m) in quantized.kinds()]


def ready(model, dtype=torch.float32):
    """The same model after a call: bitsandbytes' layers choose dtypes at their first."""
    model(inputs(1, 2, K, dtype=dtype)).sum().backward()
    for p in model.parameters():
        p.grad = None
    return model


def twin(model):
    """A copy that nothing done to the model reaches."""
    return copy.deepcopy(model)


# name -> (how to quantize, options, what the report says, whether we multiply by the base too)
BASES = {
    "nf4": (four_bits, {}, "bitsandbytes nf4, double quant", True),
    "nf4 plain": (four_bits, {"nested": False}, "bitsandbytes nf4", True),
    "fp4": (four_bits, {"quant_type": "fp4"}, "bitsandbytes fp4, double quant", True),
    "nf4 in float32s": (four_bits, {"storage": torch.float32}, "bitsandbytes nf4, double quant", True),
    "int8": (eight_bits, {}, "bitsandbytes int8", True),
    "int8 with outliers": (eight_bits, {"threshold": 6.0}, "bitsandbytes int8", True),
    "torchao int8": (torchao_int8, {}, "torchao Int8Tensor", True),
    "torchao int4": (torchao_int4, {}, "torchao IntxUnpackedToInt8Tensor", True),
    "hqq 4-bit": (hqq, {}, "HQQ 4-bit", True),
    "hqq 8-bit": (hqq, {"bits": 8}, "HQQ 8-bit", True),
}
SOME = {name: BASES[name] for name in ("nf4", "int8", "torchao int8", "hqq 4-bit")}


def bases(which=BASES):
    return pytest.mark.parametrize(("quantize", "options", "kind", "product"), which.values(), ids=which)


def model_of(quantize, options, dtype=torch.float32, **config):
    if quantize is hqq:
        options = {"compute": dtype, **options}
    return ready(toy(quantize, dtype, options=options, **config), dtype)


def assert_fast(model, *args, rtol=2e-6, **kwargs):
    expected, got, fast, handed_back = both(model, *args, **kwargs)
    assert (fast, handed_back) == (2, {})
    assert_same(expected, got, rtol)
