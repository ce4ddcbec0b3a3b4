"""The gate accepts stock and accelerated layers and refuses every planted fault, in each dtype."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft_fast.benchmarks import gate, lora_linear

M, K, N, R = 96, 64, 80, 8
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer(dtype, p, fast=False):
    torch.manual_seed(0)
    base = nn.Linear(K, N, bias=False, dtype=dtype).requires_grad_(False)
    return lora_linear.lora_layer(base, R, p, fp32=dtype == torch.float32, fast=fast)


def inputs(dtype):
    torch.manual_seed(1)
    return torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)


def honest(lora, x, keep, scale=1.0, keep_scale=None):
    w, p = lora.base_layer.weight, lora.lora_dropout["default"].p
    A, B = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    dropped = x * keep.to(x.dtype).mul(1 / (1 - p) if keep_scale is None else keep_scale)
    return F.linear(x, w) + F.linear(F.linear(dropped, A), B) * (2.0 * scale)


def drawn(x, p):
    return gate.torch_mask(x.dtype)(x, p)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fast", [False, True])
def test_real_layers_pass(dtype, p, fast):
    mask = gate.our_mask if fast else gate.torch_mask(dtype)
    verdicts = gate.check_layer(layer(dtype, p, fast), *inputs(dtype), mask, fast=fast)
    assert set(verdicts) == {"y", "dx", "dA", "dB", "path"}
    assert all(verdicts.values()), {k: v.reason for k, v in verdicts.items()}


class MaskDiffers(torch.autograd.Function):
    """Forward with one mask, backward with another."""

    @staticmethod
    def forward(ctx, x, keep):
        ctx.keep = keep.roll(1, 0)
        return x * keep / 0.9

    @staticmethod
    def backward(ctx, g):
        return g * ctx.keep / 0.9, None


def faults():
    def scale(lora, x):
        return honest(lora, x, drawn(x, 0.1), scale=1.01)

    def last_column(lora, x):
        keep = drawn(x, 0.1)
        keep[:, -1] = False
        return honest(lora, x, keep)

    def last_row(lora, x):
        keep = drawn(x, 0.1)
        keep[-1] = False
        return honest(lora, x, keep)

    def unscaled(lora, x):
        return honest(lora, x, drawn(x, 0.1), keep_scale=1.0)

    def other_mask(lora, x):
        dropped = MaskDiffers.apply(x, drawn(x, 0.1).to(x.dtype))
        A, B = lora.lora_A["default"].weight, lora.lora_B["default"].weight
        return F.linear(x, lora.base_layer.weight) + F.linear(F.linear(dropped, A), B) * 2.0

    def truncated(lora, x):
        y = honest(lora, x, drawn(x, 0.1))
        return y - y.detach().abs() * torch.finfo(y.dtype).eps

    return [scale, last_column, last_row, unscaled, other_mask, truncated]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", faults(), ids=lambda f: f.__name__)
def test_faults_are_refused(fault, dtype):
    if fault.__name__ == "truncated" and dtype is torch.float32:
        pytest.skip("the criterion allows float32 a few eps, for other orders of summation")
    lora = layer(dtype, 0.1)
    verdicts = gate.check_layer(lora, *inputs(dtype), gate.torch_mask(dtype), run=lambda x: fault(lora, x))
    assert not all(verdicts.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_path_without_a_fault_passes(dtype):
    lora = layer(dtype, 0.1)
    run = lambda x: honest(lora, x, drawn(x, 0.1))  # noqa: E731
    verdicts = gate.check_layer(lora, *inputs(dtype), gate.torch_mask(dtype), run=run)
    assert all(verdicts.values()), {k: v.reason for k, v in verdicts.items()}


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("fast", [False, True])
def test_many_tokens_are_judged_by_the_first_and_the_last(monkeypatch, p, fast):
    """The layer itself runs on all of them, with the mask of all of them."""
    monkeypatch.setattr(gate, "MOST_TOKENS", 32)
    seen, wide = [], []
    real = gate._formula
    monkeypatch.setattr(gate, "_formula", lambda f, ws, x, *rest: (wide.append(len(x)), real(f, ws, x, *rest))[1])
    lora, (x, g) = layer(torch.bfloat16, p, fast), inputs(torch.bfloat16)
    mask = gate.our_mask if fast else gate.torch_mask(torch.bfloat16)
    run = lambda x: (seen.append(len(x)), lora(x))[1]  # noqa: E731
    verdicts = gate.check_layer(lora, x, g, mask, run=run, fast=fast)
    assert all(verdicts.values()), {k: v.reason for k, v in verdicts.items()}
    assert set(seen) == {M} and set(wide) == {32} and g.count_nonzero(1).all()


@pytest.mark.parametrize("row", [0, -1])
def test_a_fault_in_the_last_tile_of_many_tokens_is_refused(monkeypatch, row):
    monkeypatch.setattr(gate, "MOST_TOKENS", 32)
    lora = layer(torch.bfloat16, 0.1)

    def run(x):
        keep = drawn(x, 0.1)
        keep[row] = False
        return honest(lora, x, keep)

    verdicts = gate.check_layer(lora, *inputs(torch.bfloat16), gate.torch_mask(torch.bfloat16), run=run)
    assert not verdicts["y"] and not verdicts["dx"]


@pytest.mark.parametrize("fast", [False, True])
def test_a_layer_on_the_wrong_path_is_refused(fast):
    lora = layer(torch.float32, 0.0, fast)
    verdicts = gate.check_layer(lora, *inputs(torch.float32), gate.our_mask, fast=not fast)
    assert not verdicts["path"] and verdicts["y"]


def test_small_outputs_are_drawn_again_and_the_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    calls = []
    lora = layer(torch.float32, 0.0)
    torch.set_rng_state(before)
    run = lambda x: (calls.append(x), lora(x))[1]  # noqa: E731
    gate.check_layer(lora, torch.ones(1, K), torch.ones(1, N), gate.our_mask, run=run)
    assert len(calls) == 32  # 32 × 64 elements are enough
    assert torch.equal(torch.get_rng_state(), before)
