"""The table of options: all that is wrong at once, with the nearest name; YAML as people write it."""

import dataclasses
import inspect

import pytest

from peft_fast.errors import SettingsError
from peft_fast.recipes import config, yamls
from peft_fast.recipes.config import Config

LEAST = dict(task="sequence-classification", model="m", data="d.csv")


def wrong(source=None, **options) -> str:
    with pytest.raises(SettingsError) as caught:
        config.read(source, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", Config.model_fields)
def test_every_option_says_where_it_belongs_and_what_it_is(name):
    field = Config.model_fields[name]
    assert field.json_schema_extra["section"] in config.SECTIONS
    assert len(field.description) > 8 and not field.description.endswith(".")
    for known, key in ((config.TASKS, "tasks"), (config.METHODS, "methods")):
        assert set(field.json_schema_extra[key] or ()) <= set(known)


def test_what_is_wrong_comes_at_once():
    """Values, names, what is missing, and what only two options together make wrong."""
    text = wrong(
        {"task": "regresion", "data": {"train": "a", "dev": "b"}, "epochs": -1, "leraning_rate": 1, "dtype": "int8"},
        progressive=[64, 32],
        overwrite=True,
        resume=True,
    )
    for part in (
        "task: 'regresion'",
        "model: missing; hub id",
        "epochs: -1",
        "leraning_rate: no such option; learning_rate is one",
        "dtype: 'int8'",
    ):
        assert part in text
    text = wrong({**LEAST, "epochs": 0, "progressive": [64, 32], "overwrite": True, "resume": True})
    for part in ("epochs: 0", "progressive: [64, 32]; sizes have to grow", "overwrite, resume:"):
        assert part in text
    assert "with 3 problems" in text


@pytest.mark.parametrize(
    "more, told",
    [
        ({"method": "full", "r": 8}, "r: means nothing for full, only for lora, dora"),
        ({"task": "masked-lm", "long_rows": "skip"}, "long_rows: means nothing for masked-lm, only for sequence-"),
        ({"packing": True}, "packing: means nothing for sequence-classification, only for causal-lm"),
        ({"data": {"validation": "v.csv"}}, "data: no train split"),
        ({"data": {"train": "t", "dev": "d"}}, "data: split dev"),
        ({"evaluate_every": 0}, "evaluate_every: 0; epoch, or 1 step or more"),
        ({"training_arguments": {"seed": 3}}, "training_arguments: seed are set by options of their own"),
        ({"class_weights": {"a": -3.0, "b": 1.0}}, "class_weights: {'a': -3.0, 'b': 1.0}; weights of 0 or more"),
        ({"lr": 1}, "lr: no such option; learning_rate is one"),
        ({"warmup": None}, "warmup: no value; input should be a valid number"),
        ({"training_arguments": {"adam_beta2": float("nan")}}, "training_arguments: adam_beta2: nan; a finite number"),
        ({"search": {"rr": [1]}}, "search: rr is no option"),
        ({"early_stopping": "often"}, "early_stopping: 'often'; input should be a valid integer"),
    ],
)
def test_the_rules(more, told):
    assert told in wrong({**LEAST, **more})


NUMBERS = [name for name, field in Config.model_fields.items() if "float" in str(field.annotation)]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", [name for name in NUMBERS if name != "max_grad_norm"])
def test_numbers_are_finite(name, value):
    """Of every option that takes a number."""
    given = {"a": value} if name == "class_weights" else value
    told = wrong({**LEAST, name: given})
    assert f"{name}: {value}; input should be a finite number" in told and "with 1 problem:" in told


def test_a_norm_that_is_logged_and_never_clipped():
    assert config.read(LEAST, max_grad_norm=float("inf")).max_grad_norm == float("inf")
    assert "max_grad_norm: nan; " in wrong(LEAST, max_grad_norm=float("nan"))


def test_a_method_that_is_none_makes_no_other_option_wrong():
    assert "with 1 problem:" in wrong({**LEAST, "method": "gradul", "unfreeze_layers": 2})


@pytest.mark.parametrize("given, taken", [("wandb", ["wandb"]), ("none", []), (["tensorboard"], ["tensorboard"])])
def test_reporters_as_training_arguments_take_them(given, taken):
    assert config.read(LEAST, report_to=given).report_to == taken


def test_a_key_that_stands_twice_is_said_with_its_lines(tmp_path):
    """At the top, in a mapping, in one line; not what `<<` brings and is given anew."""
    path = tmp_path / "a.yaml"
    text = "task: regression\nmodel: m\ndata: d.csv\n"
    path.write_text(text + "training_arguments:\n  adam_beta2: 0.9\n  adam_beta2: 0.8\ntask: masked-lm\nepochs: 0\n")
    told = wrong(path)
    for part in (
        "task: given 2 times, in lines 1, 7",
        "adam_beta2: given 2 times, in lines 5, 6",
        "epochs: 0",
        "3 problems",
    ):
        assert part in told, told
    path.write_text(text + "columns: {text: a, text: b}\n")
    assert "text: given 2 times, in line 4" in wrong(path)
    path.write_text(
        text + "search: {r: &a {low: 1, high: 2}, alpha: {<<: *a, high: 3}, lora_dropout: {<<: *a, <<: *a}}\n"
    )
    assert config.read(path).search["alpha"] == {"low": 1, "high": 3}
    path.write_text(text + "seed: 1\nseed: 2\n")  # a flag of its name is not what is wrong
    assert f"given: {path} with 1 problem:\n  seed: given 2 times, in lines 4, 5\n" in wrong(path, seed=3)


def test_what_is_wrong_in_the_file_and_what_beside_it(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("task: regression\nmodel: m\ndata: d.csv\nepochs: 0\nr: 0\n")
    first, second = wrong(path, lr=None, seed=-1, r=4).split("\n  options beside ")
    assert f"{path} with 1 problem:\n  epochs: 0" in first and "lr" not in first
    assert second.startswith(f"{path} with 2 problems:\n  seed: -1") and "\n  lr: no such option" in second
    assert f"given: options beside {path} with 1 problem:\n  seed" in wrong(path, epochs=1, r=4, seed=-1)


def test_options_go_over_the_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("task: causal-lm\nmodel: m\ndata: d.jsonl\nlearning_rate: 1e-3\nepochs: 2\nr: 4\n")
    found = config.read(path, epochs=5)
    assert (found.task, found.learning_rate, found.epochs, found.r) == ("causal-lm", 1e-3, 5, 4)
    assert str(path) in wrong(path, epochs=-5)


@pytest.mark.parametrize(
    "text, told",
    [
        ("- a\n- b\n", "a YAML mapping"),
        ("", "empty, there is no option in it"),
        ("# epochs: 3\n", "empty, there is no option in it"),
        ("task: [causal-lm\n", "while parsing"),
        (None, "No such file"),
        (b"task: \xff\xfe", "codec can't decode"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, text, told):
    path = tmp_path / "a.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert told in wrong(path) and str(path) in wrong(path)


def test_numbers_as_everybody_writes_them():
    """PyYAML alone takes 1e-5 for a text."""
    found = yamls.parse("{low: 1e-5, high: 2E-3, much: 1e4, text: e5, version: 1.2.3}")
    assert found == {"low": 1e-5, "high": 2e-3, "much": 1e4, "text": "e5", "version": "1.2.3"}


def test_what_is_dumped_is_read_back(tmp_path):
    given = config.read(
        LEAST,
        data={"train": "ä.csv", "test": "t.csv"},
        class_weights={"yes": 2.0},
        target_modules=["q", "v"],
        save_every=7,
        training_arguments={"adam_beta2": 0.99},
        out="runs/a",
    )
    path = tmp_path / "a.yaml"
    path.write_text(config.dump(given), encoding="utf-8")
    assert config.read(path) == given and "ä.csv" in path.read_text(encoding="utf-8")


def test_what_options_set_cannot_be_set_behind_their_back():
    """Every argument that a config's options give the Trainer, and those that would have no effect."""
    from transformers import Seq2SeqTrainingArguments

    from peft_fast.recipes import trainer

    fields = {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments)}
    assert config.OWN_ARGUMENTS <= fields
    source = inspect.getsource(trainer.arguments)
    set_there = {name for name in fields if f"        {name}=" in source}
    assert len(set_there) > 20 and set_there - config.OWN_ARGUMENTS == {"dataloader_pin_memory"}
    assert {"train_sampling_strategy", "deepspeed", "fsdp", "auto_find_batch_size"} <= config.OWN_ARGUMENTS


def test_what_a_value_means_is_said_of_that_value_alone():
    """Of the whole table, what a message of --resume says of a 0, of a default and of any other value."""
    from peft_fast.recipes.record import _in_force

    plain = config.read(LEAST)
    meant = {}
    for name, field in Config.model_fields.items():
        if name in ("task", "method", "learning_rate", "head_learning_rate", "metric"):
            continue  # what these are is computed
        for value in {repr(v): v for v in (field.default, 0, 0.0, False, None, 3)}.values():
            said = _in_force(plain.model_copy(update={name: value}), name)
            if said != repr(value):
                assert value is None or (value == 0 and value is not False), (name, said)
                meant[name, value] = said.partition(" ")[2]
    assert meant["max_grad_norm", 0] == "(never)" and meant["train_rows", 0] == "(all)"
    assert meant["dropout", None] == "(its own)" and meant["early_stopping", 0] == "(never)"
    assert {"steps", "threads", "save_every", "name"} <= {name for name, _ in meant}
