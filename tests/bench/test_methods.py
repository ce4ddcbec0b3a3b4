"""`bench methods`: one run a method in a process of its own, and the table that is made of them."""

import json

import pytest

from peft_fast.benchmarks import harness, methods, table
from peft_fast.cli import bench
from peft_fast.errors import SettingsError, UnsupportedError


def metrics(recipe):
    """What a run leaves, as far as a row needs it."""
    return {
        "model": {"name": "toy", "class": "Toy", "dtype": "bf16", "parameters": 1000, "trainable": 20},
        "rows": {"train": 32, "validation": 16, "test": 400},
        "final": {"test": {"accuracy": 0.8, "loss": 0.5, "f1": 0.8}, "validation": {"accuracy": 0.7, "loss": 0.6}},
        "shown": [{"kind": "table"}, {"kind": "confusion", "names": ["a", "b"], "counts": [[150, 50], [30, 170]]}],
        "evaluations": [{"step": 0, "accuracy": 0.5, "loss": 1.0}, {"step": 4, "accuracy": 0.8, "loss": 0.5}],
        "throughput": {"unit": "tokens", "per_second": 9.0, "train_seconds": 90.0},
        "seconds": 100.0,
        "memory": {"peak_bytes": 300 * 2**20, "before_bytes": 100 * 2**20},
        "forecast": {"memory": {"total": 150 * 2**20}},
        "recipe": recipe,
    }


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """(the document, the recipes of its runs) without training."""
    recipes = []
    monkeypatch.setattr(methods, "_trained", lambda recipe: recipes.append(recipe) or metrics(recipe))
    monkeypatch.setattr(methods.examples, "path", lambda *args, **kwargs: tmp_path)
    where = tmp_path / "methods.json"
    assert bench.app(["methods", "--json", str(where), "--threads", "3", "--plot", str(tmp_path / "a.png")]) == 0
    return harness.read(where), recipes


def test_each_method_has_the_same_rows_and_its_own_options(ran):
    document, recipes = ran
    assert [row["title"] for row in document["rows"]] == list(methods.METHODS)
    assert {recipe["method"] for recipe in recipes} == {"head", "lora", "dora", "gradual", "full"}
    own = {key for options in methods.METHODS.values() for key in options} | {"out", "learning_rate"}
    assert len({json.dumps({k: v for k, v in recipe.items() if k not in own}) for recipe in recipes}) == 1
    assert len({recipe["out"] for recipe in recipes}) == len(recipes) == 3 * len(methods.METHODS)
    assert all(recipe["threads"] == 3 for recipe in recipes)


def test_every_recipe_is_a_config():
    from peft_fast.recipes import config
    from peft_fast.recipes import methods as recipes
    from peft_fast.recipes.tasks import Task

    for scale in methods.LESS:
        for title, options in methods.METHODS.items():
            task = {"task": "sequence-classification", "model": methods.MODELS[scale], "data": methods.DATA}
            task["learning_rate"] = max(methods.RATES[title])
            given = config.read(task | methods.SAME | methods.LESS[scale] | options)
            recipes.check(given, Task(given))


def test_the_rate_that_the_validation_rows_prefer(monkeypatch, tmp_path):
    found = {1e-3: (0.7, 0.60, 0.9), 2e-3: (0.8, 0.50, 0.6), 4e-3: (0.8, 0.55, 1.0)}  # on validation twice, on test

    def trained(recipe):
        accuracy, loss, test = found[recipe["learning_rate"]]
        final = {"validation": {"accuracy": accuracy, "loss": loss}, "test": {"accuracy": test, "loss": 0.5}}
        return metrics(recipe) | {"final": final}

    monkeypatch.setattr(methods, "_trained", trained)
    monkeypatch.setattr(methods.examples, "path", lambda *args, **kwargs: tmp_path)
    where = tmp_path / "methods.json"
    assert bench.app(["methods", "--model", "lora", "--json", str(where)]) == 0
    (row,) = harness.read(where)["rows"]
    assert row["settings"]["learning_rate"] == 2e-3 and row["test"]["accuracy"] == 0.6
    assert [(t["learning_rate"], t["accuracy"]) for t in row["tried"]] == [(1e-3, 0.7), (2e-3, 0.8), (4e-3, 0.8)]


def test_the_table(ran):
    text = table.methods([ran[0]])
    assert "| lora | learning_rate 0.001 | 20 (2 %) | **80.0 %** | 1.5 | 200 | 150 | 0.0 |" in text
    assert "32 rows, 2 epochs of batches of 32, bf16, 3 threads; tested on 400 rows, of which 50.0 %" in text
    assert "standard error of an accuracy is 2.0 points" in text
    assert table.methods([]).startswith("_Nothing measured yet")


def test_a_run_that_learnt_nothing_is_refused(monkeypatch, tmp_path):
    def worse(recipe):
        judged = {"accuracy": 0.4, "loss": 0.9}
        return metrics(recipe) | {"final": {"test": judged, "validation": judged}}

    monkeypatch.setattr(methods, "_trained", worse)
    monkeypatch.setattr(methods.examples, "path", lambda *args, **kwargs: tmp_path)
    assert bench.app(["methods", "--model", "head"]) == 1


@pytest.mark.parametrize("more", [["--gate-only"], ["--peers"], ["--dropout", "0"], ["--dtype", "bf16,fp32"]])
def test_options_that_are_for_layers(more):
    with pytest.raises(SettingsError):
        bench.app(["methods", "--tiny", *more])


def test_a_run_that_fails_says_why(tmp_path):
    with pytest.raises(UnsupportedError, match="no such option"):
        methods._trained({"out": str(tmp_path / "run"), "modle": "x"})


@pytest.mark.slow
def test_a_real_run(tmp_path):
    where = tmp_path / "methods.json"
    assert bench.app(["methods", "--tiny", "--model", "head,lora", "--json", str(where)]) == 0
    assert all(row["peak_bytes"] > 0 for row in harness.read(where)["rows"])
