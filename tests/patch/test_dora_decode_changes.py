"""DoRA, few tokens without gradients: whatever changes between two calls is seen by the next, the kept norm too."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from peft import LoraConfig
from torch import nn

import peft_fast
from peft_fast import native
from peft_fast.ops import dora_norm
from peft_fast.patch import norms as kept_norms
from tests.patch.decoding import assert_right, dora_model, magnitude
from tests.patch.test_decode_changes import BROKEN, CHANGES
from tests.patch.toys import K, N, inputs, layers, stock

pytestmark = [
    pytest.mark.skipif(not native.load(), reason=f"the compiled operators: {native.reason()}"),
    pytest.mark.usefixtures("as_shipped"),
]


@pytest.mark.parametrize("change", [change for change in CHANGES if change != "train"])  # whose masks are others
def test_every_change_is_seen_by_the_next_call(change):
    """And by the one after it, which is the compiled one's if the layer decodes at all."""
    model, x = dora_model(lora_dropout=0.2), inputs(3, K).detach()
    if change in ("base_replaced", "base_of_another_class"):
        peft_fast.enable()  # a base that nobody marked
    assert_right(model, x), assert_right(model, x)
    CHANGES[change][0](model)
    for _ in range(3):
        torch.manual_seed(3)
        with torch.no_grad():
            with stock():
                torch.manual_seed(3)
                expected = model(x)
            torch.manual_seed(3)
            torch.testing.assert_close(model(x), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("change", BROKEN)
def test_what_peft_cannot_run(change):
    model = dora_model()
    assert_right(model, inputs(3, K).detach())
    BROKEN[change](model)
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError)) if "rank_above" not in change else stock():
        model(inputs(3, K).detach())


def _hook(module):
    module.register_forward_hook(lambda m, args, y: y * 2)


def _flip(tensor, dim):
    tensor.copy_(tensor.flip(dim))


def _second_dora(model, on):
    model.add_adapter("second", LoraConfig(r=5, target_modules=["up", "down"], init_lora_weights=False, use_dora=True))
    model.base_model.set_adapter(on)
    model.eval()


# what only DoRA has -> how many layers decode afterwards
OWN = {
    "m_in_place": (lambda m: magnitude(layers(m)[0]).weight.data.mul_(1.5), 2),
    "m_data": (lambda m: setattr(magnitude(layers(m)[0]).weight, "data", torch.rand(N)), 2),
    "m_replaced": (lambda m: setattr(magnitude(layers(m)[0]), "weight", nn.Parameter(torch.rand(N))), 2),
    "m_in_bfloat16": (lambda m: magnitude(layers(m)[0]).bfloat16(), 2),
    "m_every_other": (lambda m: setattr(magnitude(layers(m)[0]).weight, "data", torch.rand(2 * N)[::2]), 2),
    "hook_on_m": (lambda m: _hook(magnitude(layers(m)[0])), 1),
    "signs_of_W": (lambda m: layers(m)[0].base_layer.weight.data.neg_(), 2),
    "columns_of_W": (
        lambda m: layers(m)[0].base_layer.weight.data.copy_(layers(m)[0].base_layer.weight.data.flip(1)),
        2,
    ),
    "rows_of_W": (lambda m: layers(m)[0].base_layer.weight.data.copy_(layers(m)[0].base_layer.weight.data.flip(0)), 2),
    "signs_of_B": (lambda m: layers(m)[0].lora_B["default"].weight.data.neg_(), 2),
    "one_element_of_W": (lambda m: layers(m)[0].base_layer.weight.data[3, 5].add_(0.5), 2),
    "W_and_B": (lambda m: [p.data.mul_(2) for p in layers(m)[0].parameters()], 2),
    "another_adapter": (lambda m: _second_dora(m, "second"), 2),
    "two_adapters": (lambda m: _second_dora(m, ["default", "second"]), 0),
    "variant_of_another_class": (lambda m: layers(m)[0].lora_variant.update({"default": _Other()}), 1),
    "variant_with_its_own": (lambda m: _instance(layers(m)[0].lora_variant["default"]), 1),
    "no_variant": (lambda m: layers(m)[0].lora_variant.clear(), 2),
    "fresh": (lambda m: layers(m)[0].lora_B["default"].weight.data.zero_(), 1),
}


def _instance(variant):
    variant.forward = _Other.forward


class _Other:
    @staticmethod
    def forward(layer, active_adapter, x, result, **kwargs):
        return result * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", OWN)
def test_changes_of_what_only_dora_has(change, dtype):
    apply, taken = OWN[change]
    model, x = dora_model(dtype), inputs(2, K, dtype=dtype).detach()
    assert_right(model, x), assert_right(model, x)
    if change in ("m_data", "m_replaced", "m_every_other", "m_in_bfloat16") and dtype is torch.bfloat16:
        model.float(), model.bfloat16()
    apply(model)
    for _ in range(3):
        assert assert_right(model, x) == taken


