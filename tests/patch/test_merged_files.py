"""peft_fast.merged, and what is saved or loaded inside it: unmerged weights, or a refusal."""

import pytest
import torch
from peft import get_peft_model_state_dict

import peft_fast
from peft_fast.errors import UnsupportedError
from tests.patch.test_merged import Tied, adapted, everything
from tests.patch.toys import toy


def test_what_is_saved_inside_is_unmerged(tmp_path):
    model = adapted(Tied(), ["embed", "head", "body"], torch.bfloat16)
    state, adapter = model.state_dict(), get_peft_model_state_dict(model, save_embedding_layers=True)
    model.save_pretrained(tmp_path / "before")
    with peft_fast.merged(model):
        assert not torch.equal(
            model.base_model.model.body.base_layer.weight, state["base_model.model.body.base_layer.weight"]
        )
        for inside, outside in (
            (model.state_dict(), state),
            (get_peft_model_state_dict(model, save_embedding_layers=True), adapter),
        ):
            assert list(inside) == list(outside)
            assert all(torch.equal(inside[key], outside[key]) for key in outside)
        kept = model.state_dict(keep_vars=True)
        model.save_pretrained(tmp_path / "inside")
    assert kept["base_model.model.body.base_layer.weight"] is model.base_model.model.body.base_layer.weight
    name = "adapter_model.safetensors"
    assert (tmp_path / "inside" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


def test_weights_cannot_be_loaded_inside_but_adapters_can():
    model = toy().eval()
    state = model.state_dict()
    before = everything(model)
    with peft_fast.merged(model):
        with pytest.raises(UnsupportedError, match=r"state dict with .*weight"):
            model.load_state_dict(state)
        model.load_state_dict({k: v for k, v in state.items() if "lora_" in k}, strict=False)
    tensors = everything(model)[0]
    assert all(torch.equal(tensors[name][4], before[0][name][4]) for name in tensors)
    model.load_state_dict(state)
