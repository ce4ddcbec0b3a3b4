"""What must stay with PEFT: bit-identical to stock, with a reason in the ledger, and fast again after."""

import sys
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.nn.utils import parametrize

import peft_fast
from peft_fast.patch import plan
from tests.patch.test_merged import Attending
from tests.patch.toys import (
    K,
    Toy,
    assert_fast,
    assert_handed_back,
    assert_same,
    both,
    conv1d,
    inputs,
    layers,
    stock,
    toy,
)


class OwnLinear(nn.Linear):
    """A base with a forward of its own."""

    def forward(self, x):
        return super().forward(x) * 2


class Doubled(torch.Tensor):
    """A plain tensor subclass, as quantized weights are."""


class Twice(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return weight * 2


def refuse(model, *args, reason, **kwargs):
    assert_handed_back(model, *(args or (inputs(),)), reason=reason, **kwargs)


def test_merged():
    model = toy(lora_dropout=0.1)
    model.merge_adapter()
    refuse(model, reason="merged")
    model.unmerge_adapter()
    assert_fast(model.eval(), inputs())


def test_disabled_adapters():
    model = toy()
    with model.disable_adapter():
        refuse(model, reason="the adapters are disabled")
    assert_fast(model, inputs())


@pytest.mark.parametrize("library", ["bitsandbytes", "hqq.core.quantize", "torchao"])
@pytest.mark.parametrize("name", [None, types.ModuleType("one of the same name")], ids=["blocked", "a stand-in"])
def test_a_library_that_is_not_the_one(library, name, monkeypatch):
    model = toy(layer=conv1d)
    monkeypatch.setitem(sys.modules, library, name)
    with model.disable_adapter():
        refuse(model, reason="the adapters are disabled")
    assert_fast(model, inputs())


def test_disabled_while_merged_unmerges_as_stock_does():
    model = toy()
    model.merge_adapter()
    with model.disable_adapter():
        model(inputs())
    assert not layers(model)[0].merged


def test_arguments_for_the_base_layer():
    model = toy(targets=("up",))
    lora = layers(model)[0]
    with pytest.raises(TypeError):
        lora(inputs(), surprise=1)
    assert peft_fast.report(model).handed_back == {"extra arguments reached the layer": 1}


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"alora_invocation_tokens": [1]}, "ALoraLinearVariant keeps PEFT's forward"),
        ({"init_lora_weights": "mica"}, "MiCALinearVariant keeps PEFT's forward"),
    ],
    ids=["alora", "mica"],
)
def test_variants(config, reason):
    refuse(toy(**config), reason=reason)


def test_no_active_adapter_in_the_layer():
    model = toy(targets=("up",))
    model.add_adapter("other", LoraConfig(target_modules=["down"], init_lora_weights=False))
    model.set_adapter("other")
    expected, got, fast, handed_back = both(model, inputs())
    assert fast == 1 and handed_back == {"no active adapter in this layer": 1}
    assert torch.allclose(expected["y"], got["y"], rtol=1e-5)


def _double_gradients(module, grad_input, grad_output):
    return tuple(None if g is None else g * 2 for g in grad_input)


def _double(self, x):
    return type(self).forward(self, x) * 2


HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda m, args, y: y * 2 if torch.is_tensor(y) else y),
    "pre": lambda m: m.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    "backward": lambda m: m.register_full_backward_hook(_double_gradients),
    "backward pre": lambda m: m.register_full_backward_pre_hook(lambda m, go: (go[0] * 2,)),
    "own forward": lambda m: setattr(m, "forward", types.MethodType(_double, m)),
}


@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B", "lora_dropout"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_the_parts_are_called(hook, part):
    model = toy(targets=("up",), lora_dropout=0.1)
    module = getattr(layers(model)[0], part)
    handle = HOOKS[hook](module if part == "base_layer" else module["default"])
    refuse(model, reason="hooks or a replaced forward on")
    if handle is not None:
        handle.remove()
        assert_fast(model.eval(), inputs())


@pytest.mark.parametrize("hook", [h for h in HOOKS if h != "own forward"])
def test_hooks_on_the_lora_layer_leave_it_fast(hook):
    model = toy()
    HOOKS[hook](layers(model)[0])
    assert_fast(model, inputs())


def test_own_forward_on_the_lora_layer_wins():
    """X-LoRA and accelerate set one: the guard is not even asked."""
    model = toy()
    for lora in layers(model):
        lora.forward = types.MethodType(lambda self, x: self.base_layer(x), lora)
    expected, got, fast, handed_back = both(model, inputs())
    assert fast == 0 and torch.equal(expected["y"], got["y"])


def test_hooks_for_all_modules():
    model = toy()
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: None)
    try:
        refuse(model, reason="hooks registered for all modules")
    finally:
        handle.remove()


