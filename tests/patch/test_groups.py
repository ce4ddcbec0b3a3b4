"""Groups: which siblings are found, when they run as one, and that nobody takes a result that is not its own."""

import copy
import gc
import io

import pytest
import torch
from peft import LoraConfig
from torch import nn

import peft_fast
from peft_fast import settings
from peft_fast.patch import groups, ledger, plan
from tests.patch.toys import K, adapt, assert_same, inputs, layers, step, stock


class Attention(nn.Module):
    """q, k and v of one x; ``between`` runs before k, as whatever may happen there."""

    def __init__(self, layer=nn.Linear):
        super().__init__()
        self.q, self.k, self.v = layer(K, 24), layer(K, 16), layer(K, 8)

    def between(self, x):
        return x

    def forward(self, x):
        q = self.q(x)
        x = self.between(x)
        return torch.cat((q, self.k(x), self.v(x)), -1)


def attention(targets="q k v", **config):
    return adapt(Attention, targets.split(), **config)


QKV = frozenset(["q", "k", "v"])


def runs(model):
    return peft_fast.report(model).group_calls


def found(model):
    """Names of the layers in each group, without what all have in common."""
    return {
        frozenset(n.removeprefix("base_model.model.").removeprefix("inner.") for n in g)
        for g in peft_fast.report(model).groups
    }


def steps(model, *xs, n=1, lr=1e-3):
    """n optimizer steps, each over all xs in one backward -> the gradients of each step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    out = []
    for i in range(n):
        torch.manual_seed(i)
        sum(model(x).square().sum() for x in xs).backward()
        out.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    return out


def learned(model, x=None):
    """The model after a group of it was found and started."""
    steps(model, inputs() if x is None else x, n=2)
    assert runs(model), "no group ran"
    return model


def assert_is_stock(model, *args):
    """Output and gradients as without the guard."""
    with stock():
        expected = step(model, args, {})
    assert_same(expected, step(model, args, {}), rtol=1e-5)


def test_without_gradients_a_group_runs_from_the_second_call_on():
    model = attention()
    with torch.no_grad(), stock():
        expected = model(inputs())
    with torch.no_grad():
        for calls in range(3):
            assert torch.allclose(model(inputs()), expected, rtol=1e-5, atol=1e-6)
            assert runs(model) == calls
    assert found(model) == {QKV}
    report = peft_fast.report(model)
    assert (report.fast_calls, report.handed_back) == (9, {})
    assert "(2 groups and 0 blocks ran as one)" in str(report) and "1 groups of layers with one input" in str(report)


def test_in_training_a_group_starts_with_the_first_call_after_an_optimizer_step():
    model = attention()
    for _ in range(3):  # gradient accumulation: the same adapters all along
        model(inputs()).sum().backward()
    assert runs(model) == 0 and found(model) == {QKV}
    steps(model, inputs())
    assert runs(model) == 0
    steps(model, inputs(), n=2)
    assert runs(model) == 2
    assert_is_stock(model, inputs())
    assert runs(model) == 3


@pytest.mark.parametrize("config", [{}, {"lora_bias": True, "bias": "all"}], ids=["vanilla", "biases"])
def test_several_steps_are_stocks(config):
    other, model = attention(**config), attention(**config)
    with stock():
        expected = steps(other, inputs(), n=4)
    for one, got in zip(expected, steps(model, inputs(), n=4), strict=True):
        assert_same(one, got, rtol=1e-4)
    assert runs(model) == 3


def test_groups_off():
    model = attention()
    with settings.override(groups=False):
        steps(model, inputs(), n=3)
    assert runs(model) == 0 and peft_fast.report(model).fast_calls == 9


def test_a_sibling_without_adapter_is_not_needed():
    model = learned(attention("q v"))
    assert found(model) == {frozenset(["q", "v"])}
    assert_is_stock(model, inputs())


def test_outputs_may_be_written_in_place():
    model = learned(attention())
    inner = model.base_model.model
    x = inputs()
    q, k = inner.q(x), inner.k(x)
    q += 1
    k.mul_(2)
    (q.sum() + k.sum()).backward()
    assert q._base is None and k._base is None and x.grad is not None


def another_tensor(model):
    model.between = lambda x: x + 0.5


def another_version(model):
    model.between = lambda x: x.add_(0.5)


def another_view(model):
    model.between = lambda x: x.view_as(x)


def k_with(change):
    """``change(k)`` between q and k."""

    def apply(model):
        def between(x):
            change(model.k)
            return x

        model.between = between

    return apply


def _double_input(module, args):
    return (args[0] * 2,)


BETWEEN = {
    "another tensor": another_tensor,
    "x in place": another_version,
    "a view": another_view,
    "A in place": k_with(lambda k: k.lora_A["default"].weight.mul_(2)),
    "B in place": k_with(lambda k: k.lora_B["default"].weight.mul_(2)),
    "base in place": k_with(lambda k: k.base_layer.weight.mul_(2)),
    "another base": k_with(lambda k: setattr(k.base_layer, "weight", nn.Parameter(k.base_layer.weight * 2))),
    "bias": k_with(lambda k: k.base_layer.bias.add_(1)),
    "scaling": k_with(lambda k: k.set_scale("default", 3.0)),
    "merged": k_with(lambda k: k.merge()),
    "disabled": k_with(lambda k: k.enable_adapters(False)),
    "another adapter": k_with(lambda k: k.set_adapter("other")),
    "hook on the layer": k_with(lambda k: k.register_forward_pre_hook(_double_input)),
    "hook on A": k_with(lambda k: k.lora_A["default"].register_forward_pre_hook(_double_input)),
    "own forward": k_with(lambda k: setattr(k, "forward", lambda x: k.base_layer(x) * 2)),
}


@pytest.mark.parametrize("change", BETWEEN.values(), ids=BETWEEN)
def test_what_happens_between_siblings_is_seen(change):
    """The second layer's result must not be the one computed when the first was called."""

    def result(fast):
        model = attention()
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q", "k", "v"], init_lora_weights=False))
        model.set_adapter("default")
        with torch.no_grad():
            for _ in range(3):
                model(inputs().detach())
            assert runs(model) == (2 if fast else 0)
            change(model.base_model.model)
            return model(inputs().detach())

    with settings.override(groups=False):
        expected = result(False)
    assert torch.allclose(result(True), expected, rtol=1e-5, atol=1e-6)


