"""Groups where a forward is run again or cut short: checkpoints from the first step on, out of memory."""

import gc
import weakref

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft_fast
from peft_fast.patch import groups
from tests.patch.test_groups import QKV, Attention, attention, found, learned, runs, steps
from tests.patch.test_training import TOKENS, llama
from tests.patch.toys import K, adapt, assert_same, inputs, layers, stock, toy

REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])


def pending():
    """What waits in this thread for a sibling, where gradients are wanted."""
    return groups._local.slots[True].pending


class Checkpointed(nn.Module):
    """Attention in a region of its own that may be computed again."""

    def __init__(self):
        super().__init__()
        self.inner, self.reentrant, self.skip = Attention(), None, ()

    def forward(self, x):
        return torch.tanh(checkpoint(self.region, x, use_reentrant=self.reentrant))

    def region(self, x):
        h = torch.tanh(x)
        names = [name for name in ("q", "k", "v") if name not in self.skip]
        return torch.cat([getattr(self.inner, name)(h) for name in names], -1).exp()


class Plain(Checkpointed):
    """The same without a checkpoint."""

    def forward(self, x):
        return torch.tanh(self.region(x))


def pair(reentrant, **config):
    models = [adapt(kind, ["q", "k", "v"], **config) for kind in (Plain, Checkpointed)]
    models[1].base_model.model.reentrant = reentrant
    return models


def assert_equal_steps(expected, got):
    for one, other in zip(expected, got, strict=True):
        assert_same(one, other)


@REENTRANT
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("xs", [1, 2], ids=["one input", "siamese"])
def test_checkpoints_give_the_gradients_without_from_the_first_step(xs, p, reentrant):
    plain, again = pair(reentrant, lora_dropout=p)
    xs = [inputs(seed=i) for i in range(xs)]
    # the first step without a group, then with one: bit by bit the same as without a checkpoint
    expected = steps(plain, *xs, n=4)
    assert_equal_steps(expected, steps(again, *xs, n=4))
    assert runs(plain) and runs(again) >= runs(plain) and found(again) == {QKV}


@REENTRANT
def test_accumulation_under_checkpoints(reentrant):
    def train(model):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        torch.manual_seed(0)
        for i in range(6):
            model(inputs(seed=i)).square().sum().backward()
            if i % 2:
                optimizer.step()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, again = pair(reentrant, lora_dropout=0.1)
    assert_same(train(plain), train(again))
    assert runs(plain) == 4


@REENTRANT
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_group_dissolves_between_steps_only(p, reentrant):
    """k is left out from some step on: until the group stops, every recomputation still goes its forward's way."""
    plain, again = pair(reentrant, lora_dropout=p)
    for model in (plain, again):
        steps(model, inputs(), n=2)
        model.base_model.model.skip = ("k",)
    xs = [inputs(seed=i) for i in range(4)]
    assert_equal_steps(steps(plain, *xs, n=4), steps(again, *xs, n=4))
    for model in (plain, again):
        assert found(model) == {frozenset(["q", "v"])}


@REENTRANT
def test_evaluation_between_forward_and_backward(reentrant):
    """The group starts there, where nothing is computed again, and nowhere else."""
    plain, again = pair(reentrant, lora_dropout=0.1)
    grads = []
    for model in (plain, again):
        torch.manual_seed(0)
        loss = model(inputs()).square().sum()
        model.eval()
        with torch.no_grad(), torch.random.fork_rng():
            for _ in range(3):
                model(inputs())
        assert runs(model) == 3
        model.train()
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_same(*grads)


