"""peft_fast.merged: the same outputs inside, the same bits after, and nothing refused by halves."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

import peft_fast
from peft_fast import settings
from peft_fast.patch import merging
from tests.patch.toys import K, N, Toy, conv1d, inputs, layers, stock, tensor_of, toy


class Tied(nn.Module):
    """An embedding and a head with one weight, as language models have."""

    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(23, K), nn.Linear(K, K), nn.Linear(K, 23, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.body(self.embed(ids))))


class Convolved(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.one, self.two = nn.Conv1d(K, 8, 3, groups=groups), nn.Conv2d(8, 4, (1, 1))

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)).unsqueeze(-1))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.up = nn.MultiheadAttention(K, 2, batch_first=True), nn.Linear(K, N)

    def forward(self, x):
        return self.up(self.attention(x, x, x, need_weights=False)[0])


def adapted(net, targets, dtype=torch.float32, **config):
    torch.manual_seed(0)
    config = {"r": 4, "init_lora_weights": False, "target_modules": targets, **config}
    return get_peft_model(net.to(dtype), LoraConfig(**config)).eval()


def everything(model):
    """What merged() must leave as it was: objects, places in memory, versions, bits, gradients, states of layers."""
    tensors = {
        name: (p, p.data_ptr(), p._version, p.requires_grad, p.detach().clone(), p.grad)
        for name, p in model.named_parameters(remove_duplicate=False)
    }
    states = {
        name: (list(m.merged_adapters), dict(m._caches), m.active_adapters, m.disable_adapters)
        for name, m in model.named_modules()
        if isinstance(m, LoraLayer)
    }
    hooks = [len(m._state_dict_hooks) + len(m._load_state_dict_pre_hooks) for m in model.modules()]
    return tensors, states, hooks, [m.training for m in model.modules()]


def assert_untouched(model, before):
    tensors, *others = everything(model)
    assert others == list(before[1:])
    assert tensors.keys() == before[0].keys()
    for name, now in tensors.items():
        then = before[0][name]
        assert now[0] is then[0] and now[1:4] == then[1:4] and now[5] is then[5], name
        assert torch.equal(now[4].view(torch.uint8), then[4].view(torch.uint8)), name
    assert not merging._open


def assert_merges(model, x, rtol=1e-5, some=True):
    """Outputs inside are those outside; everything is as it was afterwards."""

    def run():
        return tensor_of(model(x))

    with torch.no_grad():
        expected = run()
        before = everything(model)
        with peft_fast.merged(model) as same:
            assert same is model
            merged = [m for m in model.modules() if isinstance(m, LoraLayer) and m.merged]
            y = run()
        assert_untouched(model, before)
        assert bool(merged) == some
        assert torch.equal(run(), expected)
    torch.testing.assert_close(y, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


@pytest.mark.parametrize("how", ["peft alone", "accelerate", "enable"])
@pytest.mark.parametrize("layer", [nn.Linear, conv1d])
def test_inside_and_after(layer, how):
    model = peft_fast.restore(toy(layer, lora_dropout=0.1)).eval()
    if how == "accelerate":
        peft_fast.accelerate(model)
    elif how == "enable":
        peft_fast.enable()
    assert_merges(model, inputs().detach())
    with settings.override(min_tokens=128):
        assert_merges(model, inputs(1, K).detach())


ids = torch.arange(46).view(2, 23) % 23
KINDS = {
    "bf16": (lambda: toy(base_dtype=torch.bfloat16).eval(), inputs(dtype=torch.bfloat16).detach(), 5e-2),
    "dora": (lambda: toy(use_dora=True).eval(), inputs().detach(), 1e-5),
    "dora_conv1d": (lambda: toy(conv1d, use_dora=True).eval(), inputs().detach(), 1e-5),
    "lora_bias": (lambda: toy(lora_bias=True).eval(), inputs().detach(), 1e-5),
    "bias_all": (lambda: toy(bias="all").eval(), inputs().detach(), 1e-5),
    "mica": (lambda: adapted(Toy(), ["up", "down"], init_lora_weights="mica"), inputs().detach(), 1e-5),
    "embedding": (lambda: adapted(Tied(), ["embed"]), ids, 1e-5),
    "head": (lambda: adapted(Tied(), ["head"]), ids, 1e-5),
    "tied": (lambda: adapted(Tied(), ["embed", "head", "body"]), ids, 1e-5),
    "two_tied": (lambda: adapted(Tied(), ["embed", "head"]), ids, 1e-5),
    "dora_embedding": (lambda: adapted(Tied(), ["embed"], use_dora=True), ids, 1e-5),
    "convolutions": (lambda: adapted(Convolved(), ["one", "two"]), torch.randn(2, K, 9), 1e-5),
    "dora_convolution": (lambda: adapted(Convolved(), ["one"], use_dora=True), torch.randn(2, K, 9), 1e-5),
    "modules_to_save": (lambda: adapted(Toy(), ["up"], modules_to_save=["down"]), inputs().detach(), 1e-5),
    "token_indices": (lambda: adapted(Tied(), ["body"], trainable_token_indices={"embed": [1, 2]}), ids, 1e-5),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter(kind):
    make, x, rtol = KINDS[kind]
    assert_merges(make(), x, rtol)


def second(model, **config):
    config = {"r": 3, "target_modules": ["up"], "init_lora_weights": False, **config}
    model.add_adapter("second", LoraConfig(**config))
    model.base_model.set_adapter(["default", "second"])
    return model.eval()


@pytest.mark.parametrize("dora", [False, True])
def test_several_active_adapters(dora):
    assert_merges(second(toy(), use_dora=dora), inputs().detach())


@pytest.mark.parametrize("before", [False, True])
def test_dora_first_of_several(before):
    assert_merges(second(toy(use_dora=True), use_dora=before), inputs().detach())


def test_experts():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, moe_intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=names, init_lora_weights=False)
    model = get_peft_model(Qwen3MoeForCausalLM(config), lora).eval()
    assert_merges(model, torch.randint(40, (2, 7)), 1e-4)


def test_attention_merges_itself():
    model = adapted(Attending(), ["attention", "up"])
    x = inputs(2, 5, K).detach()
    with torch.no_grad():
        expected = model(x)
        with peft_fast.merged(model):
            assert model.base_model.model.up.merged and not model.base_model.model.attention.merged
            y = model(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(model(x), expected)


def test_replicated_layers():
    """They share their weights, and each has an adapter of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    )  # fmt: skip
    lora = LoraConfig(r=2, layer_replication=[[0, 2], [0, 2]], target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM(config), lora).eval()
    assert_merges(model, torch.randint(40, (2, 7)), 1e-4)


