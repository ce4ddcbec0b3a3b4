"""report_to: wandb, through transformers' own callback, with a stand-in for the package that keeps what it is told."""

import os
import signal
import sys

import pytest

from peft_fast.errors import UnsupportedError

# what WandbCallback calls, as strict as the package itself: nothing is logged outside of a run
STAND_IN = """
import os

run = None
runs = []


class Error(Exception):
    pass


class Run:
    def __init__(self, **given):
        self.given, self.name, self.id = given, given["name"], "a"
        self.logged, self.summary, self.exit_code = [], {}, None

    def _label(self, code):
        self.code = code


class Settings(dict):
    def update(self, values, allow_val_change=False):
        super().update(values)


config = Settings()


def init(**given):
    global run
    if os.environ.get("WANDB_MODE") != "offline":
        raise Error("no network here")
    run = Run(**given)
    runs.append(run)
    return run


def _open():
    if run is None:
        raise Error("You must call wandb.init() before wandb.log()")
    return run


def define_metric(name, **how):
    _open()


def log(values):
    _open().logged.append(dict(values))


def finish(exit_code=None):
    global run
    _open().exit_code = exit_code or 0
    run = None


def termwarn(text, repeat=True):
    raise Error(text)
"""
CONFIG_UTIL = "class ConfigError(Exception):\n    pass\n"


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """The stand-in, offline."""
    folder = tmp_path / "packages" / "wandb"
    for part, text in (("", STAND_IN), ("sdk", ""), ("sdk/lib", "")):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "__init__.py").write_text(text)
    (folder / "sdk" / "lib" / "config_util.py").write_text(CONFIG_UTIL)
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("WANDB_MODE", "offline")
    import wandb

    yield wandb
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        del sys.modules[name]


def test_a_run_is_told_to_wandb_as_it_goes(learn, wandb):
    assert os.path.join("packages", "wandb") in wandb.__file__
    made = learn(report_to=["wandb"], name="reviews", epochs=1)
    (told,) = wandb.runs
    assert told.given == {"project": "huggingface", "name": "reviews"} and told.code == "transformers_trainer"
    steps = [entry["train/global_step"] for entry in told.logged if "train/loss" in entry]
    assert steps == [entry["step"] for entry in made.result["log"]]
    losses = [entry["train/loss"] for entry in told.logged if "train/loss" in entry]
    assert losses == [entry["loss"] for entry in made.result["log"]]
    assert all({"train/per_second", "train/memory_bytes"} <= set(e) for e in told.logged if "train/loss" in e)
    judged = [entry for entry in told.logged if "eval/accuracy" in entry and "train/global_step" in entry]
    assert [entry["train/global_step"] for entry in judged] == [e["step"] for e in made.result["evaluations"]] == [0, 6]
    assert [entry["eval/accuracy"] for entry in judged] == [e["accuracy"] for e in made.result["evaluations"]]
    assert told.logged[-1]["test/accuracy"] == made.result["final"]["test"]["accuracy"]
    assert wandb.config["learning_rate"] == 1e-2 and "peft_config" in wandb.config and told.exit_code == 0


def test_each_training_of_a_process_is_a_run_of_its_own(learn, wandb):
    learn(report_to=["wandb"], steps=1, name="one")
    learn(report_to=["wandb"], steps=1, name="two", overwrite=True)
    assert [told.given["name"] for told in wandb.runs] == ["one", "two"] and wandb.run is None
    assert all("test/accuracy" in told.logged[-1] and told.exit_code == 0 for told in wandb.runs)


def test_a_run_that_was_open_stays_its_owners(learn, wandb):
    mine = wandb.init(name="mine")
    learn(report_to=["wandb"], steps=1)
    assert wandb.run is mine and wandb.runs == [mine] and mine.exit_code is None and mine.logged


def test_one_that_fails_or_is_stopped_is_closed_too(learn, wandb, at_step, signalled):
    def fail(model):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        learn([at_step(1, fail)], report_to=["wandb"])
    stopped = learn([signalled(2)], report_to=["wandb"], overwrite=True)
    assert stopped.signum == signal.SIGINT
    assert [told.exit_code for told in wandb.runs] == [1, 0] and wandb.run is None


def test_a_trial_that_is_pruned_has_not_failed(learn, wandb, at_step):
    optuna = pytest.importorskip("optuna")

    def prune(model):
        raise optuna.TrialPruned

    with pytest.raises(optuna.TrialPruned):
        learn([at_step(1, prune)], report_to=["wandb"])
    assert [told.exit_code for told in wandb.runs] == [0] and wandb.run is None


def test_without_report_to_nothing_is_told(learn, wandb):
    learn(steps=1)
    assert wandb.runs == []


def test_a_trial_of_a_search_is_a_run_of_its_own(options, wandb, tmp_path):
    from peft_fast.recipes import config as configs
    from peft_fast.recipes import search

    more = {"out": str(tmp_path / "found"), "steps": 2, "report_to": ["wandb"], "search": {"r": [2, 4]}}
    found = search.search(configs.read(options | more), 2)
    assert [row["state"] for row in found.trials] == ["done", "done"]
    assert [told.given["name"] for told in wandb.runs] == ["0000", "0001"]


def test_what_is_not_installed_is_said_before_training(learn, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else found(name, *more)
    )
    with pytest.raises(UnsupportedError, match="(?s)report_to: wandb.*pip install wandb"):
        learn(report_to=["wandb"])