MODES = {
    "no_grad for k": lambda inner, x: (inner.q(x), torch.no_grad()(inner.k)(x)),
    "autocast for k": lambda inner, x: (inner.q(x), torch.autocast("cpu", torch.bfloat16)(inner.k)(x)),
    "exact for k": lambda inner, x: (inner.q(x), settings.override(exact=True)(inner.k)(x)),
    "dropout off for k": lambda inner, x: (inner.q(x), inner.k.eval()(x)),
    "x wants a gradient for k": lambda inner, x: (inner.q(x), inner.k(x.requires_grad_())),
}


@pytest.mark.parametrize("mode", MODES)
def test_another_mode_for_one_sibling(mode):
    model = learned(attention(lora_dropout=0.5 if "dropout" in mode else 0.0))
    x = inputs().detach()
    q, k = MODES[mode](model.base_model.model, x)
    assert k.requires_grad is ("no_grad" not in mode)
    assert k.dtype is (torch.bfloat16 if "autocast" in mode else torch.float32)
    if "gradient" in mode:
        k.sum().backward()
        assert x.grad is not None
    if "dropout" in mode:
        with stock():
            assert torch.allclose(k, model.base_model.model.k(x), rtol=1e-5, atol=1e-6)


def test_layers_of_two_parents_are_never_one_group():
    """Falcon, GPT-J and Phi give one tensor to attention and MLP, T5 to the cross-attention of every layer."""

    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = Attention(), Attention()

        def forward(self, x):
            return self.one(x) + self.other(x)

    model = learned(adapt(Parallel, ["q", "k", "v"]))
    assert found(model) == {frozenset(["one.q", "one.k", "one.v"]), frozenset(["other.q", "other.k", "other.v"])}
    assert_is_stock(model, inputs())


def test_only_those_with_the_same_tensor():
    """DETR: v reads x, q and k read x with positions."""
    model = attention()
    model.base_model.model.forward = lambda x: _detr(model.base_model.model, x)
    learned(model)
    assert found(model) == {frozenset(["q", "k"])}
    assert_is_stock(model, inputs())


def _detr(self, x):
    h = x + 1
    return torch.cat((self.q(h), self.k(h), self.v(x)), -1)


