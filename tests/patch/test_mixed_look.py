"""What a mixed batch asks of the modules of its adapters: the same by the compiled look at them and by Python."""

import os

import pytest
import torch
from peft import LoraConfig
from torch import nn

from peft_fast import native
from peft_fast.patch import decode
from tests.patch.toys import layers, toy

pytestmark = pytest.mark.skipif(not native.load(), reason=f"the compiled operators: {native.reason()}")
NAMES = ("default", "other", "third")


class Doubling(nn.Linear):
    """Not what nn.Linear is."""


def crowd(**config):
    model = toy(lora_dropout=0.5, **config)
    for name, r in (("other", 7), ("third", 1)):
        made = {"r": r, "lora_dropout": 0.1 * (r > 1), "target_modules": ["up", "down"], "init_lora_weights": False}
        model.add_adapter(name, LoraConfig(**made, **config))
    return model.eval()


def _hooked(part, register):
    return lambda up: getattr(getattr(up, part)["third"], register)(lambda *_: None)


def _parameter(part, name, value):
    return lambda up: setattr(getattr(up, part)["third"], name, value)


def _data(part, change):
    def apply(up):
        weight = getattr(up, part)["third"].weight
        weight.data = change(weight.data)

    return apply


def _sparse(part):
    def apply(up):
        module = getattr(up, part)["third"]
        module.weight = nn.Parameter(module.weight.detach().to_sparse())

    return apply


HOOKS = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")
HOOKS += ("register_full_backward_pre_hook",)
PARTS = ("lora_A", "lora_B", "lora_dropout")
# of the last adapter of the batch: what keeps it from the common case
REFUSED = {
    **{f"{register} of {part}": _hooked(part, register) for part in PARTS for register in HOOKS},
    **{f"forward of {part}": _parameter(part, "forward", lambda x: x) for part in PARTS},
    **{f"meta {part}": lambda up, part=part: getattr(up, part)["third"].to("meta") for part in PARTS[:2]},
    **{f"double {part}": _data(part, lambda w: w.double()) for part in PARTS[:2]},
    **{f"half {part}": _data(part, lambda w: w.bfloat16()) for part in PARTS[:2]},
    **{f"sparse {part}": _sparse(part) for part in PARTS[:2]},
    **{f"class of {p}": lambda up, p=p: getattr(up, p).update({"third": Doubling(32, 1)}) for p in PARTS},
    "training": lambda up: up.lora_dropout.update({"third": nn.Dropout(0.1)}),
    "in place": lambda up: up.lora_dropout.update({"third": nn.Dropout(0.1, inplace=True).eval()}),
    "another dropout": lambda up: up.lora_dropout.update({"third": nn.AlphaDropout(0.1).eval()}),
    "bias of A": _parameter("lora_A", "bias", nn.Parameter(torch.ones(1))),
    "bias of another dtype": _parameter("lora_B", "bias", nn.Parameter(torch.ones(48).bfloat16())),
    "rank": _parameter("lora_B", "weight", nn.Parameter(torch.ones(48, 2))),
    "variant": lambda up: up.lora_variant.update(third=object()),
    "scaling": lambda up: up.scaling.update(third="2"),
    "scaling that learns": lambda up: up.scaling.update(third=nn.Parameter(torch.tensor(2.0))),
}
TAKEN = {
    "nothing": lambda up: None,
    "a hook of another": lambda up: up.lora_A["other"]._forward_hooks.clear(),
    "a plain tensor": lambda up: up.lora_A["third"]._parameters.update(weight=torch.ones(1, 32)),
    "identity": lambda up: up.lora_dropout.update({"default": nn.Identity()}),
    "scaling of one number": lambda up: up.scaling.update(third=torch.tensor(0.3)),
    "whole scaling": lambda up: up.scaling.update(third=2),
    "bias of B": _parameter("lora_B", "bias", nn.Parameter(torch.ones(48))),
    "all in bfloat16": lambda up: [m.to(torch.bfloat16) for m in (up.base_layer, up.lora_A, up.lora_B)],
}


@pytest.fixture
def compiled():
    """What peft_fast._C looks by."""
    if (found := native.adapters()) is None:
        why = "peft_fast._C is not built, or of older sources"
        pytest.fail(why) if os.environ.get("CI") == "true" else pytest.skip(why)
    return found


@pytest.fixture(params=["compiled", "python"])
def look(request, monkeypatch):
    """decode.adapters, by one way or the other."""
    if request.param == "python":
        monkeypatch.setattr(native, "adapters", lambda: None)
    else:
        request.getfixturevalue("compiled")
    return decode.adapters


@pytest.mark.parametrize("change", REFUSED)
def test_what_is_not_the_common_case_is_seen(look, change):
    up = layers(crowd())[0]
    assert look(up, NAMES, torch.float32) is not None
    REFUSED[change](up)
    assert look(up, NAMES, torch.float32) is None
    assert look(up, NAMES[:2], torch.float32) is not None  # who does not name it does not ask


@pytest.mark.parametrize("change", TAKEN)
def test_what_is_found(look, change):
    up = layers(crowd())[0]
    TAKEN[change](up)
    up.scaling["other"] = 0.25
    As, Bs, biases, scalings = look(up, (*NAMES, "nobody"), up.base_layer.weight.dtype)
    for i, name in enumerate(NAMES):
        assert As[i] is up.lora_A[name].weight and Bs[i] is up.lora_B[name].weight and biases[i] is up.lora_B[name].bias
        assert type(scalings[i]) is float and scalings[i] == pytest.approx(float(up.scaling[name]), rel=1e-6)
    assert len(As) == len(Bs) == len(biases) == len(scalings) == 3


def test_nobody_is_named(look):
    up = layers(crowd())[0]
    assert [*map(len, look(up, ("nobody",), torch.float32))] == [0, 0, 0, 0]


def test_adapters_of_another_dtype_than_the_base(look):
    up = layers(crowd())[0]
    assert look(up, NAMES, torch.bfloat16) is not None  # float32 beside it, as PEFT makes them
    up.cast_input_dtype_enabled = False
    assert look(up, NAMES, torch.bfloat16) is None and look(up, NAMES, torch.float32) is not None
    up.lora_A.bfloat16(), up.lora_B.bfloat16()
    assert look(up, NAMES, torch.float32) is None


def test_the_compiled_look_takes_the_common_case(compiled, monkeypatch):
    """Else it would be a look in vain before Python's."""
    found = []
    monkeypatch.setattr(native, "adapters", lambda: lambda *args: found.append(compiled(*args)) or found[-1])
    decode.adapters(layers(crowd())[0], NAMES, torch.float32)
    decode.adapters(layers(crowd(lora_bias=True))[0], NAMES, torch.float32)
    assert len(found) == 2 and None not in found


def test_the_compiled_look_leaves_what_is_strange(compiled):
    assert compiled({}, {}, {}, [], (), decode.KINDS) is None
    up = layers(crowd())[0]
    dicts = [getattr(up, part)._modules for part in PARTS]
    assert compiled(*dicts, {}, NAMES, decode.KINDS) is None
    assert compiled(dicts[0], {}, dicts[2], up.scaling, NAMES, decode.KINDS) is None
    with pytest.raises(ValueError, match="five kinds"):
        compiled(*dicts, up.scaling, NAMES, ())
    with pytest.raises(TypeError):
        compiled(*dicts, up.scaling, ([],), decode.KINDS)