@REENTRANT
@pytest.mark.parametrize("targets", ["all-linear", ["gate_proj", "up_proj", "down_proj"]], ids=["all", "mlp"])
def test_enable_in_the_middle_of_the_first_checkpointed_step(targets, reentrant):
    """Nobody walked the model: its groups and blocks are found while a forward is under way."""
    models = [llama(lora_dropout=0.1, target_modules=targets).train() for _ in range(2)]
    for model in models:
        peft_fast.restore(model)
    peft_fast.enable()
    models[1].enable_input_require_grads()
    models[1].gradient_checkpointing_enable({"use_reentrant": reentrant})
    grads = []
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        grads.append([])
        for i in range(3):
            torch.manual_seed(i)
            model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
            grads[-1].append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            optimizer.step()
            optimizer.zero_grad()
        report = peft_fast.report(model)
        assert len(report.blocks) == 2 and report.block_calls >= 4
        assert len(report.groups) == (2 if targets == "all-linear" else 0)
    assert_equal_steps(*grads)


def test_a_region_that_ends_between_siblings():
    """The first is computed again in backward, its siblings outside of the checkpoint are not."""
    model = learned(attention())
    inner = model.base_model.model
    x = inputs()

    def grads(first):
        h = torch.tanh(x)
        y = torch.cat((first(h), inner.k(h)), -1)
        return torch.autograd.grad(y.square().sum(), [x, inner.q.lora_A["default"].weight])

    for one, other in zip(grads(inner.q), grads(lambda h: checkpoint(inner.q, h, use_reentrant=False)), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_what_a_recomputation_left_behind_is_not_taken():
    """It stops at the last tensor that is asked for: its other results have no graph behind them."""
    model = learned(attention())
    inner, x = model.base_model.model, inputs()
    checkpoint(lambda h: inner.q(h).exp(), x, use_reentrant=False).sum().backward()
    assert pending() is not None
    x.grad = None
    inner.k(x).sum().backward()
    got, x.grad = x.grad, None
    with stock():
        inner.k(x).sum().backward()
    assert torch.allclose(got, x.grad, rtol=1e-5, atol=1e-6)


def test_a_sibling_without_gradients_between_the_others():
    """What it does, and when its group stops, must not lead the others another way in the recomputation."""
    model, x = attention(lora_dropout=0.0), inputs()
    inner = model.base_model.model

    def region(x):
        h = torch.tanh(x)
        q = inner.q(h)
        with torch.no_grad():
            k = inner.k(h)
        return torch.cat((q, k, inner.v(h)), -1)

    def grads(run):
        for p in model.parameters():
            p.grad = None
        run(x).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    learned(model)
    for _ in range(6):
        with stock():
            expected = grads(region)
        assert_same(expected, grads(lambda x: checkpoint(region, x, use_reentrant=False)), rtol=1e-5)
        steps(model, inputs())


def test_siblings_may_have_losses_of_their_own():
    """Heads on one detached tensor, each with its own backward: also one after the other, before the next is called."""
    model = learned(attention(), inputs().detach())
    inner = model.base_model.model

    def grads(order):
        x = inputs().detach()
        for p in model.parameters():
            p.grad = None
        if order == "together":
            for y in [inner.q(x), inner.k(x), inner.v(x)]:
                y.square().sum().backward()
        else:
            for layer in (inner.q, inner.k, inner.v):
                layer(x).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    for order in ("together", "in turn"):
        with stock():
            expected = grads(order)
        before = runs(model)
        assert_same(expected, grads(order), rtol=1e-5)
        assert runs(model) == before + 1


@pytest.mark.parametrize("where", ["between the siblings", "in the operator"])
def test_an_error_is_survived_and_what_waited_is_let_go(where, monkeypatch):
    """Out of memory: the caller comes again with a smaller batch, and finds the memory of the first one free."""
    model = learned(attention())
    inner = model.base_model.model
    waiting = []

    def fail(*args, **kwargs):
        waiting.extend(weakref.ref(y) for y, _ in filter(None, pending().results))
        raise torch.OutOfMemoryError("planted")

    if where == "in the operator":
        model.base_model.model.q(inputs())
        waiting = [weakref.ref(y) for y, _ in filter(None, pending().results)]
        monkeypatch.setattr(groups, "lora_group", lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("x")))
    else:
        inner.between = fail
    with pytest.raises(torch.OutOfMemoryError):
        model(inputs(64, K))
    monkeypatch.undo()
    if where == "in the operator":
        assert pending() is None, "the leader must let go before it allocates"
    else:
        assert any(ref() is not None for ref in waiting)
        del inner.between
        model(inputs(8, K))
    assert waiting and all(ref() is None for ref in waiting)
    with stock():
        expected = model(inputs())
    assert torch.allclose(model(inputs()), expected, rtol=1e-5, atol=1e-6)
    steps(model, inputs(), n=2)
    assert found(model) == {QKV}