def test_another_layer_may_come_between():
    """DeepSeek: q_a(x), q_b(q_a), then kv_a(x)."""

    class Latent(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_a, self.q_b, self.kv_a = nn.Linear(K, 8), nn.Linear(8, 24), nn.Linear(K, 24)

        def forward(self, x):
            return self.q_b(self.q_a(x)) + self.kv_a(x)

    model = learned(adapt(Latent, ["q_a", "q_b", "kv_a"]))
    assert found(model) == {frozenset(["q_a", "kv_a"])}
    assert_is_stock(model, inputs())


def test_long_lists_are_cut():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(K, 3) for _ in range(groups.MOST + 3))

        def forward(self, x):
            return sum(head(x) for head in self.heads)

    model = learned(adapt(Heads, [f"heads.{i}" for i in range(groups.MOST + 3)]))
    assert sorted(map(len, found(model))) == [3, groups.MOST]
    assert_is_stock(model, inputs())


def test_a_sibling_that_is_left_out_dissolves_the_group():
    """Right all along, and computed in vain only for a while."""
    model = learned(attention())
    inner = model.base_model.model
    inner.forward = lambda x: inner.q(x)
    for _ in range(12):
        assert_is_stock(model, inputs())
        steps(model, inputs())
    assert not found(model)
    ledger.forget(layers(model))
    model(inputs())
    assert runs(model) == 0
    # its siblings come back, but a group that turned out wrong too often is not tried again
    for _ in range(groups.TRIES + 1):
        del inner.forward
        steps(model, inputs(), n=4)
        inner.forward = lambda x: inner.q(x)
        steps(model, inputs(), n=12)
    del inner.forward
    steps(model, inputs(), n=4)
    assert not any("q" in group for group in found(model))
    assert_is_stock(model, inputs())


def test_one_lost_call_is_forgiven():
    model = learned(attention())
    inner = model.base_model.model
    inner.q(inputs())
    steps(model, inputs(), n=3)
    assert found(model) == {QKV}


def test_an_adapter_for_one_more_sibling_joins():
    model = learned(attention("q v"))
    model.add_adapter("wide", LoraConfig(r=4, target_modules=["q", "k", "v"], init_lora_weights=False))
    model.set_adapter("wide")
    steps(model, inputs(), n=6)
    assert found(model) == {QKV}
    assert_is_stock(model, inputs())
    model.set_adapter("default")  # k has no active adapter: all run one by one, and right
    assert_is_stock(model, inputs())


def test_a_layer_that_is_replaced_leaves():
    model = learned(attention())
    inner = model.base_model.model
    inner.v = inner.v.base_layer
    gc.collect()
    assert_is_stock(model, inputs())
    steps(model, inputs(), n=4)
    assert found(model) == {frozenset(["q", "k"])}


def test_copies_have_groups_of_their_own():
    model = learned(attention())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert not found(twin)
        for lora in layers(twin):
            lora.set_scale("default", 5.0)
        # with one tensor, one after the other: no result of one model may reach the other
        x = inputs()
        with torch.no_grad(), stock():
            expected = model(x), twin(x)
        with torch.no_grad():
            for _ in range(3):
                for y, e in zip((model(x), twin(x)), expected, strict=True):
                    assert torch.allclose(y, e, rtol=1e-5, atol=1e-6)
        assert found(twin) == {QKV}


def test_a_collected_model_leaves_nothing_behind():
    model = learned(attention())
    del model
    gc.collect()
    assert not len(groups._groups) and not len(groups._local.records) and not len(groups._seen)


def test_restore_forgets():
    model = learned(attention())
    peft_fast.restore(model)
    assert not len(groups._groups) and plan.Linear.forward is plan.stock_linear


def test_inference_mode_runs_one_by_one():
    model = attention()
    with torch.inference_mode():
        x = inputs(2, 5, K)
        for _ in range(3):
            y = model(x)
    with torch.no_grad(), stock():
        assert torch.allclose(y, model(inputs()), rtol=1e-5, atol=1e-6)
    assert runs(model) == 0


def test_enable_finds_groups_without_a_walk():
    peft_fast.restore(model := attention())
    peft_fast.enable()
    steps(model, inputs(), n=3)
    assert found(model) == {QKV} and runs(model) == 2
    peft_fast.disable()
    steps(model, inputs(), n=2)
    assert runs(model) == 2
