"""Small PEFT models, and the comparison all patcher tests make: the same call with and without the guard."""

import contextlib

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_fast
from peft_fast.patch import guard, ledger, marks, plan, switch

K, N = 32, 48


class Toy(nn.Module):
    """x (..., 32) -> up (48) -> tanh -> down (32); ``layer(K, N)`` makes a base layer."""

    def __init__(self, layer=nn.Linear):
        super().__init__()
        self.up, self.down = layer(K, N), layer(N, K)

    def forward(self, x, **kwargs):
        return self.down(torch.tanh(self.up(x, **kwargs)), **kwargs)


def conv1d(k, n):
    """transformers' Conv1D with nn.Linear's argument order; a random bias instead of zeros."""
    layer = Conv1D(n, k)
    nn.init.normal_(layer.bias)
    return layer


def toy(layer=nn.Linear, base_dtype=torch.float32, targets=("up", "down"), seed=0, **config):
    """An accelerated PEFT model around Toy, with adapters that are not zero."""
    torch.manual_seed(seed)
    base = Toy(layer).to(base_dtype)
    config = {"r": 4, "init_lora_weights": False, "target_modules": list(targets), **config}
    autocast = config.pop("autocast_adapter_dtype", True)
    if layer is conv1d:
        config["fan_in_fan_out"] = True
    model = get_peft_model(base, LoraConfig(**config), autocast_adapter_dtype=autocast)
    return peft_fast.accelerate(model)


def adapt(make, targets, **config):
    """An accelerated PEFT model around what ``make()`` gives, with adapters that are not zero."""
    torch.manual_seed(0)
    config = {"r": 4, "init_lora_weights": False, "target_modules": targets, **config}
    return peft_fast.accelerate(get_peft_model(make(), LoraConfig(**config)))


def layers(model):
    """The plain lora.Linear layers of a model."""
    return [m for m in model.modules() if isinstance(m, plan.Linear)]


def inputs(*shape, dtype=torch.float32, seed=1):
    """Random x that wants a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (2, 5, K)), generator=generator).to(dtype).requires_grad_()


@contextlib.contextmanager
def stock():
    """PEFT as it is without the package: no guard on any class, nothing is asked or counted."""
    on = plan.Linear.forward is guard.forward
    off = marks.state.off
    switch._uninstall()
    try:
        yield
    finally:
        if on:
            switch._install()
            marks.state.off = off


def tensor_of(output):
    """The tensor to compare in a model's output."""
    return output if isinstance(output, torch.Tensor) else getattr(output, "logits", output[0])


def step(model, args, kwargs, seed=7):
    """One forward and backward from a fixed seed -> output and every gradient, inputs included."""
    for p in model.parameters():
        p.grad = None
    args = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args]
    torch.manual_seed(seed)
    y = tensor_of(model(*args, **kwargs))
    if not y.requires_grad:
        return {"y": y}
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)
    y.backward(g)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    grads |= {f"x{i}": a.grad for i, a in enumerate(args) if getattr(a, "grad", None) is not None}
    return {"y": y.detach(), **{k: v.clone() for k, v in grads.items()}}


def both(model, *args, **kwargs):
    """(stock step, step with the guard, fast calls, handed back by reason) of the same call."""
    with stock():
        expected = step(model, args, kwargs)
    ledger.forget(model.modules())
    got = step(model, args, kwargs)
    calls = peft_fast.report(model)
    return expected, got, calls.fast_calls, calls.handed_back


def assert_same(expected, got, rtol=None):
    """Same tensors with the same dtypes: bit for bit, or within rtol of each tensor's largest value."""
    assert expected.keys() == got.keys()
    for name, e in expected.items():
        g = got[name]
        assert (g.dtype, g.shape, g.device) == (e.dtype, e.shape, e.device), name
        if rtol is None:
            assert torch.equal(g, e), f"{name} is not bit-identical"
        elif e.numel():
            worst = (g.double() - e.double()).abs().max().item()
            assert worst <= rtol * e.double().abs().max().item() + 1e-30, f"{name}: off by {worst:.3g}"


def assert_fast(model, *args, rtol=1e-5, calls=None, **kwargs):
    """Every LoRA layer ran our arithmetic, and output and gradients are stock's within rtol."""
    expected, got, fast, handed_back = both(model, *args, **kwargs)
    assert handed_back == {}
    assert fast == (len(layers(model)) if calls is None else calls)
    assert_same(expected, got, rtol)


def assert_handed_back(model, *args, reason, mixed=False, **kwargs):
    """PEFT ran the call: bit-identical output and gradients, and the reason is in the ledger."""
    expected, got, fast, handed_back = both(model, *args, **kwargs)
    assert any(reason in given for given in handed_back), handed_back
    if not mixed:
        assert fast == 0 and len(handed_back) == 1, handed_back
        assert_same(expected, got)
