"""The forecast against what torch's allocator really holds, and a plan without weights."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from torch import nn

import peft_fast
from peft_fast.benchmarks.memory import peak_bytes
from peft_fast.recipes import forecast, methods, optimizer, rehearse
from tests.architectures.zoo import ARCHITECTURES
from tests.recipes.anytask import AnyTask, config, prepared

# what a forecast may be off by: libraries take a little inside their operators
OFF = 0.05


class Rows(AnyTask):
    """Batches of one architecture, whatever the rows are."""

    name = "BERT"

    def collate(self, features):
        torch.manual_seed(1)
        return {
            k: v.repeat(len(features) // 2, *[1] * (v.ndim - 1)) for k, v in ARCHITECTURES[self.name].inputs().items()
        }

    def length(self, feature):
        return feature


class OwnLoss(Rows):
    """A loss that looks at the labels' values."""

    def loss(self, outputs, batch):
        kept = batch["labels"] != -100
        assert kept.any()
        return nn.functional.cross_entropy(outputs["logits"][kept].float(), batch["labels"][kept])


def kind(name: str, base: type[Rows] = Rows) -> type[Rows]:
    return type("Named", (base,), {"name": name})


def measured(model, task, given, times: int = 1) -> tuple[int, int]:
    """(peak of a training step beyond weights and state, bytes of the optimizer's state)."""
    made = optimizer.build(model.train(), task, given)
    batch = task.collate([0] * given.batch_size)
    cast = methods.dtypes(given)[1].get("bf16")

    def step():
        for _ in range(times):
            with torch.autocast("cpu", torch.bfloat16) if cast else contextlib.nullcontext():
                outputs = model(**task.inputs(batch))
                loss = task.loss(outputs, batch)
                loss = outputs["loss"] if loss is None else loss
            loss.backward()
        made.step()
        made.zero_grad()

    for _ in range(3):  # groups of layers settle
        step()
    peak = peak_bytes(step, torch.device("cpu"))
    return peak, sum(t.nbytes for s in made.state.values() for t in s.values() if torch.is_tensor(t))


CASES = [
    ("BERT", dict(method="lora")),
    ("BERT", dict(method="full", dtype="bf16")),
    ("BERT", dict(method="head", dtype="bf16")),
    ("BERT", dict(method="full", gradient_accumulation=2)),
    ("BERT", dict(method="dora", r=4)),
    ("GPT-2", dict(method="lora", dtype="bf16", lora_dropout=0.0)),
    ("BERT", dict(method="lora", fast=False)),
    ("Llama", dict(method="lora", gradient_checkpointing=True)),
    ("T5", dict(method="lora")),
    ("ViT", dict(method="gradual")),
]


@pytest.mark.parametrize("name, options", CASES, ids=str)
def test_forecast_is_what_is_measured(name, options):
    """Peak of forward and backward, and the optimizer's state, of stock and of fast layers."""
    given = config(batch_size=8, device="cpu", **options)
    model = ARCHITECTURES[name].build(dropout=0.1).to(methods.dtypes(given)[0])
    model, task = prepared(model, kind(name), **{"batch_size": 8, "device": "cpu", **options})
    if given.method in ("lora", "dora") and given.fast:
        peft_fast.accelerate(model)
    found = forecast.forecast(given, task, model, [7] * 40)
    if given.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    peak, state = measured(model, task, given, given.gradient_accumulation)
    memory = found["memory"]
    assert memory["optimizer"] == state
    assert memory["gradients"] == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert memory["total"] == sum(v for k, v in memory.items() if k != "total")
    ratio = (memory["gradients"] + memory["activations"]) / peak
    assert abs(ratio - 1) < (OFF if given.dtype == "fp32" else 2 * OFF), ratio
    memory_notes = [note for note in found["notes"] if "last stage" not in note]
    assert memory_notes == []


def test_a_loss_that_looks_at_labels_is_rehearsed():
    model, task = prepared("BERT", kind("BERT", OwnLoss), method="lora")
    given = config(method="lora", batch_size=4)
    found = forecast.forecast(given, task, model, [3] * 8)
    assert found["notes"] == []
    assert found["memory"]["activations"] > 0


def test_a_model_that_looks_at_its_values_is_measured_on_few_rows():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = ARCHITECTURES["BERT"].build()
            self.config, self.layers = self.inner.config, nn.ModuleList([nn.Sequential(nn.Linear(2, 2))] * 2)

        def forward(self, **batch):
            out = self.inner(**batch)
            assert out.logits.sum().item() == out.logits.sum().item()
            return out

    model, task = prepared(Looks(), kind("BERT"), method="full")
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = forecast.forecast(config(method="full", batch_size=8), task, model, [3] * 8)
    assert "activations are those of 2 of 8 rows, scaled" in found["notes"]
    assert found["memory"]["activations"] > 0
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


