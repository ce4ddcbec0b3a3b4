"""Groups, rates and schedules: each weight once, at the rate that the options say."""

from __future__ import annotations

import math

import pytest
import torch

from peft_fast.errors import SettingsError
from peft_fast.recipes import optimizer, structure
from tests.architectures.zoo import ARCHITECTURES
from tests.recipes.anytask import SOME, config, prepared, trained

METHODS = ("head", "lora", "full")


def rates(model, task, given) -> dict[str, tuple[float, float]]:
    """Parameter -> (learning rate, weight decay), each in exactly one group."""
    found: dict[str, tuple[float, float]] = {}
    names = {id(p): n for n, p in model.named_parameters()}
    made = optimizer.build(model, task, given)
    for group in made.param_groups:
        for p in group["params"]:
            assert names[id(p)] not in found
            found[names[id(p)]] = group["lr"], group["weight_decay"]
    assert set(found) == trained(model)
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SOME)
def test_each_weight_is_in_one_group(name, method):
    """On every kind of class; a bias or a norm has no decay, the deeper the slower."""
    options = dict(method=method, weight_decay=0.1, learning_rate=1e-3)
    if method != "head":
        options |= dict(layer_decay=0.5)
    elif name in ("GPT-2", "T5", "Whisper", "Wav2Vec2"):
        pytest.skip("no head that this task knows")
    if method in ("lora", "dora"):
        options |= dict(loraplus_ratio=8.0, lora_bias="lora_only", r=2)
    model, task = prepared(name, **options)
    given = config(**options)
    found = rates(model, task, given)
    shapes = {n: p.ndim for n, p in model.named_parameters()}
    assert {n for n, (_, decay) in found.items() if not decay} == {n for n in found if shapes[n] < 2}
    if method == "head":
        assert {rate for rate, _ in found.values()} == {1e-3}
        return
    groups = structure.layers(model, task.head(structure.unwrapped(model)[0]))
    for depth, group in enumerate(reversed(groups)):
        for n in group:
            if n in found:
                ratio = 8.0 if ".lora_B." in n else 10.0 if ".modules_to_save." in n else 1.0
                assert math.isclose(found[n][0], 1e-3 * 0.5**depth * ratio), n


def test_the_head_has_a_rate_of_its_own():
    options = dict(method="full", learning_rate=1e-4, head_learning_rate=1e-2, layer_decay=0.5)
    model, task = prepared("BERT", **options)
    found = {n: rate for n, (rate, _) in rates(model, task, config(**options)).items()}
    assert found["classifier.weight"] == found["classifier.bias"] == 1e-2
    assert found["bert.encoder.layer.1.output.dense.weight"] == 5e-5
    assert found["bert.encoder.layer.0.output.dense.weight"] == 2.5e-5
    assert found["bert.embeddings.word_embeddings.weight"] == 1.25e-5


def test_lora_plus_of_embeddings():
    options = dict(method="lora", target_modules=["query", "word_embeddings"], learning_rate=1e-3, loraplus_ratio=16.0)
    model, task = prepared("BERT", **options)
    found = rates(model, task, config(**options))
    by_kind = {kind: {r for n, (r, _) in found.items() if f".{kind}." in n} for kind in ("lora_A", "lora_B")}
    assert by_kind == {"lora_A": {1e-3}, "lora_B": {1.6e-2}}
    assert {r for n, (r, _) in found.items() if "lora_embedding_B" in n} == {1.6e-2}
    assert {r for n, (r, _) in found.items() if "classifier" in n} == {1e-2}


@pytest.mark.parametrize("name", ["adamw_torch", "sgd", "adafactor", "rmsprop", "adagrad"])
def test_any_optimizer_of_the_trainer_steps(name):
    options = dict(method="full", optimizer=name, layer_decay=0.5)
    model, task = prepared("BERT", **options)
    made = optimizer.build(model, task, config(**options))
    assert len({g["lr"] for g in made.param_groups}) >= 4
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    made.step()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    "options, message",
    [(dict(optimizer="adamw_tohrch"), "adamw_tohrch"), (dict(optimizer="galore_adamw"), "galore_adamw")],
)
def test_an_optimizer_that_is_not_there(options, message):
    model, task = prepared("BERT", method="full")
    with pytest.raises(SettingsError, match=message):
        optimizer.build(model, task, config(method="full", **options))


def test_an_optimizer_with_groups_of_its_own_takes_no_rates(monkeypatch):
    """One that sorts weights by itself is used, unless rates by layer were asked for."""
    import transformers

    own = torch.nn.Parameter(torch.ones(2))
    monkeypatch.setattr(
        transformers.Trainer,
        "get_optimizer_cls_and_kwargs",
        staticmethod(lambda args, model=None: (torch.optim.SGD, {"params": [own], "lr": 1.0})),
    )
    model, task = prepared("BERT", method="full")
    assert optimizer.build(model, task, config(method="full")).param_groups[0]["params"] == [own]
    with pytest.raises(SettingsError, match="groups the weights itself, with layer_decay"):
        optimizer.build(model, task, config(method="full", layer_decay=0.9))


# ---- schedules


def course(steps: int = 20, **options) -> list[float]:
    """Multiples of the rate, step by step; two groups keep their ratio."""
    a, b = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    made = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.1}])
    schedule = optimizer.schedule(made, config(**options), steps)
    out = []
    for _ in range(steps):
        first, second = schedule.get_last_lr()
        assert math.isclose(first, 10 * second, abs_tol=1e-12)
        out.append(first)
        made.step()
        schedule.step()
    return out


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd", "constant", "inverse_sqrt"])
def test_every_schedule_warms_up(name):
    rates = course(schedule=name, warmup=0.2)
    assert rates[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert max(rates) == 1.0
    assert course(schedule=name, warmup=4) == rates


@pytest.mark.parametrize("name, last", [("linear", 0.05), ("cosine", None), ("constant", 1.0), ("inverse_sqrt", None)])
def test_where_schedules_end(name, last):
    rates = course(schedule=name, warmup=0)
    assert rates[0] == 1.0
    assert last is None or rates[-1] == pytest.approx(last)
    assert all(a >= b for a, b in zip(rates, rates[1:], strict=False))
    assert name == "constant" or rates[-1] < 0.5


def test_wsd_stays_then_decays():
    rates = course(schedule="wsd", warmup=0.1, decay=0.3)
    assert rates[2:14] == [1.0] * 12
    assert all(a > b for a, b in zip(rates[14:], rates[15:], strict=False))
    assert rates[-1] < 0.1


def test_a_warmup_longer_than_training():
    with pytest.raises(SettingsError, match="warmup: 30 of 20 steps"):
        course(schedule="linear", warmup=30)


def test_a_class_without_blocks_has_no_layer_decay():
    from torch import nn

    class Plain(nn.Sequential):
        pass

    model = Plain(nn.Linear(2, 2))
    given = config(method="full", layer_decay=0.5)
    _, task = prepared("BERT", method="full")
    with pytest.raises(Exception, match="layer_decay for Plain"):
        list(optimizer.groups(model, task, given))


def test_groups_keep_their_order_between_two_builds():
    """What an optimizer's state is loaded into."""
    options = dict(method="lora", layer_decay=0.7, loraplus_ratio=4.0)
    names = []
    for _ in range(2):
        model, task = prepared("BERT", **options)
        names.append([g["parameter_names"] for g in optimizer.groups(model, task, config(**options))])
    assert names[0] == names[1]
    assert len(ARCHITECTURES) > 40
