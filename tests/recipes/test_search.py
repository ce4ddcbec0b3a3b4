"""A search: that a killed one goes on, what ends it, and what it leaves."""

import csv
import json
import math
import re

import pytest

from peft_fast.errors import DataError, SettingsError
from peft_fast.pages import search as page
from peft_fast.recipes import config as configs
from peft_fast.recipes import data, search
from peft_fast.recipes.splits import Splits

BASE = dict(task="sequence-classification", model="m", data="d")


def config(**more):
    return configs.read(BASE | more)


# ---- searches of runs that take no time


class Landscape:
    """In place of run.train: a value of the config, and whatever a trial may come to."""

    def __init__(
        self, monkeypatch, value=lambda config: -((math.log10(config.learning_rate) + 3) ** 2), steps=3, rows=False
    ):
        from peft_fast.recipes import run

        self.value, self.steps, self.seen, self.before = value, steps, [], lambda config, count: None
        monkeypatch.setattr(run, "train", self.train)
        monkeypatch.setattr(search, "free", lambda: None)
        if not rows:
            monkeypatch.setattr(data, "read", lambda config, task: Splits())

    def train(self, given, callbacks=(), say=None):
        from types import SimpleNamespace

        self.seen.append(given)
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "checkpoints").mkdir(exist_ok=True)
        (given.out / "adapter").mkdir(exist_ok=True)
        (given.out / "config.yaml").write_text(configs.dump(given))
        self.before(given, len(self.seen))
        value = self.value(given)
        state = SimpleNamespace(global_step=0, max_steps=self.steps, log_history=[])
        for step in range(1, self.steps + 1):
            state.global_step = step
            for callback in callbacks:
                callback.on_step_end(None, state, None)
                callback.on_evaluate(None, state, None, metrics={"eval_accuracy": value - 1 / step})
        result = {
            "state": "done",
            "seconds": 1.0,
            "best": {"value": value},
            "final": {"validation": {"accuracy": value}},
        }
        return SimpleNamespace(result=result)


TRIED = {"learning_rate": {"low": 1e-5, "high": 1e-1, "log": True}, "r": [4, 8, 16]}


@pytest.fixture
def given(tmp_path, monkeypatch, request):
    if "plots" not in request.fixturenames:  # they take longer than all else
        monkeypatch.setattr(page, "draw", lambda study, metric: {})
    return config(out=str(tmp_path / "search"), search=TRIED)


@pytest.fixture
def plots():
    """Asks for optuna's plots."""


def rates(outcome):
    return [row["options"]["learning_rate"] for row in outcome.trials]


def test_a_search_finds_the_best_and_leaves_it(monkeypatch, given, plots, tmp_path):
    Landscape(monkeypatch)
    found = search.search(given, 10)
    folder = tmp_path / "search"
    assert len(found.trials) == 10 and not found.stopped
    assert found.best["accuracy"] == max(row["accuracy"] for row in found.trials if row["state"] == "done")
    assert abs(math.log10(found.config.learning_rate) + 3) < 1
    best = configs.read(folder / "best.yaml")
    assert best.learning_rate == found.config.learning_rate and best.search == {} and not best.overwrite
    assert best.out.name == "best" and not best.out.exists()
    assert [path.parent.name for path in folder.glob("trials/*/adapter")] == [f"{found.best['trial']:04d}"]
    assert not list(folder.glob("trials/*/checkpoints"))
    with (folder / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and float(rows[0]["learning_rate"]) == found.trials[0]["options"]["learning_rate"]
    assert len(json.loads((folder / "trials.json").read_text())) == 10
    assert {path.name for path in folder.glob("*.png")} == {"importance.png", "parallel.png"}
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png") == 2 and "best.yaml" in page


def test_there_is_no_half_a_trial():
    row = {"state": "done", "seconds": 1.0, "reason": "", "options": {}}
    rows = [row | {"trial": trial, "best": trial == 0, "accuracy": 0.5 - trial / 10} for trial in range(3)]
    assert re.findall('<text class="mid".*?>(.*?)<', page.build(rows, "accuracy", True, {})) == ["0", "1", "2"]


@pytest.mark.parametrize("values", [(0.5, 0.5, 0.5), (0.5, 0.5, 0.6)])
def test_trials_that_are_all_alike_have_no_scale_of_colours(monkeypatch, values):
    import optuna
    from matplotlib.figure import Figure

    study, seen = optuna.create_study(), []
    choices = optuna.distributions.CategoricalDistribution([2, 4, 8])
    for r, value in zip((2, 4, 8), values, strict=True):
        study.add_trial(optuna.create_trial(params={"r": r}, distributions={"r": choices}, value=value))
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **how: seen.append([one.get_label() for one in self.axes]))
    assert list(page.draw(study, "accuracy")) == ["parallel"]
    assert ("<colorbar>" in seen[0]) == (len(set(values)) > 1)


