"""bitsandbytes packs a 4-bit layer at its first call in evaluation, and the packed product has no backward."""

import copy
import io
import sys
import threading
import time

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft_fast
from peft_fast import settings
from peft_fast.patch import quantized, unpacking
from tests.patch.toys import assert_same, stock
from tests.patch.toys import step as one_step
from tests.quantized import models
from tests.quantized.models import K, inputs, layers, ready, toy

KINDS = [(kind, nested) for kind in ("nf4", "fp4") for nested in (True, False)]
kinds = pytest.mark.parametrize(("kind", "nested"), KINDS, ids=str)


def model_of(kind="nf4", nested=True, dtype=torch.float32, targets=("up", "down"), **config):
    options = {"quant_type": kind, "nested": nested, "compute": dtype}
    model = ready(toy(models.four_bits, dtype, options=options, target_modules=list(targets), **config), dtype).train()
    for base in bases(model):
        if not nested:  # scales that are told apart, which those of a fresh layer are not
            base.weight.quant_state.absmax.mul_(torch.linspace(0.5, 1.5, base.weight.quant_state.absmax.numel()))
    return model


def bases(model):
    import bitsandbytes as bnb

    return [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]


def step(model, tokens=150):
    """Output and every gradient of a training step."""
    dtype = bases(model)[0].compute_dtype
    return one_step(model.train(), [inputs(tokens, K, dtype=dtype)], {})


def generate(model):
    """A token of evaluation, at which bitsandbytes packs what it can."""
    dtype = bases(model)[0].compute_dtype
    model.eval()
    with torch.no_grad(), settings.override(min_tokens=128):
        model(inputs(1, K, dtype=dtype).detach())
    packs = [base.support_avx512bf16_for_cpu for base in bases(model)]
    assert [unpacking.packed(base) for base in bases(model)] == packs and len(packs) == 2
    return model