def _replace(part, change):
    def apply(model):
        for lora in layers(model):
            module = getattr(lora, part)
            module = module if part == "base_layer" else module["default"]
            change(module)

    return apply


def _subclass(module):
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Doubled))


def _sparse(module):
    module.weight = nn.Parameter(module.weight.detach().to_sparse())


def _weight_norm(module):
    nn.utils.parametrizations.weight_norm(module)


NOT_PLAIN = "plain dense tensor"
MODULES = {
    "subclass base": (_replace("base_layer", _subclass), NOT_PLAIN),
    "subclass A": (_replace("lora_A", _subclass), NOT_PLAIN),
    "subclass B": (_replace("lora_B", _subclass), NOT_PLAIN),
    "sparse base": (_replace("base_layer", _sparse), NOT_PLAIN),
    "parametrized base": (_replace("base_layer", _weight_norm), "not nn.Linear or Conv1D"),
    "parametrized B": (
        _replace("lora_B", lambda m: parametrize.register_parametrization(m, "weight", Twice())),
        "lora_A or lora_B is not a plain nn.Linear",
    ),
    "A with bias": (
        _replace("lora_A", lambda m: setattr(m, "bias", nn.Parameter(torch.ones(m.out_features)))),
        "lora_A has a bias",
    ),
    "other dropout": (
        lambda model: [lora.lora_dropout.update({"default": nn.AlphaDropout(0.1)}) for lora in layers(model)],
        "lora_dropout is a AlphaDropout",
    ),
    "dropout p=1": (_replace("lora_dropout", lambda m: setattr(m, "p", 1.0)), "dropout with p = 1"),
    "trained scaling": (
        lambda model: [lora.scaling.update(default=nn.Parameter(torch.ones(()))) for lora in layers(model)],
        "the scaling is not a number",
    ),
    "scaling per feature": (
        lambda model: [lora.scaling.update(default=torch.ones(1)) for lora in layers(model)],
        "the scaling is not a number",
    ),
    "tensor parallel": (
        _replace("base_layer", lambda m: setattr(m, "_hf_tp_plan", "colwise")),
        "tensor parallel",
    ),
}


@pytest.mark.parametrize("change, reason", MODULES.values(), ids=MODULES)
def test_modules_that_are_not_plain(change, reason):
    model = toy(lora_dropout=0.1)
    change(model)
    refuse(model, reason=reason)


def test_subclass_of_linear_as_base():
    torch.manual_seed(0)
    refuse(toy(OwnLinear), reason="the base layer is a OwnLinear")


def test_subclass_of_pefts_linear():
    class MyLora(plan.Linear):
        pass

    config = LoraConfig(target_modules=["up", "down"], init_lora_weights=False)
    config._register_custom_module({nn.Linear: MyLora})
    model = peft_fast.accelerate(get_peft_model(Toy(), config))
    refuse(model, reason="MyLora is not PEFT's plain lora.Linear")


def test_other_lora_layers_are_named_in_the_report():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, K), nn.Conv1d(3, 3, 3, padding=1), nn.Linear(K, K))
    config = LoraConfig(target_modules=["0", "1", "2"], init_lora_weights=False)
    model = peft_fast.accelerate(get_peft_model(model, config))
    report = peft_fast.report(model)
    assert report.fast == ("base_model.model.0", "base_model.model.2")
    reason = "a convolution whose kernel is not of size 1, or with groups"
    assert set(report.slow.values()) == {reason}
    expected, got, fast, handed_back = both(model, torch.tensor([[1, 2, 3]]))
    assert (fast, handed_back) == (2, {reason: 1})
    assert_same(expected, got, 1e-5)


F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = {  # base, A, B, input, autocast: reason
    "bf16 adapters on fp32": (F32, BF16, BF16, F32, None, "lower precision"),
    "fp16 adapters on bf16": (BF16, F16, F16, BF16, None, "lower precision"),
    "fp64 adapters": (F32, F64, F64, F32, None, "float64 beside it"),
    "fp64 under autocast": (F64, F64, F64, F64, BF16, "autocast with dtypes"),
    "fp16 under bf16 autocast": (F16, F32, F32, F16, BF16, "autocast with dtypes"),
    "A and B of two dtypes under autocast": (F32, F32, BF16, F32, BF16, "different dtypes"),
}


@pytest.mark.parametrize("base, A, B, given, cast, reason", DTYPES.values(), ids=DTYPES)
def test_dtypes(base, A, B, given, cast, reason):
    model = toy(base_dtype=base)
    for lora in layers(model):
        lora.lora_A.to(A)
        lora.lora_B.to(B)
    with torch.autocast("cpu", dtype=cast or BF16, enabled=cast is not None):
        refuse(model, inputs(6, K, dtype=given), reason=reason)


