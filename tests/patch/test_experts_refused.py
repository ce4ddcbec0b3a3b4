"""Experts that PEFT keeps, bit for bit, and the reason that the report names."""

import pytest
import torch
from peft.tuners.lora import layer as peft_layer
from torch import nn
from torch.nn.utils import parametrize
from transformers.integrations import moe

import peft_fast
from peft_fast.patch import experts, known
from tests.patch.test_experts import BOTH, E, assert_pefts, base_of, layer_of, tokens, wrappers


def _hook(model):
    base_of(model).register_forward_hook(lambda module, args, y: y * 2)


def _hook_inside(model):
    wrappers(model)[1].register_forward_pre_hook(lambda module, args: None)


class Doubled(nn.Module):
    def forward(self, W):
        return W * 2


def _train(model):
    base_of(model).down_proj.requires_grad_()


def _spread(model):
    base_of(model)._is_expert_parallel = True


def _no_config(model):
    del base_of(model).has_gate


def _narrow(model):
    for wrapper in wrappers(model):
        wrapper.lora_A.to(torch.bfloat16), wrapper.lora_B.to(torch.bfloat16)


LOW = "adapters of lower precision than the base, or of float64 beside it"
NOT = {
    "a hook": (_hook, "hooks or a replaced forward on the experts"),
    "a hook inside": (_hook_inside, "hooks or a replaced forward on a wrapper inside this one"),
    "trained": (_train, "the experts' own weights are trained"),
    "narrow adapters": (_narrow, LOW),
}


@pytest.mark.parametrize("change, reason", NOT.values(), ids=NOT)
def test_the_others_are_pefts_bit_by_bit(change, reason):
    model = layer_of()
    change(model)
    assert peft_fast.report(model).slow["base_model.model.experts"] == reason
    assert_pefts(model, reason, tokens())


@pytest.mark.parametrize(
    "change, reason",
    [
        (_spread, "the experts are spread over processes"),
        (_no_config, "Qwen3MoeExperts is not made by transformers' use_experts_implementation"),
    ],
)
def test_states_that_are_not_run(change, reason):
    model = layer_of()
    change(model)
    assert set(peft_fast.report(model).slow.values()) == {reason}


def test_another_parametrization_is_left_alone():
    """PEFT 0.21 leaves its own registered in that case, and adds the adapter once more at each call."""
    model = layer_of()
    parametrize.register_parametrization(base_of(model), "down_proj", Doubled())
    assert "parametrization" in peft_fast.report(model).slow["base_model.model.experts"]


def test_parameters_that_are_no_experts():
    model = layer_of(targets=[*BOTH, "router.weight"])
    slow = peft_fast.report(model).slow
    assert slow == {"base_model.model.router": "the parameter is not a stack of several experts"}
    model = layer_of("gpt_oss", targets=["experts.gate_up_proj_bias"])
    assert set(peft_fast.report(model).slow.values()) == {"the parameter is not a stack of several experts"}


def test_forwards_that_were_not_read(monkeypatch):
    class Own(type(base_of(layer_of()))):
        def forward(self, *args):
            return super().forward(*args)

    model = layer_of()
    base_of(model).__class__ = Own
    assert "Own's forward is not the one" in next(iter(peft_fast.report(model).slow.values()))
    model = layer_of(implementation="eager")
    experts._refuse_function.cache_clear()
    monkeypatch.setattr(experts, "KNOWN_EAGER", {})
    assert "a forward of its own" in next(iter(peft_fast.report(model).slow.values()))
    experts._refuse_function.cache_clear()
    monkeypatch.undo()
    model = layer_of()
    monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", lambda *args: None)
    assert "the experts run grouped_mm, not" in next(iter(peft_fast.report(model).slow.values()))


def test_an_unknown_wrapper_leaves_linear_layers_fast(monkeypatch):
    known._judge.cache_clear()
    monkeypatch.setattr(known, "KNOWN_WRAPPER", {})
    try:
        model = layer_of()
        reason = next(iter(peft_fast.report(model).slow.values()))
        assert "lora.ParamWrapper.forward that peft_fast does not know" in reason
        assert experts.ParamWrapper.forward is experts.stock and known.forward_known()[0]
    finally:
        monkeypatch.undo()
        known._judge.cache_clear()


def test_routing_that_names_no_expert_is_transformers_affair():
    model = layer_of()
    layer = model.base_model.model.experts
    x, weights = tokens(3), torch.ones(3, 1)
    found = experts.plan_of(layer)
    assert "names experts that are not here" in experts.refuse_input(found, x, (torch.full((3, 1), E), weights))
    assert "not (T, H)" in experts.refuse_input(found, x, (torch.zeros(2, 1).long(), weights))
    assert "three plain tensors" in experts.refuse_input(found, x, (weights,))
    assert "no integers" in experts.refuse_input(found, x, (weights, weights))
    assert "last dimension" in experts.refuse_input(found, x[:, 1:], (torch.zeros(3, 1).long(), weights))


@pytest.mark.parametrize("owner, name", [("_LoraFactorsProxy", "forward"), ("ParamWrapper", "get_delta_weight")])
def test_who_replaces_what_pefts_forward_calls_is_heard(monkeypatch, owner, name):
    """PEFT's own tests count the calls of its parametrization in this way."""
    model, calls = layer_of(targets=BOTH[:1]), []
    owner = getattr(peft_layer, owner)
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: (calls.append(1), real(*args))[1])
    assert_pefts(model, "another library has replaced a function that PEFT's lora.ParamWrapper.forward calls", tokens())
    assert calls or name != "forward"
    monkeypatch.undo()
    assert peft_fast.report(model).slow == {}


def test_devices_where_plain_torch_would_run_one_expert_after_another():
    model = layer_of().to("meta")
    (reason,) = set(peft_fast.report(model).slow.values())
    assert reason.startswith("plain torch would run the experts one by one on meta (")
