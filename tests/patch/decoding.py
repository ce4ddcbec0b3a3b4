"""Few tokens without gradients, with and without decode(): what the files of tests about it share."""

import torch
from torch import nn

from peft_fast.patch import decode
from tests.patch.toys import stock, toy


def decoded(model, x, **kwargs):
    """The model's y, and how many of its layers decode() ran."""
    taken = []
    run = decode.run

    def watched(layer, x):
        y = run(layer, x)
        taken.append(y is not None)
        return y

    decode.run = watched
    try:
        y = model(x, **kwargs)
    finally:
        decode.run = run
    return y, sum(taken)


def twice(model, x):
    """(PEFT's y, ours, layers that decoded) without gradients."""
    with torch.no_grad():
        with stock():
            expected = model(x)
        return expected, *decoded(model, x)


def assert_decodes(model, x, calls=2):
    expected, y, taken = twice(model, x)
    assert taken == calls
    assert (y.dtype, y.shape) == (expected.dtype, expected.shape)
    rtol = 1e-5 if y.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        y, expected, rtol=rtol, atol=rtol * (expected.abs().max().item() if expected.numel() else 0)
    )
    return y


def assert_stocks(model, x, calls=0):
    """PEFT's own bits."""
    expected, y, taken = twice(model, x)
    assert taken == calls and torch.equal(y, expected)


def dora_model(dtype=torch.float32, layer=nn.Linear, **config):
    """Two DoRA layers whose magnitudes are not the norms."""
    model = toy(layer, base_dtype=dtype, use_dora=True, **config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.mul_(1 + 0.2 * torch.rand(p.shape, generator=torch.Generator().manual_seed(0)))
    return model


def assert_right(model, x):
    """PEFT's y within what the dtype leaves -> how many layers decoded."""
    with torch.no_grad():
        with stock():
            expected = model(x)
        y, taken = decoded(model, x)
    rtol = 1e-5 if y.dtype == torch.float32 else 2e-2
    assert (y.dtype, y.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(y, expected, rtol=rtol, atol=rtol * expected.abs().max().item())
    return taken


def magnitude(layer):
    return layer.lora_magnitude_vector["default"]