def test_adapters_of_two_dtypes():
    model = toy(base_dtype=BF16)
    model.add_adapter("other", LoraConfig(target_modules=["up", "down"]), autocast_adapter_dtype=False)
    model.base_model.set_adapter(["default", "other"])
    refuse(model, inputs(6, K, dtype=BF16), reason="active adapters have different dtypes")


def _smaller_B():
    """What add_weighted_adapter can leave behind."""
    model = toy()
    for lora in layers(model):
        lora.lora_B["default"] = nn.Linear(2, lora.out_features, bias=False)
    return model


RAISES = {
    "two ranks": (lambda: (_smaller_B(), inputs()), "lora_A and lora_B are of different ranks"),
    "input dtype": (lambda: (toy(), inputs(dtype=F64)), "input and base weight have different dtypes"),
    "input size": (lambda: (toy(), inputs(2, K + 1)), "last dimension does not fit"),
    "0-d input": (lambda: (toy(), torch.tensor(1.0)), "the input is not a plain dense tensor"),
    "view of Conv1D": (lambda: (toy(conv1d), inputs(5, K, 2).transpose(1, 2)), "which is not contiguous"),
    "integer input": (lambda: (toy(), torch.ones(2, K, dtype=torch.long)), "a dtype other than"),
}


@pytest.mark.parametrize("make, reason", RAISES.values(), ids=RAISES)
def test_where_stock_raises_the_error_is_stocks(make, reason):
    model, x = make()
    with pytest.raises(RuntimeError):
        model(x)
    assert [given for given in peft_fast.report(model).handed_back if reason in given]


def test_input_cast_switched_off():
    model = toy(base_dtype=BF16)
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError):
        model(inputs(2, K, dtype=BF16))
    assert "PEFT's input cast is switched off" in peft_fast.report(model).handed_back
    same = toy()
    with disable_input_dtype_casting(same):
        assert_fast(same, inputs())


def test_meta_weights():
    model = toy().to("meta")
    x = inputs().detach().to("meta")
    assert model(x).shape == x.shape
    assert peft_fast.report(model).handed_back == {"the base weight is on meta": 2}


def test_input_that_is_a_subclass():
    refuse(toy(targets=("up",)), inputs().detach().as_subclass(Doubled), reason="the input is not a plain")


def test_torch_func_and_forward_mode():
    model = toy(targets=("up",))
    x = inputs().detach()
    batched = torch.func.vmap(model)(x)
    assert torch.allclose(batched, model(x), rtol=1e-5, atol=1e-6)
    grad = torch.func.grad(lambda v: model(v).sum())(x)
    assert grad.shape == x.shape
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(model(dual)).tangent is not None
    handed_back = peft_fast.report(model).handed_back
    assert handed_back == {"a torch.func transform is on": 2, "forward-mode differentiation is on": 1}


def test_parts_whose_forward_never_runs_are_not_said_to_be_fast():
    """PEFT merges into nn.MultiheadAttention's weights for a call."""
    model = get_peft_model(Attending(), LoraConfig(r=4, target_modules=["attention", "up"], init_lora_weights=False))
    peft_fast.accelerate(model)
    model(inputs())
    report, inside = peft_fast.report(model), "base_model.model.attention"
    assert (report.fast, report.fast_calls) == (("base_model.model.up",), 1)
    assert report.slow == {
        inside: "layer.MultiheadAttention has no fast path",
        f"{inside}.base_layer.out_proj": "a part of lora.MultiheadAttention, which computes with its weights",
    }


def test_functional_call_stays_fast():
    model = toy()
    new = {name: p.detach() * 2 for name, p in model.named_parameters()}
    y = torch.func.functional_call(model, new, (inputs(),))
    for name, p in model.named_parameters():
        p.data = new[name]
    assert torch.equal(y, model(inputs()))
    assert peft_fast.report(model).fast_calls == 4


def test_jit_trace_and_export_hold_pefts_own_operators():
    model = toy().eval()
    x = inputs().detach()
    y = model(x)
    traced = torch.jit.trace(model, (x,), check_trace=False)
    assert torch.allclose(traced(x), y, rtol=1e-5, atol=1e-6)
    assert "peft_fast" not in str(traced.inlined_graph)
    for strict in (False, True):
        program = torch.export.export(model, (x,), strict=strict)
        with stock():
            expected = torch.export.export(model, (x,), strict=strict)
        assert [str(n.target) for n in program.graph.nodes] == [str(n.target) for n in expected.graph.nodes]
        assert torch.allclose(program.module()(x), y, rtol=1e-5, atol=1e-6)


def test_accelerate_cpu_offload():
    accelerate = pytest.importorskip("accelerate")
    model = toy().eval()
    x = inputs().detach()
    y = model(x)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert torch.allclose(model(x), y, rtol=1e-5, atol=1e-6)
    assert peft_fast.report(model).handed_back