def test_trials_that_end_where_they_began_have_their_own_values(monkeypatch, given, tmp_path):
    """As the weights before training are the best of each, all would have their value."""
    landscape = Landscape(monkeypatch)
    train, kept = landscape.train, [True]

    def diverging(config, callbacks=(), say=None):
        made = train(config, callbacks)
        if kept[0]:
            made.result["best"] = {"value": 1.0, "step": 0}
        return made

    from peft_fast.recipes import run

    monkeypatch.setattr(run, "train", diverging)
    found = search.search(given, 3)
    assert len({row["accuracy"] for row in found.trials}) == 3 and found.metric == "accuracy"
    assert all(row["unlearnt"] for row in found.trials) and found.best["accuracy"] < 1
    said = "No trial did better than the weights it began with"
    assert said in (tmp_path / "search" / "report.html").read_text()
    kept[0] = False
    found = search.search(given, 6)
    assert not any(row["unlearnt"] for row in found.trials[3:])


def test_the_same_seed_is_the_same_search(monkeypatch, given, tmp_path):
    Landscape(monkeypatch)
    first = search.search(given, 3)
    again = search.search(given.model_copy(update={"out": tmp_path / "again"}), 3)
    other = search.search(given.model_copy(update={"out": tmp_path / "other", "seed": 1}), 3)
    assert rates(first) == rates(again) != rates(other)


def test_a_killed_search_goes_on_as_if_nothing_had_happened(monkeypatch, given, tmp_path):
    Landscape(monkeypatch)
    whole = search.search(given.model_copy(update={"out": tmp_path / "whole"}), 7)
    landscape = Landscape(monkeypatch)

    class Kill(BaseException):
        pass

    def die(config, count):
        if count == 4:
            raise Kill

    landscape.before = die
    with pytest.raises(Kill):
        search.search(given, 7)
    landscape.before = lambda config, count: None
    found = search.search(given, 7)
    assert rates(found) == rates(whole)
    assert [row["accuracy"] for row in found.trials] == [row["accuracy"] for row in whole.trials]
    assert len(landscape.seen) == 8
    # the trial that was cut off is taken up in its own folder
    assert landscape.seen[4].resume and landscape.seen[4].out == landscape.seen[3].out
    aside = [trial.user_attrs.get("aside") for trial in found.study.trials]
    assert aside.count("killed") == 1
    # its number, too
    assert [row["trial"] for row in found.trials] == list(range(7)) == [row["trial"] for row in whole.trials]
    assert [row["trial"] for row in found.trials if row["again"]] == [3]
    said = "Cut off and done again under its own number: trial 3."
    assert said in (tmp_path / "search" / "report.html").read_text()
    assert said not in (tmp_path / "whole" / "report.html").read_text()


def test_ctrl_c_keeps_everything(monkeypatch, given):
    landscape = Landscape(monkeypatch)

    def interrupt(config, count):
        if count == 3:
            raise KeyboardInterrupt

    landscape.before = interrupt
    found = search.search(given, 6)
    assert found.stopped and len(found.trials) == 3 and found.best and (found.folder / "best.yaml").exists()
    assert found.trials[2]["state"] == "waiting"
    landscape.before = lambda config, count: None
    found = search.search(given, 6)
    assert not found.stopped and [row["state"] for row in found.trials][:4] == ["done"] * 4
    assert len(found.trials) == 6 and len({row["trial"] for row in found.trials}) == 6


