"""An adapter that was not trained, B = 0, adds nothing: a layer without gradients has its base's bits, as PEFT's."""

import importlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

import peft_fast
from peft_fast import native, settings
from peft_fast.patch import experts
from tests.patch.test_experts import BOTH, layer_of, model_of, tokens, wrappers
from tests.patch.toys import K, conv1d, inputs, layers, stock, toy

pytestmark = pytest.mark.skipif(not native.load(), reason=native.reason() or "live")
op = importlib.import_module("peft_fast.ops.lora_experts")


@pytest.fixture(autouse=True, params=[128, 0], ids=["as users have it", "few tokens are many"])
def _min_tokens(request):
    with settings.override(min_tokens=request.param):
        yield


def fresh(dtype=torch.float32, **config):
    config = {"autocast_adapter_dtype": False, "init_lora_weights": True, **config}
    return toy(config.pop("layer", nn.Linear), dtype, **config).eval()


def base_of(model, *args):
    with model.disable_adapter():
        return model(*args)


@pytest.mark.parametrize("rows", [(1,), (8,), (2, 1, 4), (), (3, 50)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", [nn.Linear, conv1d, lambda k, n: nn.Linear(k, n, bias=False)])
def test_layers(layer, dtype, rows):
    model = fresh(dtype, layer=layer, autocast_adapter_dtype=True)
    x = inputs(*rows, K, dtype=dtype).detach()
    with torch.inference_mode():
        y = model(x)
        assert peft_fast.report(model).fast_calls == 2
        assert torch.equal(y, base_of(model, x)) and y.dtype is dtype
        layers(model)[1].lora_B["default"].weight[-1, -1] = 0.5
        assert not torch.equal(model(x), y), "one element of B is enough to be seen"


def test_a_block():
    block = LlamaMLP(LlamaConfig(hidden_size=K, intermediate_size=3 * K))
    targets = ["gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(nn.Sequential(block), LoraConfig(r=4, target_modules=targets)).eval()
    peft_fast.accelerate(model)
    x = inputs(200, K).detach()
    with torch.no_grad():
        assert torch.equal(model(x), base_of(model, x)) and peft_fast.report(model).fast_calls == 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_draws_the_same_masks_again(reentrant):
    """A reentrant one runs its forward without gradients, and its recomputation with them."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.kept = nn.Linear(K, K), nn.Linear(K, K), []

        def forward(self, x):
            dropped = nn.functional.dropout(self.up(x), 0.5)
            self.kept.append(dropped.detach() != 0)
            return self.down(dropped)

    model = get_peft_model(Block(), LoraConfig(r=4, lora_dropout=0.1, target_modules=["up", "down"])).train()
    peft_fast.accelerate(model)
    checkpoint(model, inputs(200, K), use_reentrant=reentrant).sum().backward()
    first, again = model.base_model.model.kept
    assert torch.equal(first, again)


def test_traced_into_a_graph():
    model, x = fresh(), inputs(200, K).detach()
    with torch.no_grad():
        graph = make_fx(model)(x)
        layers(model)[0].lora_B["default"].weight.fill_(1.0)
        torch.testing.assert_close(graph(x), model(x))


@pytest.mark.parametrize("scaling", [torch.inf, torch.nan])
def test_a_scaling_that_is_not_finite(scaling):
    model = fresh()
    layers(model)[0].scaling["default"] = scaling
    with torch.no_grad():
        got = model(inputs())
        with stock():
            expected = model(inputs())
    assert torch.equal(got.isfinite(), expected.isfinite()) and not got.isfinite().all()


def test_a_bias_of_B_is_added():
    model = fresh(lora_bias=True)
    with torch.no_grad():
        layers(model)[1].lora_B["default"].bias.fill_(1.0)
        got, base = model(inputs()), base_of(model, inputs())
    torch.testing.assert_close(got, base + layers(model)[1].scaling["default"])


@pytest.mark.parametrize("where", ["A", "x"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_the_output(where, value):
    model, x = fresh(), inputs().detach()
    with torch.no_grad():
        (layers(model)[0].lora_A["default"].weight if where == "A" else x[1])[0, 3] = value
        got = model(x)
        with stock():
            expected = model(x)
    assert torch.equal(got.isfinite(), expected.isfinite()) and not got.isfinite().all()


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_experts(name, dtype, implementation, monkeypatch):
    model, calls = layer_of(name, implementation, dtype, init_lora_weights=True).eval(), []
    monkeypatch.setattr(experts, "lora_experts", lambda *a, **o: calls.append(1) or op.lora_experts(*a, **o))
    x = tokens(10, dtype).detach()
    with torch.inference_mode():
        y = model(x)
        assert peft_fast.report(model).fast_calls == 2 and not calls
        assert torch.equal(y, base_of(model, x))
        for wrapper in wrappers(model):
            wrapper.lora_B["default"].weight[-1, -1] = 0.5
            model(x)
            assert len(calls) == 2, "one element of one B is enough to be seen"
            wrapper.lora_B["default"].weight[-1, -1] = 0
            calls.clear()
    model(x).sum().backward()
    assert len(calls) == 2 and wrappers(model)[0].lora_B["default"].weight.grad.abs().max() > 0


def test_experts_that_are_not_finite(monkeypatch):
    model, x = layer_of(init_lora_weights=True).eval(), tokens().detach()
    with torch.no_grad():
        wrappers(model)[0].lora_A["default"].weight[-1, 3] = torch.nan
        got = model(x)
        with stock():
            expected = model(x)
    assert torch.equal(got.isfinite(), expected.isfinite()) and not got.isfinite().all()


def test_a_whole_model():
    """PEFT's own suite asks it of Mixtral, by torch.allclose and its 1e-8."""
    targets = ["q_proj", "k_proj", "v_proj"]
    parameters = ["gate.weight", *BOTH]
    model = model_of("mixtral", targets=parameters, target_modules=targets, init_lora_weights=True).eval()
    ids = torch.arange(10).view(1, -1)
    with torch.inference_mode():
        y = model(ids).logits
        with model.disable_adapter(), stock():
            expected = model(ids).logits
    assert torch.equal(y, expected)
    report = peft_fast.report(model)
    assert report.fast_calls == 2 * (3 + 2), report.handed_back
