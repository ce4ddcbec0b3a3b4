"""`predict`: a text, standard input, files whose columns are kept."""

import csv
import io
import json

import pytest

from peft_fast.cli import predict
from peft_fast.errors import DataError, SettingsError


def test_text_in_answer_out(finished, capsys):
    assert predict.app([str(finished), "a lovely film", "the dull end"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("positive\t") and second.startswith("negative\t") and first.endswith(" %")


def test_whole_answers(finished, capsys):
    assert predict.app([str(finished), '{"text": "a lovely film"}', "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["label"] == "positive" and set(answer["scores"]) == {"negative", "positive"}


def test_standard_input(finished, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO('a lovely film\n\n{"text": "the dull end"}\n'))
    assert predict.app([str(finished), "-"]) == 0
    found = [json.loads(line)["label"] for line in capsys.readouterr().out.splitlines()]
    assert found == ["positive", "negative"]


def test_lines_without_an_answer_keep_their_place(finished, monkeypatch, capsys, tmp_path):
    lines, out = 'a lovely film\n{"text": ""}\nthe dull end\n', tmp_path / "out.jsonl"
    for more in ([], ["--output", str(out)]):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        assert predict.app([str(finished), "-", "--skip-bad-rows", *more]) == 0
    first, second, third = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (first["label"], second, third["label"]) == ("positive", None, "negative")
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["text"], row["predicted_label"]) for row in found] == [
        ("a lovely film", "positive"), ("", None), ("the dull end", "negative"),
    ]  # fmt: skip
    assert predict.app([str(finished), "a lovely film", '{"text": ""}', "--skip-bad-rows"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "no answer"


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('id,text,label\n7,"a lovely, warm film",?\n8,the dull end,?\n')
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json"])
def test_files_keep_their_columns(finished, rows, tmp_path, suffix):
    out = tmp_path / "answers" / f"out.{suffix}"
    assert predict.app([str(finished), "--input", str(rows), "--output", str(out)]) == 0
    text = out.read_text()
    if suffix in ("csv", "tsv"):
        found = list(csv.DictReader(io.StringIO(text), delimiter="," if suffix == "csv" else "\t"))
        assert json.loads(found[0]["predicted_scores"]).keys() == {"negative", "positive"}
    else:
        found = json.loads(text) if suffix == "json" else [json.loads(line) for line in text.splitlines()]
    assert [row["predicted_label"] for row in found] == ["positive", "negative"]
    assert [row["id"] for row in found] == ["7", "8"] and found[0]["text"] == "a lovely, warm film"
    assert list(found[0])[:3] == ["id", "text", "label"] and [p.name for p in out.parent.iterdir()] == [out.name]


def test_rows_that_cannot_be_answered_keep_their_place(finished, tmp_path):
    rows, out = tmp_path / "rows.csv", tmp_path / "out.jsonl"
    rows.write_text("text,id\na lovely film,1\n,2\nthe dull end,3\n")
    with pytest.raises(DataError, match="(?s)rows.csv, row 3.* --skip-bad-rows ") as refused:
        predict.app([str(finished), "--input", str(rows), "--output", str(out)])
    assert not out.exists() and "--bad-rows" not in str(refused.value)
    assert predict.app([str(finished), "--input", str(rows), "--output", str(out), "--skip-bad-rows"]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["id"], row["predicted_label"]) for row in found] == [("1", "positive"), ("2", None), ("3", "negative")]
    rows.write_text("text,id\n,1\n,2\n")
    with pytest.raises(DataError, match="(?s)2 problems.*do: mend the data") as refused:
        predict.app([str(finished), "--input", str(rows), "--skip-bad-rows"])
    assert "bad" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "nothing to answer"),
        (["a", "--input", "b.csv"], "both"),
        (["a", "--output", "b.xlsx"], "ends in"),
        (["--input", "a.csv", "--output", "a.csv"], "which is the input"),
    ],
)
def test_options_that_do_not_go_together(given, said):
    with pytest.raises(SettingsError, match=said):
        predict.app(["nowhere", *given])


def test_clear_words(finished, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="nowhere.csv"):
        predict.app([str(finished), "--input", "nowhere.csv"])
    with pytest.raises(DataError, match="no folder of a run"):
        predict.app([str(tmp_path), "text"])
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(DataError, match="without a line"):
        predict.app([str(finished), "-"])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"label": "a", "score": 0.913, "scores": {"a": 0.913}}, "a\t91.3 %"),
        ({"text": "bonjour"}, "bonjour"),
        ({"value": 3.14159}, "3.142"),
        ({"entities": [{"word": "x"}]}, '[{"word": "x"}]'),
        ({"answer": "x", "score": 0.5}, '{"answer": "x", "score": 0.5}'),
    ],
)
def test_answers_in_short(answer, said):
    assert predict.short(answer) == said


def test_a_file_of_rows_is_no_text(finished, rows):
    with pytest.raises(SettingsError, match=f"(?s)TEXT {rows}.*did you mean --input {rows}"):
        predict.app([str(finished), str(rows)])


@pytest.mark.parametrize(
    "command, words, near",
    [
        ("predict", ["run", "a text", "--out", "x.csv"], "--output"),
        ("eval", ["run", "--dta", "x.csv"], "--data"),
        ("merge", ["run", "--out", "x", "--overwite"], "--overwrite"),
        ("compare", ["run", "--metrics", "f1"], "--metric"),
    ],
)
def test_an_unknown_flag_is_said_like_all_else(command, words, near, capsys):
    import importlib

    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"peft_fast.cli.{command}").app(words)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith("given: ") and "\nneeded: " in told
    assert f"\ndo: did you mean {near}?" in told