def test_generate_is_stocks_and_prefills_in_groups():
    model = llama().eval()
    arguments = {"input_ids": TOKENS[:, :4], "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with stock():
        expected = model.generate(**arguments)
    assert torch.equal(model.generate(**arguments), expected)
    report = peft_fast.report(model)
    assert len(report.groups) == len(report.blocks) == 2 and report.group_calls == 10 and report.block_calls == 12


@REENTRANT
@pytest.mark.parametrize("first", ["policy", "reference"])
def test_switching_the_adapter_is_no_optimizer_step(first, reentrant):
    """DPO with a reference adapter: it runs between the policy's checkpointed forward and its backward."""
    plain, again = pair(reentrant, lora_dropout=0.1)
    grads = []
    for model in (plain, again):
        other = LoraConfig(r=3, target_modules=["q", "k", "v"], lora_dropout=0.1, init_lora_weights=False)
        torch.manual_seed(9)
        model.add_adapter("reference", other)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)

        def reference(model=model):
            model.set_adapter("reference", inference_mode=True)
            with torch.no_grad():
                y = model(inputs())
            model.set_adapter("default")
            return y

        grads.append([])
        for i in range(5):
            torch.manual_seed(i)
            y = reference() if first == "reference" else 0
            loss = (model(inputs()) - y).square().sum()
            if first == "policy":
                loss = loss * reference().mean()
            loss.backward()
            grads[-1].append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            optimizer.step()
            optimizer.zero_grad()
        assert runs(model)
    assert_equal_steps(*grads)


class DataSgd(torch.optim.Optimizer):
    """Writes to p.data, as Lion, Prodigy and 8-bit optimizers do: no version is counted."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            p.data.add_(p.grad, alpha=-1e-3)


def test_an_optimizer_that_writes_past_the_version_counter_is_seen():
    model, other = attention(), attention()
    optimizer, another = (DataSgd([p for p in m.parameters() if p.requires_grad]) for m in (model, other))
    other(inputs()).sum().backward()
    for i in range(4):
        if i == 2:
            optimizer.step()
        another.step()  # of other adapters: what this model computed may not be done with
        model(inputs()).sum().backward()
        assert runs(model) == max(0, i - 1)
    peft_fast.restore(model)
    assert runs(model) == 0


def test_what_waits_does_not_outlive_its_forward_or_its_model():
    model, other = learned(attention()), toy()

    def left_over():
        x = inputs()
        model.base_model.model.q(x)
        return weakref.ref(pending().results[1][0]), weakref.ref(x)

    ref, _ = left_over()
    layers(other)[0](inputs())
    assert ref() is None, "another module was called"
    ref, x = left_over()
    weight = weakref.ref(model.base_model.model.q.base_layer.weight)
    model = None
    gc.collect()
    assert ref() is None and x() is None and weight() is None and pending() is None


def test_an_old_result_is_not_taken_after_data_was_replaced():
    model = learned(attention())
    inner, x = model.base_model.model, inputs()
    inner.q(x)
    inner.k.base_layer.weight.data = torch.zeros(16, K)
    with stock():
        expected = inner.k(x)
    assert torch.allclose(inner.k(x), expected, rtol=1e-5, atol=1e-6)