def test_bf16_is_as_peft_merges_it():
    """The weights inside are merge_and_unload's, bit for bit; PEFT's own way back is not the way back."""
    model = toy(base_dtype=torch.bfloat16).eval()
    expected = copy.deepcopy(model).merge_and_unload()
    with peft_fast.merged(model):
        for name in ("up", "down"):
            inside = getattr(model.base_model.model, name).base_layer.weight
            assert torch.equal(inside, getattr(expected, name).weight)
    before = model.base_model.model.up.base_layer.weight.clone()
    model.merge_adapter()
    model.unmerge_adapter()
    assert not torch.equal(model.base_model.model.up.base_layer.weight, before)


def test_nested():
    model, x = toy().eval(), inputs().detach()
    before = everything(model)
    with peft_fast.merged(model), torch.no_grad():
        y = model(x)
        with peft_fast.merged(model):
            assert torch.equal(model(x), y)
        assert all(layer.merged for layer in layers(model)) and torch.equal(model(x), y)
    assert_untouched(model, before)


def test_two_models_at_once():
    one, two = toy().eval(), toy(seed=1).eval()
    before = everything(one), everything(two)
    with peft_fast.merged(one), peft_fast.merged(two):
        assert all(layer.merged for layer in layers(one) + layers(two))
    assert_untouched(one, before[0])
    assert_untouched(two, before[1])


