"""What is tried once a kind of layer, and what a checkpoint computes again."""

import copy
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from peft_fast import native, ops, settings
from peft_fast.ops import nf4
from peft_fast.patch import packed
from tests.patch.toys import assert_same, both, stock
from tests.quantized import models
from tests.quantized.models import BASES, SOME, K, bases, inputs, layers, model_of, toy


@pytest.mark.parametrize("reentrant", [False, True])
@bases(SOME)
def test_checkpointing_draws_the_mask_again(quantize, options, kind, product, reentrant):
    model = model_of(quantize, options, lora_dropout=0.4)

    def step(run):
        x = inputs()
        torch.manual_seed(3)
        y = run(x)
        y.square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"x": x.grad}
        model.zero_grad()
        return {"y": y.detach()} | grads

    whole = step(model)
    assert_same(whole, step(lambda x: checkpoint(model, x, use_reentrant=reentrant)))


def _selective():
    return create_selective_checkpoint_contexts([torch.ops.aten.addmm.default, torch.ops.aten.mm.default])


@pytest.mark.parametrize("options_of_checkpoint", [{}, {"context_fn": _selective}], ids=["plain", "selective"])
@pytest.mark.parametrize("bias", [torch.float32, torch.bfloat16])
@bases(SOME)
def test_checkpointing_the_first_call(quantize, options, kind, product, bias, options_of_checkpoint):
    """What is tried, or chosen, at a layer's first call must not make the recomputation another."""
    packed._trusted.clear()
    model = toy(quantize, options=options)
    if quantize in (models.four_bits, models.eight_bits):
        for layer in layers(model):
            layer.base_layer.bias.data = layer.base_layer.bias.data.to(bias)

    w = 1.5 * torch.eye(K)

    def run(model, call):
        x = inputs()
        y = call(lambda x: (model(x @ w) @ w).tanh(), x)
        y.square().sum().backward()
        return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    with stock():
        expected = run(copy.deepcopy(model), lambda f, x: f(x))
    calls = []
    agrees = packed._agrees
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "_agrees", lambda *args: calls.append(args) or agrees(*args))
        got = run(model, lambda f, x: checkpoint(f, x, use_reentrant=False, **options_of_checkpoint))
    assert len(calls) == 2, "one trial a shape"
    assert_same(expected, got, 2e-6)


def _wrong(method):
    """A weight's codes or dense(), one per cent off."""

    def run(self, dtype):
        right = method(self, dtype)
        return right * 1.01 if isinstance(right, torch.Tensor) else right._replace(scales=right.scales * 1.01)

    return run


@pytest.mark.parametrize("name", ["codes", "dense"])
@bases({name: BASES[name] for name in ("nf4", "int8", "torchao int8", "torchao int4", "hqq 4-bit")})
def test_what_runs_is_what_was_tried(quantize, options, kind, product, name, monkeypatch):
    """A weight that our kernels, or torch, would read wrongly is left to the library."""
    if name == "codes" and native.reason():
        pytest.skip("no compiled kernels")
    model = model_of(quantize, options)
    W = type(packed.base_of(layers(model)[0].base_layer).W)
    monkeypatch.setattr(W, name, _wrong(getattr(W, name)))
    monkeypatch.setattr(packed, "_trusted", {})
    expected, got, fast, handed_back = both(model, inputs())
    assert fast == 2 and not handed_back and list(packed._trusted.values()) == [False, False]
    assert_same(expected, got, 2e-6)


def tried(monkeypatch, agrees):
    """A layer's base, which nobody has tried, and ``agrees`` in the place of its trial."""
    base = layers(model_of(models.four_bits, {}))[0].base_layer
    monkeypatch.setattr(packed, "_trusted", {})
    monkeypatch.setattr(packed, "_agrees", agrees)
    return base, packed.base_of(base), torch.float32


def test_a_trial_is_no_call(monkeypatch):
    arguments = tried(monkeypatch, packed._agrees)
    before = ops.fast_calls(), torch.get_rng_state()
    assert packed.trusted(*arguments)
    assert ops.fast_calls() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_another_thread_during_a_trial(monkeypatch):
    """It neither waits for the first one's answer nor takes it for a no."""
    agrees, trying, go, answers = packed._agrees, threading.Event(), threading.Event(), []

    def slow(*args):
        if threading.current_thread() is not threading.main_thread():
            trying.set()
            assert go.wait(60)
        return agrees(*args)

    arguments = tried(monkeypatch, slow)
    thread = threading.Thread(target=lambda: answers.append(packed.trusted(*arguments)))
    thread.start()
    try:
        assert trying.wait(60) and packed.trusted(*arguments) and not answers
    finally:
        go.set()
        thread.join()
    assert answers == [True]


def test_what_a_trial_asks_itself_is_no(monkeypatch):
    agrees, inner = packed._agrees, []

    def again(*args):
        inner.append(packed.trusted(*args))
        return agrees(*args)

    arguments = tried(monkeypatch, again)
    assert packed.trusted(*arguments) and inner == [False]
    assert packed.trusted(*arguments) and inner == [False], "one trial"


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_a_recomputation_goes_the_way_of_its_forward(error, monkeypatch):
    """Also if only the forward's trial found no memory."""

    def fails(W, dtype):
        raise error

    model = model_of(models.four_bits, {})
    monkeypatch.setattr(packed, "_trusted", {})
    with monkeypatch.context() as patch:
        for name in ("codes", "dense"):
            patch.setattr(nf4.Packed, name, fails)
        y = checkpoint(model, inputs(), use_reentrant=False)
    y.square().sum().backward()
    assert list(packed._trusted.values()) == [False, False]


def test_a_trial_is_of_one_backend(monkeypatch):
    """What torch multiplied says nothing of what the compiled kernels read."""
    arguments = tried(monkeypatch, packed._agrees)
    with settings.override(backend="torch"):
        assert packed.trusted(*arguments)
    monkeypatch.setattr(nf4.Packed, "codes", _wrong(nf4.Packed.codes))
    assert packed.trusted(*arguments) is bool(native.reason())
