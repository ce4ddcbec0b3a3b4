"""What is in a checkpoint: everything that trains, nothing of the base, and it comes back bit for bit."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertForSequenceClassification

from peft_fast import settings
from peft_fast.recipes import weights
from tests.recipes.small import SHORT, assert_equal, model_of, trainer_of


@pytest.fixture(autouse=True)
def quiet():
    with settings.override(quiet=True, min_tokens=0):
        yield


def test_an_adapters_checkpoint_holds_what_trains_and_peft_reads_it(tmp_path):
    trainer = trainer_of(tmp_path, "lora", **SHORT)
    trainer.train()
    path = tmp_path / "checkpoint-6"
    assert not (path / weights.PART).exists() and not (path / weights.WHOLE).exists()
    count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert count * 4 <= (path / "adapter_model.safetensors").stat().st_size < count * 4 + 10_000
    moments = torch.load(path / "optimizer.pt")["state"].values()
    assert sum(t.numel() for one in moments for t in one.values() if t.dim()) == 2 * count
    fresh = PeftModel.from_pretrained(model_of("full"), path)
    assert_equal(dict(trainer.model.state_dict()), dict(fresh.state_dict()))


ADAPTERS = {
    "biases": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only"},
    "biases of B": {"lora_bias": True},
    "embeddings": {"target_modules": ["query", "word_embeddings"]},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "ranks": {"rank_pattern": {"query": 2}, "use_rslora": True},
    "magnitudes": {"use_dora": True},
}


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_of_all_kinds_come_back_bit_for_bit(options, tmp_path):
    def made():
        base = model_of("head")
        modules = {"target_modules": ["query", "key", "dense"], "exclude_modules": [".*pooler.*"]}
        return get_peft_model(base, LoraConfig(r=4, modules_to_save=["classifier"], **{**modules, **options}))

    model, other = made(), made()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    weights.save(model, tmp_path)
    weights.load(other, tmp_path)
    assert_equal(dict(model.state_dict()), dict(other.state_dict()))


def test_an_adapter_inside_a_transformers_model(tmp_path):
    """Not a PeftModel: its save_pretrained is transformers' own."""
    model, other = model_of("full"), model_of("full")
    for each in (model, other):
        each.add_adapter(LoraConfig(r=4, target_modules=["query"], init_lora_weights=False))
    weights.save(model, tmp_path)
    weights.load(other, tmp_path)
    assert_equal(dict(model.state_dict()), dict(other.state_dict()))


def test_what_peft_does_not_write_is_written_beside(tmp_path):
    """A norm that trains without being a module to save."""
    model = model_of("lora")
    norm = dict(model.named_parameters())["base_model.model.bert.embeddings.LayerNorm.weight"]
    norm.requires_grad_()
    with torch.no_grad():
        norm.add_(1)
    weights.save(model, tmp_path)
    other = model_of("lora")
    weights.load(other, tmp_path)
    assert_equal(dict(model.state_dict()), dict(other.state_dict()))


def test_a_heads_checkpoint_is_no_model_and_holds_no_base(tmp_path):
    trainer = trainer_of(tmp_path, "head", **SHORT)
    trainer.train()
    path = tmp_path / "checkpoint-6"
    trains = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert (path / weights.PART).stat().st_size < trains * 4 + 2_000
    with pytest.raises(OSError):
        BertForSequenceClassification.from_pretrained(path)


def test_a_whole_models_checkpoint_is_transformers_own(tmp_path):
    trainer = trainer_of(tmp_path, "full", **SHORT)
    trainer.train()
    fresh = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6")
    assert_equal(dict(trainer.model.state_dict()), dict(fresh.state_dict()))


def test_what_trained_once_stays_in_it(tmp_path):
    """Gradual unfreezing the other way round: frozen again, and still not the base's."""
    model = model_of("head")
    once = {"bert.pooler.dense.weight"}
    with torch.no_grad():
        model.bert.pooler.dense.weight.add_(1)
    weights.save(model, tmp_path, once)
    other = model_of("head")
    weights.load(other, tmp_path)
    assert_equal(dict(model.state_dict()), dict(other.state_dict()))


def test_buffers_that_training_moves_are_kept(tmp_path):
    def made():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)).requires_grad_(False)

    model = made()
    model(torch.randn(8, 4))
    weights.save(model, tmp_path)
    other = made()
    weights.load(other, tmp_path)
    assert_equal(dict(model.state_dict()), dict(other.state_dict()))
