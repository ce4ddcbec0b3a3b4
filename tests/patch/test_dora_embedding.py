"""DoRA on embeddings: fast and stock's in every state that PEFT gives them."""

import pytest
import torch
from peft import LoraConfig
from torch import nn

import peft_fast
from peft_fast import settings
from tests.patch.test_dora import BF16, F32, trained
from tests.patch.test_embedding import TOKENS, ScaledByTensor, V, model_of
from tests.patch.toys import assert_same, both


@pytest.mark.parametrize("kind", [nn.Embedding, ScaledByTensor])
@pytest.mark.parametrize("ids", [TOKENS, TOKENS.int(), TOKENS[0, 0], TOKENS[:0]], ids=lambda t: str(t.shape))
@pytest.mark.parametrize("padding_idx", [None, 0])
def test_embedding(kind, ids, padding_idx):
    model = trained(model_of(kind, padding_idx=padding_idx, config={"use_dora": True}))
    embedding_is_fast(model, ids)
    model.base_model.model.embed.base_layer.weight.requires_grad_()
    embedding_is_fast(model, ids)
    model.base_model.model.embed.base_layer.weight.data[5] *= 3
    embedding_is_fast(model, ids)


@pytest.mark.parametrize(
    "base, low, rtol", [(torch.float64, torch.float64, 1e-12), (BF16, F32, 3e-2), (BF16, BF16, 4e-2)]
)
def test_embedding_dtypes(base, low, rtol):
    embedding_is_fast(trained(model_of(dtype=base, low=low, config={"use_dora": True})), rtol=rtol)


def test_embedding_states():
    model = trained(model_of(config={"use_dora": True}))
    assert peft_fast.report(model).slow == {}
    with settings.override(min_tokens=1000):
        embedding_is_fast(model)
    model.merge_adapter()
    assert list(both(model, TOKENS)[3]) == ["the adapter is merged into the base weight"]
    model.unmerge_adapter()
    embedding_is_fast(model)
    model.add_adapter("other", LoraConfig(r=3, target_modules=["embed"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    assert list(both(model, TOKENS)[3]) == ["several active adapters, one of them DoRA"]


def embedding_is_fast(model, ids=TOKENS, rtol=1e-5):
    expected, got, fast, handed_back = both(model, ids)
    assert (fast, handed_back) == (1, {})
    assert_same(expected, got, rtol)


def test_vocabulary_is_large_enough_for_these_tokens():
    assert int(TOKENS.max()) < V
