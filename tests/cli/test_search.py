"""`search`: its command line, its table, and what it says at the end."""

import pytest

from peft_fast.cli import search as command
from peft_fast.errors import SettingsError
from peft_fast.recipes import search


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What `search.search` was called with; it tells of two trials."""
    seen = {}

    def stand_in(config, count, *, tell, **options):
        seen.update(options, config=config, count=count)
        for number, value in enumerate((0.5, 0.75)):
            facts = {"number": number, "options": {"r": 4 * (number + 1)}, "metric": "accuracy", "higher": True}
            tell("began", facts)
            tell("judged", {"value": value, "step": 1, "steps": 2})
            tell("ended", facts | {"state": "complete", "value": value, "reason": ""})
        row = {"trial": 1, "again": False, "state": "done", "accuracy": 0.75, "best": True}
        row["unlearnt"] = seen.get("unlearnt", False)
        rows = [row | {"trial": 0, "best": False, "accuracy": seen.get("other", 0.5)}, row]
        best = None if seen.get("lost") else row
        return search.Outcome(tmp_path, None, rows, best, None, bool(seen.get("stop")), "accuracy")

    monkeypatch.setattr(search, "search", stand_in)
    return seen


def test_options_of_the_search_and_of_train(asked, capsys):
    given = ["s.yaml", "--trials", "7", "--timeout", "60", "--no-prune", "--epochs", "2", "--out", "found"]
    assert command.app(given) == 0
    assert str(asked["config"]) == "s.yaml" and asked["count"] == 7 and asked["timeout"] == 60 and not asked["prune"]
    assert {"epochs", "out"} <= set(asked) and "trials" not in asked and "r" not in asked
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "trial 0  done  50.0 %  r=4" and shown[1].endswith("r=8")
    assert shown[2] == "best: trial 1, accuracy 75.0 %" and "best.yaml" in shown[3] and "report.html" in shown[4]


def test_a_best_trial_that_is_none_is_said(asked, capsys):
    asked.update(unlearnt=True, other=0.75)
    assert command.app(["s.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "No trial did better than the weights it began with" in shown
    assert "All 2 trials came to the same accuracy" in shown


def test_exit_statuses(asked, capsys):
    asked["lost"] = True
    assert command.app(["s.yaml"]) == 1 and "no trial was done" in capsys.readouterr().out
    asked["stop"] = True
    assert command.app(["s.yaml"]) == 130 and "goes on" in capsys.readouterr().out


def test_the_live_table(asked):
    table = command.Table("peft-fast search", 3)
    facts = {"number": 0, "options": {"r": 4}, "metric": "loss", "higher": False}
    table.tell("began", facts)
    table.tell("step", {"step": 3, "steps": 9})
    assert table.cells(table.rows[0])[1] == "step 3/9"
    table.live = True  # nothing is printed
    for number, value in ((0, 0.5), (1, 0.25), (2, None)):
        if number:
            table.tell("began", facts | {"number": number})
        state = "fail" if value is None else "complete"
        table.tell("ended", {"state": state, "value": value, "reason": "out of memory" if value is None else ""})
    assert table._best()["number"] == 1 and table.draw().row_count == 3
    assert table.cells(table.rows[2])[1:3] == ("failed", "–")


def test_a_bad_space_is_said(tmp_path):
    (tmp_path / "s.yaml").write_text(
        "task: sequence-classification\nmodel: m\ndata: d\nsearch: {r: [0], nonsense: [1]}\nout: x\n"
    )
    with pytest.raises(SettingsError, match="nonsense is no option"):
        command.app([str(tmp_path / "s.yaml")])