def test_an_error_inside():
    model = toy().eval()
    before = everything(model)
    with pytest.raises(ZeroDivisionError), peft_fast.merged(model):
        _ = 1 / 0
    assert_untouched(model, before)


def test_an_error_while_merging(monkeypatch):
    model = toy().eval()
    before = everything(model)
    last = layers(model)[-1]
    merge = type(last).merge

    def fails(self, *args, **kwargs):
        merge(self, *args, **kwargs)
        if self is last:
            raise MemoryError("none left")

    monkeypatch.setattr(type(last), "merge", fails)
    with pytest.raises(MemoryError), peft_fast.merged(model):
        pytest.fail("not reached")
    monkeypatch.undo()
    assert_untouched(model, before)


def test_layers_that_run_their_base_alone_stay():
    model, x = toy().eval(), inputs().detach()
    with model.disable_adapter():
        assert_merges(model, x, some=False)
    model.merge_adapter()
    assert_merges(model, x)
    model.unmerge_adapter()
    layers(model)[0].set_adapter([])
    assert_merges(model, x)


def test_training_goes_on_as_if_nothing_had_been():
    def train(evaluate):
        model = toy(lora_dropout=0.1).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        torch.manual_seed(5)
        for _ in range(3):
            model(inputs()).square().mean().backward()
            if evaluate:
                with peft_fast.merged(model.eval()), torch.no_grad():
                    model(inputs())
                model.train()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    for expected, got in zip(train(False), train(True), strict=True):
        assert torch.equal(expected, got)


def test_moved_inside():
    """Another dtype given to the model inside is the old weight's too."""
    model = toy(base_dtype=torch.float32).eval()
    expected = copy.deepcopy(model).bfloat16()
    with peft_fast.merged(model):
        model.bfloat16()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_peft_may_unmerge_inside():
    model, x = toy().eval(), inputs().detach()
    before = everything(model)
    with torch.no_grad(), peft_fast.merged(model):
        with model.disable_adapter():
            y = model(x)
        with stock(), model.disable_adapter():
            torch.testing.assert_close(y, model(x))
    assert_untouched(model, before)


def test_merge_and_unload_inside_stays():
    model, x = toy().eval(), inputs().detach()
    with torch.no_grad():
        expected = model(x)
        with peft_fast.merged(model):
            net = model.merge_and_unload()
        torch.testing.assert_close(net(x), expected)
    assert type(net.up) is nn.Linear


@pytest.mark.parametrize("around", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_around_it(around):
    """The weights inside are those of no mode at all."""
    model = toy().eval()
    with peft_fast.merged(model):
        expected = [layer.base_layer.weight.clone() for layer in layers(model)]
    before = everything(model)
    with around(), peft_fast.merged(model):
        inside = [layer.base_layer.weight for layer in layers(model)]
    assert all(torch.equal(a, b) and not b.is_inference() for a, b in zip(expected, inside, strict=True))
    assert_untouched(model, before)


def test_a_copy_made_inside():
    model, x = toy().eval(), inputs().detach()
    with torch.no_grad():
        expected = model(x)
        with peft_fast.merged(model):
            twin = copy.deepcopy(model)
        torch.testing.assert_close(twin(x), expected)
        assert torch.equal(model(x), expected)


def test_it_costs_one_copy_of_the_adapted_weights():
    model = toy(targets=["up"]).eval()
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with peft_fast.merged(model):
        new = [p for p in model.parameters() if p.untyped_storage().data_ptr() not in storages]
    assert [tuple(p.shape) for p in new] == [(N, K)]
