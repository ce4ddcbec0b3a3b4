"""lora.Embedding: gathered where it is vanilla, PEFT's own forward where it is not."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn

import peft_fast
from peft_fast import settings
from peft_fast.patch import embedding, known, plan
from tests.patch.toys import K, adapt, assert_same, both

V = 40
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 0, 0, 0, 39]])


class Renamed(nn.Embedding):
    """With another class's name, and nothing else."""


class ScaledByTensor(nn.Embedding):
    """Gemma's."""

    def __init__(self, *args, scale=5.6568, **kwargs):
        super().__init__(*args, **kwargs)
        self.embed_scale = nn.Buffer(torch.tensor(scale), persistent=False)

    def forward(self, input_ids: torch.Tensor):
        """Its docstring."""
        return super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)


class ScaledByNumber(nn.Embedding):
    """BART's."""

    def __init__(self, *args, scale=5.6568, **kwargs):
        super().__init__(*args, **kwargs)
        self.embed_scale = scale

    def forward(self, input_ids):
        return super().forward(input_ids) * self.embed_scale


class Shifted(nn.Embedding):
    """A forward nobody has read."""

    def forward(self, input_ids):
        return super().forward(input_ids) + 1


class Model(nn.Module):
    """Tokens -> vectors -> something that has a gradient."""

    def __init__(self, make):
        super().__init__()
        self.embed = make()

    def forward(self, x):
        return torch.tanh(self.embed(x))


def model_of(kind=nn.Embedding, *args, dtype=torch.float32, low=None, config=None, **kwargs):
    model = adapt(lambda: Model(lambda: kind(V, K, *args, **kwargs)).to(dtype), ["embed"], **(config or {}))
    for module in model.modules():
        if low and isinstance(module, plan.Embedding):
            module.lora_embedding_A.to(low)
            module.lora_embedding_B.to(low)
    return model


def assert_gathered(model, ids=TOKENS, rtol=1e-5):
    expected, got, fast, handed_back = both(model, ids)
    assert (fast, handed_back) == (1, {})
    assert_same(expected, got, rtol)


def assert_pefts(model, reason, ids=TOKENS):
    expected, got, fast, handed_back = both(model, ids)
    assert fast == 0 and list(handed_back) == [reason], handed_back
    assert_same(expected, got)


KINDS = {
    "plain": (nn.Embedding, {}),
    "a plain subclass": (Renamed, {}),
    "padding": (nn.Embedding, {"padding_idx": 0}),
    "last token is padding": (nn.Embedding, {"padding_idx": -1}),
    "scaled by a tensor": (ScaledByTensor, {"padding_idx": 1}),
    "scaled by a number": (ScaledByNumber, {}),
}


@pytest.mark.parametrize("kind, kwargs", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    "ids", [TOKENS, TOKENS.int(), TOKENS[0, 0], TOKENS[:, ::2], TOKENS[:0]], ids=lambda t: str(t.shape)
)
def test_vanilla(kind, kwargs, ids):
    model = model_of(kind, **kwargs)
    assert peft_fast.report(model).slow == {}
    assert_gathered(model, ids)


F32, BF16 = torch.float32, torch.bfloat16
DTYPES = {  # base, adapters: rtol
    "fp64": (torch.float64, torch.float64, 1e-12),
    "bf16 base, fp32 adapters": (BF16, F32, 2e-2),
    "bf16": (BF16, BF16, 3e-2),
    "fp16 base, fp32 adapters": (torch.float16, F32, 3e-3),
}


@pytest.mark.parametrize("kind", [nn.Embedding, ScaledByTensor])
@pytest.mark.parametrize("base, low, rtol", DTYPES.values(), ids=DTYPES)
def test_dtypes(base, low, rtol, kind):
    assert_gathered(model_of(kind, dtype=base, low=low), rtol=rtol)


@pytest.mark.parametrize("scale, fast", [(1.0, True), (32.0, True), (22.627416998, False)])
def test_a_number_that_bfloat16_does_not_hold_is_pefts(scale, fast):
    """The base multiplies by the number, the adapter by its rounding: only if they are one is it one scale."""
    model = model_of(ScaledByNumber, dtype=BF16, scale=scale)
    if fast:
        return assert_gathered(model, rtol=2e-2)
    assert_pefts(model, "the base layer is a ScaledByNumber with a forward of its own")


