"""Data that cannot be learnt from stops a run before a model is loaded, and leaves the run's folder free."""

import json

import pytest

from peft_fast.errors import DataError
from peft_fast.recipes import run
from peft_fast.recipes.tasks import loading

GOOD = [(f"sentence {i}", "good" if i % 2 else "bad") for i in range(40)]
HELD = [(f"other {i}", "good" if i % 2 else "bad") for i in range(10)]


def table(rows, head="text,label"):
    return (head + "\n" + "".join(f"{text},{label}\n" for text, label in rows)).encode("utf-8", "surrogateescape")


def changed(place, row):
    return table([*GOOD[:place], row, *GOOD[place + 1 :]])


# name -> train file, options, what the message has to say
FAULTS = {
    "empty file": (b"", {}, ["train.csv: empty file"]),
    "head alone": (b"text,label\n", {}, ["train.csv: no rows"]),
    "missing column": (table(GOOD, "words,label"), {}, ["train.csv: no column text", "it has words, label", "columns"]),
    "one class": (table([(t, "good") for t, _ in GOOD]), {}, ["train.csv, column label: one class only, 'good'"]),
    "label out of range": (
        changed(3, ("x", "good")),
        {"held": [("a", "7")]},
        ["held.csv, row 2, column label: label '7'"],
    ),
    "broken UTF-8": (changed(3, ("caf\udce9", "bad")), {}, ["train.csv, row 5: byte 0xe9", "Save the file as UTF-8"]),
    "empty text": (changed(3, ("  ", "bad")), {}, ["train.csv, row 5, column text: empty"]),
    "ragged row": (changed(3, ("a,b", "bad")), {}, ["train.csv, row 5: 3 cells under 2"]),
    "open quote": (changed(3, ('"a', "bad")), {}, ["train.csv, row 5: a quote that opens here is never closed"]),
    "over-long row": (
        changed(3, ("word " * 99, "bad")),
        {"max_length": 32, "long_rows": "stop"},
        ["train.csv, row 5", "32 at most", "long_rows: truncate"],
    ),
    "held-out row": (
        changed(3, ("OTHER 4", "bad")),
        {},
        ["train.csv, row 5, column text: the same row is in validation: held.csv, row 6", "bad_rows: skip"],
    ),
    "no number": (
        table([(t, i) for i, (t, _) in enumerate(GOOD)][:-1] + [("x", "NaN")]),
        {"task": "regression", "held": [("a", "1.5")]},
        ["train.csv, row 41, column label: nan is no finite number"],
    ),
}


def write(path, content):
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_before_a_model_is_loaded(tmp_path, monkeypatch, fault):
    content, options, expected = FAULTS[fault]
    options = dict(options)
    held = table(options.pop("held", HELD))
    files = {"train": write(tmp_path / "train.csv", content), "validation": write(tmp_path / "held.csv", held)}
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    given = {"task": "sequence-classification", "model": "example:tiny-bert", "data": files, "out": tmp_path / "run"}
    for _ in range(2):  # what was refused once is no run that is in the way
        with pytest.raises(DataError) as raised:
            run.train(given | options)
        message = str(raised.value)
        assert all(words in message for words in expected), message
        assert [line.split(":")[0] for line in message.splitlines() if line[0] != " "] == ["given", "needed", "do"]


def test_the_same_faults_can_be_left_out(tmp_path):
    lines = table(GOOD) + b",good\nx,\na,b,c\n\xff,good\nOTHER 4,bad\n"
    files = {"train": write(tmp_path / "train.csv", lines), "validation": write(tmp_path / "held.csv", table(HELD))}
    given = dict(task="sequence-classification", model="example:tiny-bert", data=files, out=str(tmp_path / "run"))
    done = run.train(given, bad_rows="skip", steps=2, batch_size=4, device="cpu")
    result = json.loads((done.folder / "metrics.json").read_text())
    assert result["rows"]["train"] == 40
    assert any("train.csv: 5 rows of train left out" in note for note in result["notes"])