def test_the_model_is_left_as_it_was():
    model, task = prepared("BERT", kind("BERT"), method="lora")
    peft_fast.accelerate(model)
    model.eval()
    state, before = torch.get_rng_state(), {n: p.clone() for n, p in model.named_parameters()}
    forecast.forecast(config(method="lora", batch_size=4), task, model, [3] * 8)
    assert not model.training
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert peft_fast.report(model).fast_calls == 0
    torch.manual_seed(1)
    assert torch.get_rng_state().shape == state.shape


def test_steps_and_units():
    model, task = prepared("BERT", kind("BERT"), method="lora")
    given = config(method="lora", batch_size=4, gradient_accumulation=2, epochs=2.5)
    found = forecast.forecast(given, task, model, [5, 9] * 15)
    assert (found["steps_per_epoch"], found["steps"]) == (4, 10)
    assert (found["units_per_step"], found["longest"]) == (56, 9)
    assert found["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found["layers"] == {
        "head": sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ".layer." not in n),
        "2 blocks": sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ".layer." in n),
    }
    json.dumps(found)
    assert forecast.forecast(config(method="lora", steps=7), task, model, [5] * 8)["steps"] == 7


@pytest.mark.parametrize("name", ["adamw_torch", "sgd", "adafactor", "rmsprop"])
def test_the_optimizers_state(name):
    given = config(method="full", optimizer=name, batch_size=4)
    model, task = prepared("BERT", kind("BERT"), method="full", optimizer=name)
    _, state = measured(model, task, given)
    assert forecast.optimizer_bytes(model, given) == state


def test_fast_layers_are_known_without_weights():
    """A model on no device: parameters, memory and fast layers, all from its shapes."""
    with torch.device("meta"):
        model = ARCHITECTURES["Llama"].build()
    model, task = prepared(model, kind("Llama"), method="lora", batch_size=8)
    assert all(p.is_meta for p in model.parameters())
    given = config(method="lora", batch_size=8, device="cpu")
    found = forecast.forecast(given, task, model, [7] * 40)
    real, task = prepared("Llama", kind("Llama"), method="lora", batch_size=8)
    peft_fast.accelerate(real)
    expected = forecast.forecast(given, task, real, [7] * 40)
    assert found == expected
    assert len(found["fast"]["fast"]) == 14
    assert found["fast"]["blocks"] == 2


def test_a_big_models_weights_stay_on_disk(tmp_path, monkeypatch):
    """The loader's own folder: too big is what `BIG` says."""
    import transformers

    ARCHITECTURES["BERT"].build().save_pretrained(tmp_path)

    class Loads(AnyTask):
        def load_model(self, dtype):
            cls = transformers.AutoModelForSequenceClassification
            return cls.from_pretrained(tmp_path, dtype=dtype, **self.config.model_options)

    task = Loads(config(method="lora"))
    model, loaded = forecast.load(task, torch.float32)
    assert loaded
    assert not any(p.is_meta for p in model.parameters())
    monkeypatch.setattr(forecast, "BIG", 1000)
    model, loaded = forecast.load(task, torch.bfloat16)
    assert not loaded
    assert all(p.is_meta and p.dtype is torch.bfloat16 for p in model.parameters())
    assert task.config.model_options == {}


def test_a_ledger_counts_what_lives():
    """Freed tensors and views count no more; a view of a storage never counts anew."""
    ledger = rehearse.Ledger()
    with ledger:
        a = torch.zeros(100)
        b = a[:50]
        del a
        c = b + 1
    assert ledger.held == ledger.peak == 400 + 200
    del b
    assert ledger.held == 200
    del c
    assert ledger.held == 0


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_was_there_before_is_measured_before_the_model_is_loaded(learn, options, monkeypatch, method):
    """Else the figure has the weights of some methods in it, and of others not."""
    from peft_fast.recipes import process
    from peft_fast.recipes.tasks.sequence_classification import Task

    options.pop("r")
    load, loaded = Task.load_model, []
    monkeypatch.setattr(Task, "load_model", lambda self, dtype: loaded.append(dtype) or load(self, dtype))
    monkeypatch.setattr(process, "memory", lambda device: 3 + len(loaded))
    found = learn(method=method, steps=1).result["memory"]
    assert loaded and found["before_bytes"] == 3 and found["peak_bytes"] > 2**20