def test_more_trials_add_to_those_there_are(monkeypatch, given):
    landscape = Landscape(monkeypatch)
    search.search(given, 3)
    assert len(search.search(given, 5).trials) == 5 and len(landscape.seen) == 5


def test_poor_trials_are_cut_short(monkeypatch, given):
    def value(config):
        return 1.0 if len(landscape.seen) <= search.WAIT else 0.0

    landscape = Landscape(monkeypatch, value)
    found = search.search(given, 7)
    assert [row["state"] for row in found.trials] == ["done"] * 4 + ["pruned"] * 3
    assert found.trials[-1]["accuracy"] == -1.0 and "median" in found.trials[-1]["reason"]
    found = search.search(given.model_copy(update={"out": given.out.parent / "all"}), 7, prune=False)
    assert {row["state"] for row in found.trials} == {"done"}


def test_a_trial_that_fails_does_not_end_the_search(monkeypatch, given):
    def fail(config, count):
        if count == 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 3 GiB")
        if count == 3:
            raise RuntimeError("shapes differ\nand more")

    landscape = Landscape(monkeypatch, lambda config: math.nan if len(landscape.seen) == 4 else 1.0)
    landscape.before = fail
    found = search.search(given, 6)
    assert [row["state"] for row in found.trials] == ["done", "failed", "failed", "failed", "done", "done"]
    reasons = [row["reason"] for row in found.trials]
    assert reasons[1:4] == ["out of memory", "RuntimeError: shapes differ and more", "accuracy was no number"]
    assert all(reason in (found.folder / "report.html").read_text() for reason in reasons)


def test_what_always_fails_ends_the_search(monkeypatch, given):
    landscape = Landscape(monkeypatch)

    def fail(config, count):
        raise RuntimeError("no such layer")

    landscape.before = fail
    with pytest.raises(DataError, match="3 trials, all failed: RuntimeError: no such layer"):
        search.search(given, 20)
    assert len(landscape.seen) == 3


def test_bad_data_ends_the_search_at_once(monkeypatch, given):
    landscape = Landscape(monkeypatch)

    def fail(config, count):
        raise DataError("given: rows.csv: empty")

    landscape.before = fail
    with pytest.raises(DataError, match="rows.csv"):
        search.search(given, 20)
    assert len(landscape.seen) == 1


def test_another_config_is_another_search(monkeypatch, given):
    Landscape(monkeypatch)
    search.search(given, 2)
    with pytest.raises(SettingsError, match="other options .epochs."):
        search.search(given.model_copy(update={"epochs": 9.0}), 2)
    with pytest.raises(SettingsError, match="other options"):
        search.search(given.model_copy(update={"search": {"r": [4]}}), 2)
    fresh = search.search(
        given.model_copy(update={"search": {"r": [4, 8]}, "learning_rate": 1e-3, "overwrite": True}), 2
    )
    assert [list(row["options"]) for row in fresh.trials] == [["r"], ["r"]]


def test_a_folder_with_something_else_in_it(monkeypatch, given):
    given.out.mkdir()
    (given.out / "notes.txt").write_text("mine")
    with pytest.raises(SettingsError, match="something else"):
        search.search(given, 2)


def test_other_rows_are_another_search(monkeypatch, given, tmp_path):
    landscape, file = Landscape(monkeypatch, rows=True), tmp_path / "rows.csv"
    rows = [f"{word} number {i},{word}\n" for i in range(20) for word in ("yes", "no")]
    file.write_text("".join(["text,label\n", *rows]))
    given = given.model_copy(update={"data": str(file), "validation_share": 0.2})
    search.search(given, 1)
    assert len(search.search(given, 2).trials) == 2
    file.write_text("".join(["text,label\n", *rows[:-1], "yes number 19,no\n"]))
    with pytest.raises(DataError, match=r"other rows \(.*'train': 32, .*, now .*'train': 32"):
        search.search(given, 3)
    assert len(landscape.seen) == 2
    assert len(search.search(given.model_copy(update={"overwrite": True}), 1).trials) == 1


