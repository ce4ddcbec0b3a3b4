"""`eval`: the table, the JSON, the page, and clear words."""

import json
from xml.etree import ElementTree

import pytest

from peft_fast.cli import eval as command
from peft_fast.errors import DataError, SettingsError


def test_metrics_as_table_json_and_page(finished, reviews, tmp_path, capsys):
    output, report = tmp_path / "found.json", tmp_path / "found.html"
    given = [str(finished), "--data", reviews["validation"], "--output", str(output), "--report", str(report)]
    assert command.app(given) == 0
    found = json.loads(output.read_text())
    final = json.loads((finished / "metrics.json").read_text())["final"]
    assert found["metrics"] == pytest.approx(final["validation"], rel=1e-6) and found["rows"] == 32
    shown = capsys.readouterr().out
    assert "accuracy *" in shown and "validation.csv, 32 rows" in shown and str(output) in shown
    ElementTree.fromstring(report.read_text().partition("\n")[2])
    assert "Confusion matrix" in report.read_text()


def test_its_own_rows_without_data(finished):
    assert command.app([str(finished), "--batch-size", "7", "--threads", "1"]) == 0
    assert json.loads((finished / "eval.json").read_text())["data"] == "test.csv (test)"


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_split_stands_beside_the_figures_of_that_split(finished, split, capsys):
    assert command.app([str(finished), "--split", split]) == 0
    assert json.loads((finished / "eval.json").read_text())["split"] == split
    assert f"after training, {split} rows" in " ".join(capsys.readouterr().out.split())


def test_what_the_run_has_no_figures_of_stands_beside_its_last(capsys):
    final = {"validation": {"accuracy": 0.25}, "test": {"accuracy": 0.75}}
    for split in (None, "train"):
        found = {"run": "r", "data": "d", "split": split, "rows": 3, "metric": "accuracy", "metrics": {"accuracy": 0.5}}
        command.show(found, {"metric": "accuracy", "final": final})
        text = capsys.readouterr().out
        assert "test rows" in text and "75.0 %" in text and "25.0 %" not in text


def test_columns_by_another_name(finished, tmp_path):
    (tmp_path / "rows.csv").write_text("review,stars\na lovely film,positive\nthe dull end,negative\n")
    given = [str(finished), "--data", str(tmp_path / "rows.csv"), "--output", str(tmp_path / "e.json")]
    assert command.app([*given, "--columns", "text=review", "label=stars"]) == 0
    assert json.loads((tmp_path / "e.json").read_text())["rows"] == 2


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (["--columns", "text"], SettingsError, "ROLE=COLUMN"),
        (["--threads", "0"], SettingsError, "1 or more"),
        (["--data", "nowhere.csv"], DataError, "nowhere.csv"),
    ],
)
def test_clear_words(finished, given, error, said):
    with pytest.raises(error, match=said):
        command.app([str(finished), *given])


def test_bad_rows_stop_or_are_left_out(finished, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\na lovely film,positive\n,negative\nb,positive\nc,negative\n")
    given = [str(finished), "--data", str(tmp_path / "rows.csv"), "--output", str(tmp_path / "e.json")]
    for words, rows in ((given, 3), ([*given, "--split", "train"], 2)):
        with pytest.raises(DataError, match="(?s)rows.csv, row 3.* --skip-bad-rows ") as refused:
            command.app(words)
        assert "--bad-rows" not in str(refused.value)
        assert command.app([*words, "--skip-bad-rows"]) == 0
        assert json.loads((tmp_path / "e.json").read_text())["rows"] == rows