def test_merging_and_back_is_seen(norms):
    """In bfloat16 PEFT's way back leaves other weights, which no version counts."""
    model, x = dora_model(torch.bfloat16), inputs(1, K, dtype=torch.bfloat16).detach()
    assert_right(model, x)
    weight = layers(model)[0].base_layer.weight
    before = weight.detach().clone()
    model.merge_adapter(), model.unmerge_adapter()
    assert not torch.equal(weight, before)
    assert_right(model, x), assert_right(model, x)
    assert len(norms) == 4
    with peft_fast.merged(model):
        assert_right(model, x)
    assert_right(model, x)
    assert len(norms) == 4  # every bit is back


def test_training_between_two_calls(norms):
    model, x = dora_model(), inputs(4, K).detach()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        assert assert_right(model, x) == 2
        model.train()(inputs()).square().mean().backward()
        optimizer.step()
        model.eval()
    assert len(norms) > 6


def test_a_layer_takes_its_norm_with_it():
    """Copies find their own, and nothing keeps a layer or its tensors alive."""
    model, x = dora_model(), inputs(1, K).detach()
    assert_right(model, x), assert_right(model, x)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.base_model.model.up.base_layer.weight.mul_(2)
    assert_right(other, x), assert_right(other, x), assert_right(model, x)
    gone = weakref.ref(layers(model)[0]), weakref.ref(layers(model)[0].base_layer.weight)
    del model
    gc.collect()
    assert gone[0]() is None and gone[1]() is None


def test_threads():
    """Several at once, while another gives them norms that the probe does not bear out: none of these is taken."""
    model, x = dora_model(), inputs(1, K).detach()
    layer = layers(model)[0]
    with torch.no_grad():
        expected = layer(x)
        wrong = []

        def run():
            with torch.no_grad():
                wrong.extend(1 for _ in range(300) if not torch.allclose(layer(x), expected, atol=1e-5))

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(50):
            native.keep(layer, 1, False, torch.ones(N), torch.ones(K), torch.ones(N))
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("tokens", [2, 50])
def test_a_weight_that_is_written_while_its_norm_is_computed(tokens, monkeypatch):
    """As by a hot swap in another thread: the call may give either, the next ones are right."""
    model, x = dora_model(), inputs(tokens, K).detach()
    assert_right(model, x)

    def torn(W, adapter, **kwargs):
        norm = dora_norm(W, adapter, **kwargs)
        with torch.no_grad():
            adapter.B.mul_(5)
        return norm

    for layer in layers(model):
        layer.lora_A["default"].weight.data.neg_()
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(kept_norms, "dora_norm", torn)
        model(x)
    for _ in range(3):
        assert_right(model, x)


def test_a_norm_that_is_kept_for_nobody():
    native.keep(nn.Linear(2, 2), 1, False, torch.ones(2), torch.ones(2), torch.ones(2))


@pytest.mark.parametrize("tokens", [2, 50])
def test_a_weight_that_is_another_one_only_while_its_norm_is_computed(tokens, monkeypatch):
    """As by who swaps averaged weights in and out in another thread: afterwards every bit is as it was."""
    model, x, swaps = dora_model(), inputs(tokens, K).detach(), []

    def swapped(W, adapter, **kwargs):
        if swaps:
            return dora_norm(W, adapter, **kwargs)
        swaps.append(W)
        with torch.no_grad():
            before = W.detach().clone()
            W.mul_(3)
            norm = dora_norm(W, adapter, **kwargs)
            W.copy_(before)
        return norm

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(kept_norms, "dora_norm", swapped)
        model(x)
    assert len(swaps) == 1
    for _ in range(3):
        assert_right(model, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [2, 50])
def test_adapters_of_another_dtype_with_the_same_values(dtype, tokens):
    """Below float32 the norm is rounded as the adapter is."""
    model = dora_model(dtype, autocast_adapter_dtype=False)
    for layer in layers(model):
        for part in (layer.lora_A, layer.lora_B):
            part.bfloat16()
    x = inputs(tokens, K, dtype=dtype).detach()

    def call():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32 and tokens > 2):
            return model(x)

    call(), call(), call()
    for layer in layers(model):
        for part in (layer.lora_A, layer.lora_B):
            part.float()
    found = call()
    kept_norms._alone.clear(), kept_norms._beside.clear()
    fresh = copy.deepcopy(model)  # of which nothing is kept
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32 and tokens > 2):
        expected = fresh(x)
    assert torch.equal(found, expected)