@pytest.mark.parametrize("targets", [["up", "down"], ["up"], ["down"]], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@kinds
def test_training_after_generating(kind, nested, dtype, targets):
    """Every gradient is that of a model which never generated, also through layers without an adapter."""
    model = model_of(kind, nested, dtype, targets)
    expected = step(copy.deepcopy(model))
    for _ in range(2):
        assert_same(expected, step(generate(model)))


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_dropout": 0.3}], ids=str)
def test_what_peft_runs_too(config):
    model = model_of(**config)
    with settings.override(min_tokens=128):
        expected = step(copy.deepcopy(model), 3)
        assert_same(expected, step(generate(model), 3))


@kinds
def test_bitsandbytes_unpacks_for_a_state_dict(kind, nested):
    """With scales that were rounded, in an order of their own where they are not quantized."""
    model = model_of(kind, nested)
    expected = step(copy.deepcopy(model))
    generate(model).state_dict()
    assert_same(expected, step(model))


@kinds
def test_copies_and_pickles_of_a_packed_model(kind, nested):
    model = model_of(kind, nested)
    expected = step(copy.deepcopy(model))
    generate(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert_same(expected, step(other))


@pytest.mark.parametrize("around", [peft_fast.disabled, torch.inference_mode])
def test_it_is_packed_elsewhere(around):
    model = model_of()
    expected = step(copy.deepcopy(model))
    with around():
        generate(model)
    assert_same(expected, step(model))


@kinds
def test_it_was_packed_before_anybody_looked(kind, nested):
    """Nobody has its scales as they were: those of the packing, as far off as bitsandbytes rounds them."""
    model = model_of(kind, nested)
    expected = step(copy.deepcopy(model))
    with stock():
        generate(model)
    got = step(model)
    for name, e in expected.items():
        assert (got[name] - e).norm() < 0.02 * e.norm(), name


def test_it_was_packed_and_unpacked_is_what_the_packed_one_computes():
    model = model_of("nf4", False)
    with stock():
        generate(model)
    base, x = bases(model)[0], inputs(3, K).detach().bfloat16().float()
    if not unpacking.packed(base):
        pytest.skip("this processor has no kernel for it")
    with torch.no_grad():
        packed = base(x)
    torch.testing.assert_close(base.train()(x), packed, rtol=0, atol=0.01 * packed.abs().max().item())


def test_gradients_in_evaluation():
    model = model_of()
    x = inputs(3, K)
    (expected,) = torch.autograd.grad(copy.deepcopy(model).eval()(x).sum(), x)
    generate(model)
    (got,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return checkpoint(self.model, x, use_reentrant=reentrant) if self.training else self.model(x)

    model = Checkpointed(model_of(lora_dropout=0.3))
    expected = step(copy.deepcopy(model))
    assert_same(expected, step(generate(model)))
    with settings.override(min_tokens=128):
        expected = step(copy.deepcopy(model), 5)
        assert_same(expected, step(generate(model), 5))


def test_a_bitsandbytes_that_cannot_unpack(monkeypatch):
    import bitsandbytes as bnb

    model = model_of(bias=False)
    generate(model)
    if not unpacking.packed(bases(model)[0]):
        pytest.skip("this processor has no kernel for it")
    monkeypatch.delattr(bnb.functional, "_convert_weight_packed_for_cpu_inverse")
    unpacking._warn.cache_clear()
    with pytest.warns(UserWarning, match="cannot unpack it") as warned:
        model.train()(inputs(150, K))
    assert len([w for w in warned if "cannot unpack" in str(w.message)]) == 1
    assert any("cannot unpack it" in reason for reason in peft_fast.report(model).handed_back)


def test_other_models_stay_bitsandbytes():
    """The guard on its class acts on accelerated models alone, and goes with the last of them."""
    import bitsandbytes as bnb

    model = model_of()
    other = copy.deepcopy(bases(model)[0]).eval()
    peft_fast.restore(nn.ModuleList([other]))
    assert bnb.nn.Linear4bit.forward is unpacking.forward
    with torch.no_grad():
        other(inputs(1, K).detach())
    assert unpacking.KEPT not in other.weight.quant_state.__dict__
    peft_fast.restore(model)
    assert bnb.nn.Linear4bit.forward is not unpacking.forward
    peft_fast.enable()
    assert bnb.nn.Linear4bit.forward is unpacking.forward
    peft_fast.disable()
    assert bnb.nn.Linear4bit.forward is not unpacking.forward


def test_many_tokens_do_not_pack():
    model = model_of(dtype=torch.bfloat16).eval()
    with settings.override(min_tokens=128), torch.no_grad():
        model(inputs(40, K, dtype=torch.bfloat16).detach())
    assert not any(unpacking.packed(base) for base in bases(model))
    assert all(quantized.plan_of(layer).base.W is not None for layer in layers(model))


def test_scales_are_kept_beside_packed_ones_alone():
    """What somebody makes of a weight that is as it was stays so."""
    model = model_of(nested=False)
    with torch.no_grad():
        model.eval()(inputs(200, K).detach())
    base = bases(model)[0]
    with torch.no_grad():
        base(inputs(1, K))  # bitsandbytes packs for no x that could want a gradient

    def values():
        return base.weight.quant_state.__dict__

    assert not unpacking.packed(base) and unpacking.KEPT not in values()
    generate(model)
    assert (unpacking.KEPT in values()) is unpacking.packed(base)
    step(model)
    assert unpacking.KEPT not in values()
    values()["absmax"] = 2 * values()["absmax"]
    doubled = values()["absmax"].clone()
    step(generate(model))
    assert torch.equal(values()["absmax"], doubled)


@pytest.mark.parametrize("targets", [["up", "down"], ["up"], ["down"]], ids="+".join)
@kinds
def test_a_backward_that_is_pending_while_the_model_generates(kind, nested, targets):
    model = model_of(kind, nested, targets=targets)
    found = []
    for between in (lambda: None, lambda: generate(model), lambda: None):
        x = inputs(150, K).requires_grad_()
        y = model.train()(x)
        between()
        model.train()
        found.append(torch.autograd.grad(y.square().sum(), [x, *(p for p in model.parameters() if p.requires_grad)]))
    for expected, *others in zip(*found, strict=True):
        assert all(torch.equal(expected, other) for other in others)


def test_threads_that_train_at_once_after_generating():
    for _ in range(5):
        model = model_of(nested=False)
        scales = [base.weight.quant_state.absmax.clone() for base in bases(model)]
        generate(model).train()
        threads = [threading.Thread(target=model, args=(inputs(150, K),)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(a, base.weight.quant_state.absmax) for a, base in zip(scales, bases(model), strict=True))


def test_threads_that_generate_while_others_want_gradients():
    """Packed and unpacked in turn: no call meets a weight that is half of either."""
    model, stop, wrong = model_of().eval(), threading.Event(), []
    x = inputs(3, K)
    with settings.override(min_tokens=0):
        y = model(x)
        (dx,) = torch.autograd.grad(y.sum(), x)

    def compare(*pairs):
        # a packed weight has scales of bfloat16
        wrong.extend(1 for a, b in pairs if (a - b).abs().max() > 3e-2 * b.abs().max())

    def generates():
        while not stop.is_set():
            with torch.no_grad():
                compare((model(x.detach()), y))

    def differentiates():
        while not stop.is_set():
            mine = x.detach().clone().requires_grad_()
            found = model(mine)
            compare((found, y), (torch.autograd.grad(found.sum(), mine)[0], dx))

    def alive(run):
        try:
            run()
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=alive, args=(run,)) for run in (generates, differentiates, generates)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        time.sleep(3)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert not wrong, wrong[:3]


def test_training_that_waits_while_another_thread_packs():
    model = model_of(targets=["down"])
    base = bases(model)[0]  # without an adapter
    W, x, stock_forward = base.weight, inputs(3, K).detach(), unpacking._stock[type(base)]
    now = copy.copy(before := W.quant_state)
    now.__dict__[unpacking.KEPT] = {name: v for name, v in before.__dict__.items() if name in unpacking.SCALES}
    with unpacking._lock_of(W):
        unpacking._set_state(base, before, now)
        waits = threading.Thread(target=unpacking.ready, args=(base.train(), x))
        waits.start()
        time.sleep(0.2)
        with torch.no_grad():
            stock_forward(base.eval(), x)
        base.train()
    waits.join()
    assert not unpacking.packed(base) and torch.equal(W.quant_state.absmax, before.absmax)


@pytest.mark.parametrize("earlier", [False, True], ids=["the first model", "an earlier model trained"])
def test_training_after_a_first_call_under_inference_mode(earlier):
    """In which bitsandbytes casts the bias, to a tensor that no backward can have."""
    from peft_fast.patch import packed

    packed._trusted.clear()
    if earlier:
        step(model_of())
    expected, model = step(model_of()), model_of()
    for base in bases(model):
        base.bias.data = base.bias.data.double()  # not what it computes in
    with torch.inference_mode():
        model.train()(inputs(150, K).detach())
    assert_same(expected, step(model), 1e-5)
    assert set(packed._trusted.values()) == {True} and peft_fast.report(model).fast_calls


def test_who_patches_bitsandbytes_after_us(monkeypatch):
    import bitsandbytes as bnb

    model, calls = model_of().eval(), []
    ours = bnb.nn.Linear4bit.forward
    assert ours is unpacking.forward

    def theirs(self, x):
        calls.append(1)
        return ours(self, x)

    with monkeypatch.context() as patched:
        patched.setattr(bnb.nn.Linear4bit, "forward", theirs)
        peft_fast.accelerate(model)
        assert bnb.nn.Linear4bit.forward is theirs
        with torch.no_grad():
            model(inputs(1, K))
        assert calls
    peft_fast.disable()
    before = bnb.nn.Linear4bit.forward
    with monkeypatch.context() as patched:
        patched.setattr(bnb.nn.Linear4bit, "forward", lambda self, x: calls.append(2) or before(self, x))
        mine = bnb.nn.Linear4bit.forward
        peft_fast.accelerate(model)
        with torch.no_grad():
            model(inputs(1, K))
        assert calls[-1] == 2
        peft_fast.disable()
        assert bnb.nn.Linear4bit.forward is mine