def test_two_options_are_tried_once_each(monkeypatch, given):
    landscape = Landscape(monkeypatch, lambda config: config.r)
    found = search.search(given.model_copy(update={"search": {"r": [4, 8]}}), 2)
    assert {row["options"]["r"] for row in found.trials} == {4, 8} and len(landscape.seen) == 2
    found = search.search(given.model_copy(update={"search": {"r": [4, 8]}}), 4)
    assert len(found.trials) == 4 and len(landscape.seen) == 2  # a run gives the same twice: no need to train again


def test_no_trial_starts_when_time_is_up(monkeypatch, given):
    Landscape(monkeypatch)
    assert search.search(given, 5, timeout=0).trials == []


def test_a_study_file_of_something_else(monkeypatch, given, tmp_path):
    Landscape(monkeypatch)
    (tmp_path / "study.db").write_text("this is no database, but a text that is long enough to be looked at")
    with pytest.raises(DataError, match="study"):
        search.search(given, 1, study=tmp_path / "study.db")


def test_trials_that_are_all_equal_are_still_drawn_beside_one_another(monkeypatch, given, plots, tmp_path):
    Landscape(monkeypatch, value=lambda config: 0.75)
    search.search(given, 4)
    assert {path.name for path in (tmp_path / "search").glob("*.png")} == {"parallel.png"}
    page = (tmp_path / "search" / "report.html").read_text()
    assert "All trials at once" in page and "came to different values" in page


def test_numbers_have_no_gaps_where_trials_were_drawn_twice(monkeypatch, given, tmp_path):
    Landscape(monkeypatch, value=lambda config: config.r)
    found = search.search(given.model_copy(update={"search": {"r": [4, 8]}}), 3)
    assert any("like trial" in trial.user_attrs.get("aside", "") for trial in found.study.trials)
    assert [row["trial"] for row in found.trials] == [0, 1, 2]
    assert [row["folder"] for row in found.trials] == ["trials/0000", "trials/0001", "trials/0002"]


# ---- real trials


def test_rows_are_read_once_for_the_trials_of_a_search(options, monkeypatch):
    from peft_fast.recipes import data, run, sources

    inner, read = sources.tables, []
    monkeypatch.setattr(sources, "tables", lambda *args: read.append(args) or inner(*args))
    plain = run.prepare(configs.read(options))
    with data.kept():
        first, again = (run.prepare(configs.read(options | {"lora_dropout": p})) for p in (0.1, 0.2))
        assert len(read) == 2
        fewer = run.prepare(configs.read(options | {"train_rows": 20}))
        run.prepare(configs.read(options | {"seed": 1}))
        assert len(read) == 4 and fewer.rows["train"] == 20
    for other in (first, again):
        assert other.notes == plain.notes and other.task.facts == plain.task.facts and other.rows == plain.rows
        for split, rows in plain.features.items():
            assert rows[:] == other.features[split][:]
    first.splits.select("train", [0])
    assert len(again.splits["train"]) == 96
    run.prepare(configs.read(options))
    assert len(read) == 5


def test_real_trials(options, tmp_path):
    given = configs.read(
        options | {"out": str(tmp_path / "found"), "epochs": 3, "search": {"method": ["lora", "head"]}}
    )
    said = []
    found = search.search(given, 2, tell=lambda event, facts: said.append(event))
    assert [row["state"] for row in found.trials] == ["done", "done"]
    assert found.best["accuracy"] > 0.7 and said.count("judged") == 6
    assert (tmp_path / "found" / found.best["folder"] / "report.html").exists()
    from peft_fast.recipes import run

    made = run.train(tmp_path / "found" / "best.yaml", say=lambda text: None)
    assert made.result["best"]["value"] == found.best["accuracy"]