def test_several_adapters_scaling_and_inactive_ones():
    model = model_of()
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=2, target_modules=["embed"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    assert_gathered(model)
    model.base_model.model.embed.scaling["other"] = torch.tensor(1.5)
    assert_gathered(model)
    model.set_adapter("other")
    assert_gathered(model)


def test_a_trained_base():
    model = model_of(ScaledByTensor, padding_idx=3)
    model.base_model.model.embed.base_layer.weight.requires_grad_()
    assert_gathered(model)


def _base(model):
    return model.base_model.model.embed.base_layer


OWN = "the base layer is a {} with a forward of its own"
NOT = {
    "another forward": (lambda: model_of(Shifted), OWN.format("Shifted")),
    "embed_scale without effect": (
        lambda: _set(model_of(), embed_scale=2.0),
        OWN.format("Embedding"),
    ),
    "max_norm": (
        lambda: model_of(max_norm=1.0),
        "an embedding with max_norm, scale_grad_by_freq or sparse gradients",
    ),
    "scale_grad_by_freq": (
        lambda: model_of(scale_grad_by_freq=True),
        "an embedding with max_norm, scale_grad_by_freq or sparse gradients",
    ),
    "hook": (lambda: _hook(model_of()), "hooks or a replaced forward on the base layer"),
    "tensor parallel": (lambda: _set(model_of(), _hf_tp_plan="embedding_rowwise"), "the layer is tensor parallel"),
    "merged": (lambda: _merged(model_of()), "the adapter is merged into the base weight"),
}


def _set(model, **attributes):
    for name, value in attributes.items():
        setattr(_base(model), name, value)
    return model


def _hook(model):
    _base(model).register_forward_hook(lambda module, args, y: y * 2)
    return model


def _merged(model):
    model.merge_adapter()
    return model


@pytest.mark.parametrize("make, reason", NOT.values(), ids=NOT)
def test_the_others_are_pefts_bit_by_bit(make, reason):
    model = make()
    assert list(peft_fast.report(model).slow.values()) == [reason]
    assert_pefts(model, reason)


def test_switches_and_counts():
    model = model_of()
    with settings.override(min_tokens=15):
        assert_pefts(model, "few tokens (PEFT_FAST_MIN_TOKENS): there is nothing to gain")
    with peft_fast.disabled():
        assert_pefts(model, "inside `with peft_fast.disabled()`")
    with model.disable_adapter():
        assert_pefts(model, "the adapters are disabled")
    with pytest.raises((RuntimeError, TypeError)):
        model(TOKENS.float())
    assert any("tokens" in reason for reason in peft_fast.report(model).handed_back)
    assert_gathered(copy.deepcopy(model))
    peft_fast.restore(model)
    assert both(model, TOKENS)[2] == 0 and plan.Embedding.forward is plan.stock_embedding
    peft_fast.enable()
    assert_gathered(model)
    peft_fast.disable()
    assert plan.Embedding.forward is plan.stock_embedding


def test_an_unknown_forward_of_embeddings_leaves_linear_layers_fast(monkeypatch):
    known._judge.cache_clear()
    monkeypatch.setattr(known, "KNOWN_EMBEDDING", {})
    try:
        model = model_of()
        assert "lora.Embedding.forward that peft_fast does not know" in next(
            iter(peft_fast.report(model).slow.values())
        )
        assert plan.Embedding.forward is plan.stock_embedding and known.forward_known()[0]
    finally:
        monkeypatch.undo()
        known._judge.cache_clear()
    assert known.forward_known("Embedding")[0]


def test_what_is_read_of_a_forward():
    assert embedding._scaled_by(ScaledByTensor) == "tensor" and embedding._scaled_by(ScaledByNumber) == "number"
    assert embedding._scaled_by(Shifted) == "" == embedding._scaled_by(nn.Embedding)

    class Further(ScaledByTensor):
        def forward(self, input_ids):
            return super().forward(input_ids) * self.embed_scale

    assert embedding._scaled_by(Further) == "", "its super() is another one"


def test_compiled_in_one_graph():
    model = model_of(ScaledByTensor)
    y = model(TOKENS)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(fast(TOKENS), y, rtol=1e-6)
    fast(TOKENS).sum().backward()
    assert _layer(model).lora_embedding_A["default"].grad is not None
    torch._dynamo.reset()


def _layer(model):
    return model.base_model.model.embed
