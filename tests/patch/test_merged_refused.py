"""What peft_fast.merged refuses before anything has changed, since merging would not be what the adapter computes."""

import copy

import pytest
import torch
from torch import nn

import peft_fast
from peft_fast.errors import UnsupportedError
from tests.patch.test_merged import Convolved, Tied, adapted, assert_merges, assert_untouched, everything
from tests.patch.toys import K, N, Toy, layers, toy


def assert_refused(model, reason):
    before = everything(model)
    with pytest.raises(UnsupportedError, match=reason) as error, peft_fast.merged(model):
        pytest.fail("not reached")
    assert len(str(error.value).splitlines()) == 3
    assert_untouched(model, before)


def test_what_cannot_be_merged_is_refused_at_once():
    assert_refused(adapted(Convolved(groups=2), ["one", "two"], r=4), "convolutions with groups")
    bare = adapted(Toy(lambda k, n: nn.Linear(k, n, bias=False)), ["up", "down"], lora_bias=True)
    assert_refused(bare, "without a bias")
    model = toy().eval()
    layers(model)[1].base_layer.weight = nn.Parameter(torch.empty(K, N, device="meta"))
    with pytest.raises(UnsupportedError, match="offloaded"), peft_fast.merged(model):
        pytest.fail("not reached")
    assert not any(layer.merged for layer in layers(model))
    model = toy().eval()
    torch.nn.utils.parametrize.register_parametrization(layers(model)[1].base_layer, "weight", nn.Tanh())
    with pytest.raises(UnsupportedError, match="not a plain dense parameter"), peft_fast.merged(model):
        pytest.fail("not reached")
    with pytest.raises(UnsupportedError, match="without a LoRA layer"), peft_fast.merged(nn.Linear(1, 1)):
        pytest.fail("not reached")
    from peft import KasaConfig

    kasa = adapted(Toy(), ["up"], kasa_config=KasaConfig())
    assert_refused(kasa, "KasaLinearVariant cannot be merged")


class Standardized(nn.Linear):
    """Weights of length 1."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight / self.weight.norm(), self.bias)


class Below(Standardized):
    """Inherits a forward that is not nn.Linear's."""


class Doubled(nn.Linear):
    """Twice what its forward, nn.Linear's own, computes."""

    def __call__(self, x):
        return 2 * super().__call__(x)


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * self.weight.norm()


class Unscaled(nn.Embedding):
    """Has a scale, by which PEFT multiplies the adapter, and does not use it."""

    embed_scale = 3.0


# (base layer, input): PEFT's adapter of it is not what its merge adds to the weight
UNLIKE = {
    "is not dilated": (nn.Conv2d(3, 4, 3, padding="same", dilation=2), (2, 3, 9, 9)),
    "pads with zeros, the convolution by reflect": (nn.Conv1d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 9)),
    "pads with zeros, the convolution by circular": (nn.Conv1d(3, 4, 1, padding=1, padding_mode="circular"), (2, 3, 9)),
    "kernels of 1 × 1 × n": (nn.Conv3d(3, 4, (1, 1, 2)), (2, 3, 4, 4, 4)),
    "Standardized may do more": (Standardized(6, 4), (2, 6)),
    "Scaled may do more": (Scaled(6, 4), ()),
    "Unscaled may do more": (Unscaled(6, 4), ()),
    "Embedding may do more": (nn.Embedding(6, 4, max_norm=0.5), ()),
    "Below may do more": (Below(6, 4), (2, 6)),
    "Doubled may do more": (Doubled(6, 4), (2, 6)),
}


@pytest.mark.parametrize("reason", UNLIKE)
def test_what_merging_would_change_is_refused(reason):
    base, shape = UNLIKE[reason]
    model = adapted(nn.Sequential(copy.deepcopy(base)), ["0"])
    x = torch.randn(shape) if shape else torch.tensor([1, 5, 2])
    with torch.no_grad():
        y = model(x)  # PEFT runs it
    assert_refused(model, reason)
    layer = model.base_model.model[0]
    try:
        layer.merge()
    except RuntimeError:  # of shapes
        return
    with torch.no_grad():
        assert not torch.allclose(model(x), y, rtol=1e-3, atol=1e-3)


class Renamed(nn.Embedding):
    """Looks up, and nothing else."""


class Named(nn.Linear):
    """Has more than nn.Linear, and computes the same."""

    def describe(self):
        return "linear"


class Inherited(Named):
    """Inherits nn.Linear's forward over two classes."""


# as above, with nothing in the way
LIKE = {
    "more than nn.Linear": (Named(6, 4), (2, 6)),
    "inherited": (Inherited(6, 4), (2, 6)),
    "a plain subclass": (Renamed(6, 4), ()),
    "dilated, of size 1": (nn.Conv2d(3, 4, 1, dilation=2), (2, 3, 9, 9)),
    "reflects nothing": (nn.Conv1d(3, 4, 3, padding_mode="reflect"), (2, 3, 9)),
    "same, of size 1": (nn.Conv1d(3, 4, 1, padding="same", padding_mode="circular"), (2, 3, 9)),
    "padded with zeros": (nn.Conv1d(3, 4, 3, padding=1, stride=2), (2, 3, 9)),
    "three-dimensional": (nn.Conv3d(3, 4, (2, 1, 1)), (2, 3, 4, 4, 4)),
}


@pytest.mark.parametrize("name", LIKE)
def test_what_is_merged(name):
    base, shape = LIKE[name]
    x = torch.randn(shape) if shape else torch.tensor([1, 5, 2])
    assert_merges(adapted(nn.Sequential(copy.deepcopy(base)), ["0"]), x)


class Tokens(Tied):
    """What aLoRA looks at: a language model's ids."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        raise NotImplementedError


def test_variants_that_depend_on_the_input_are_refused():
    """An aLoRA adapter begins at a token, Arrow chooses among its adapters for each: neither is one weight."""
    from peft import ArrowConfig, TaskType

    kind = {"task_type": TaskType.CAUSAL_LM}
    assert_refused(adapted(Tokens(), ["body"], alora_invocation_tokens=[1, 2], **kind), "ALoraLinearVariant cannot")
    arrow = ArrowConfig(top_k=1)
    arrow.task_adapter_names = ["one", "two"]
    assert_refused(adapted(Toy(), ["up"], arrow_config=arrow), "ArrowLinearVariant cannot be merged")
