"""All that is wrong with rows is said at once, and bad rows are left out where the config wants that."""

import random

import pytest

from peft_fast.errors import DataError
from peft_fast.recipes import checks, data
from peft_fast.recipes.splits import LISTED
from peft_fast.recipes.tasks import Column, Problem

from .reading import ROWS, TEXT, picture, task, write_csv, write_jsonl


def write(folder, **splits):
    """{split: file} of lists of (text, label), or of whole files."""
    found = {}
    for split, rows in splits.items():
        path = folder / f"{split}.csv"
        path.write_bytes(rows) if isinstance(rows, bytes) else write_csv(path, rows)
        found[split] = str(path)
    return found


def run(source, *columns, made=None, learnt=None, **options):
    made = made or task(*columns, data=source if isinstance(source, dict) else str(source), **options)
    splits = data.read(made.config, made)
    made.learn = lambda splits: learnt is not None and learnt.append({k: len(v) for k, v in splits.items()})
    return checks.run(splits, made, made.config)


def refused(source, *columns, **options):
    with pytest.raises(DataError) as raised:
        run(source, *columns, **options)
    return str(raised.value)


HELD = [(f"held out {i}", "good" if i % 2 else "bad") for i in range(10)]


def test_good_rows_pass_untouched(tmp_path):
    splits, notes = run(write(tmp_path, train=ROWS, validation=HELD))
    assert [(row["text"], row["label"]) for row in splits["train"]] == ROWS and notes == []


BAD = b"""text,label
fine so far,good
,good
   ,bad
no label,
three,cells,here
caf\xe9,good
"quoted, with a
newline",bad
after that,unheard
fine so far,bad
"""


def test_every_problem_is_named_with_file_row_column_and_fix(tmp_path):
    message = refused(write(tmp_path, train=ROWS, validation=BAD))
    given, do = message.partition("\nneeded: ")[0], message.splitlines()[-1]
    lines = [line.strip() for line in given.splitlines()[1:]]
    assert lines == [
        "validation.csv, row 3, column text: empty. Fill the cell, or remove the row",
        "validation.csv, row 4, column text: empty, only blanks. Fill the cell, or remove the row",
        "validation.csv, row 5, column label: empty. Fill the cell, or remove the row",
        "validation.csv, row 6: 3 cells under 2 column names. Put quotes around cells that hold the separator",
        "validation.csv, row 7: byte 0xe9 at offset 72 of the file is no UTF-8. "
        "Save the file as UTF-8 (it may be Latin-1 or Windows-1252)",
        "validation.csv, row 10, column label: label 'unheard' is in no training row (those have bad, good). "
        "Correct it, or train on rows of that class",
    ]
    assert BAD[72] == 0xE9 and given.startswith("given: 6 problems") and "bad_rows: skip" in do


def test_bad_rows_are_left_out_and_counted(tmp_path):
    learnt = []
    splits, notes = run(write(tmp_path, train=ROWS, validation=BAD), bad_rows="skip", learnt=learnt)
    assert list(splits["validation"]["text"]) == ["fine so far", "quoted, with a\nnewline", "fine so far"]
    assert any("validation.csv: 6 rows of validation left out" in note and "text, empty: 1" in note for note in notes)
    assert learnt == [{"train": 60, "validation": 3}]


def test_nothing_that_is_left(tmp_path):
    message = refused(write(tmp_path, train=ROWS, validation=[("new", "x"), ("newer", "y")]), bad_rows="skip")
    assert "validation.csv: no row is left" in message and "label 'x' is in no training row" in message
    few = [("a", "good"), ("held out 3", "bad")]
    assert "one class only, 'good'" in refused(write(tmp_path, train=few, validation=HELD), bad_rows="skip")


@pytest.mark.parametrize("train", [HELD, [("", "good"), (" ", "bad")]], ids=["held out", "empty"])
def test_what_is_done_already_is_not_advised(tmp_path, train):
    files = write(tmp_path, train=train, validation=HELD)
    message = refused(files, bad_rows="skip")
    assert "train.csv, row 2, column text: " in message and "bad_rows" not in message
    assert message.splitlines()[-1].startswith("do: mend the data")


def test_only_the_first_problems_are_listed_and_all_are_counted(tmp_path):
    rows = [("", "good")] * 100 + [(f"text {i}", "") for i in range(30)]
    message = refused(write(tmp_path, train=[*ROWS, *rows], validation=HELD))
    assert "given: 130 problems:" in message and message.count("train.csv, row") == LISTED
    assert "and 80 more in train.csv: text, empty" in message and "and 30 more in train.csv: label, empty" in message


# ---- classes


@pytest.mark.parametrize(
    "label, fix",
    [("Good", "Write 'good'"), ("1", "Write the class's name instead of its number"), ("-1", "instead of its number")],
)
def test_labels_that_training_never_sees(tmp_path, label, fix):
    message = refused(write(tmp_path, train=ROWS, validation=[*HELD, ("new", label)]))
    assert f"validation.csv, row 12, column label: label '{label}'" in message and fix in message


def test_names_where_training_has_numbers(tmp_path):
    rows = [(text, str(i % 3)) for i, (text, _) in enumerate(ROWS)]
    held = [(f"other {i}", str(i % 3)) for i in range(3)] + [("new", "good"), ("newer", "7")]
    message = refused(write(tmp_path, train=rows, validation=held))
    assert "those have 0, 1, 2). Write the class's number instead of its name" in message
    assert "row 6, column label: label '7' is in no training row" in message


def test_one_class_only(tmp_path):
    rows = [(text, "good") for text, _ in ROWS]
    message = refused(write(tmp_path, train=rows, validation=HELD[1::2]))
    assert "train.csv, column label: one class only, 'good', in 60 rows. Add rows of another class" in message
    assert "bad_rows" not in message
    assert "one class only" in refused(write(tmp_path, train=rows), bad_rows="skip")
    assert "one class only, 'good', in 54 training rows. Add" in refused(write(tmp_path, train=rows))  # 6 are held out
    held = [*HELD, ("", "good")]  # a bad row elsewhere
    assert "one class only, 'good', in 1 row. Add" in refused(write(tmp_path, train=rows[:1], validation=held))


def test_a_column_that_holds_no_classes(tmp_path):
    rows = [(text, f"{i / 7:.3f}") for i, (text, _) in enumerate(ROWS)]
    message = refused(write(tmp_path, train=rows, validation=rows[:1]))
    assert "60 different classes in 60 rows" in message and "task regression" in message
    message = refused(write(tmp_path, train=[*rows, ("", "1")]))  # not one can be held out, which more rows do not mend
    assert "given: 2 problems:\n  train.csv, column label: 60 different classes in 60 rows" in message
    assert "task regression" in message and "train.csv, row 62, column text: empty" in message
    assert "held out" not in message and "hold out" not in message


GOOD, BROKEN = {"text": "a", "label": "x"}, {"text": "b"}


@pytest.mark.parametrize("validation", [{}, {"validation": [GOOD | {"text": "c"}]}], ids=["held out", "given"])
def test_bad_rows_stand_before_what_follows_of_them(tmp_path, validation):
    splits = {"train": [GOOD, BROKEN, BROKEN]} | validation
    files = {split: str(write_jsonl(tmp_path / f"{split}.jsonl", rows)) for split, rows in splits.items()}
    given = refused(files).partition("\nneeded: ")[0]
    assert [line.strip()[:34] for line in given.splitlines()[1:]] == [
        "train.jsonl, row 2, column label: ",
        "train.jsonl, row 3, column label: ",
    ]


@pytest.mark.parametrize(
    "rows, told",
    [
        ([("a", "x"), ("b", "y")], "none of 2 rows can be held out: of each label there is one"),
        ([("a", "x"), ("A", "x")], "'x', in 2 rows"),
    ],
)
def test_too_few_to_hold_out(tmp_path, rows, told):
    assert told in refused(write(tmp_path, train=rows))
    texts = [(text,) for text in ("a", "a")]
    path = write_csv(tmp_path / "d.csv", texts, head=("text",))
    assert "given: d.csv: none of 2 rows can be held out: they are alike" in refused(path, TEXT, task="masked-lm")
    path = write_csv(tmp_path / "d.csv", texts[:1], head=("text",))
    assert "given: d.csv: one row: none can be held out" in refused(path, TEXT, task="masked-lm")
    test = write_csv(tmp_path / "test.csv", [("b",), ("",)], head=("text",))  # a bad row elsewhere is not the reason
    for rule in ("stop", "skip"):
        told = refused({"train": str(path), "test": str(test)}, TEXT, task="masked-lm", bad_rows=rule)
        assert "given: d.csv: one row: none can be held out" in told


def test_classes_that_look_alike_are_said(tmp_path):
    rows = [*ROWS, ("a", "Good"), ("b", "Good"), ("c", "1"), ("d", "1")]
    _, notes = run(write(tmp_path, train=rows, validation=HELD))
    assert any("'good' and 'Good' differ in case alone" in note for note in notes)
    assert any("numbers (1) and names (bad, good, Good) are both classes" in note for note in notes)


def test_a_number_that_never_changes(tmp_path):
    number = Column("target", "number")
    path = write_csv(tmp_path / "d.csv", [(text, 3) for text, _ in ROWS], head=("text", "target"))
    message = refused(path, Column("text", "text"), number, task="regression")
    assert "d.csv, column target: every value is 3.0" in message


# ---- rows that are alike


def test_training_rows_that_are_held_out_too(tmp_path):
    train = [*ROWS, ("  HELD   out 3", "good"), ("In test", "bad")]
    files = write(tmp_path, train=train, validation=HELD, test=[("in TEST", "bad"), ("x", "good")])
    message = refused(files)
    assert "given: 2 problems" in message
    assert (
        "train.csv, row 62, column text: the same row is in validation: validation.csv, row 5. "
        "Remove it from one of them, or leave it out of training with bad_rows: skip" in message
    )
    assert "train.csv, row 63, column text: the same row is in test: test.csv, row 2" in message
    splits, notes = run(files, bad_rows="skip")
    assert list(splits["train"]["text"]) == [text for text, _ in ROWS] and len(splits["validation"]) == 10
    assert any("train.csv: 2 rows of train left out" in note for note in notes)


def test_rows_that_training_has_twice_are_said(tmp_path):
    train = [*ROWS, ("Sentence number 4", "good"), ("sentence  number 5", "bad")]
    splits, notes = run(write(tmp_path, train=train, validation=[*HELD, HELD[0]]))
    assert len(splits["train"]) == 62
    assert "train.csv: 1 row more than once; the first is row 62, as row 6" in notes
    assert "train.csv: 1 row more than once with another answer; the first is row 63, as row 7" in notes
    assert any("validation.csv: 1 row of validation twice" in note for note in notes)


def test_what_is_compared_are_the_inputs_and_texts_that_are_learnt(tmp_path):
    roles = Column("source", "text"), Column("target", "text", truth=True)
    train = [{"source": f"s{i}", "target": f"t{i}"} for i in range(20)]
    files = {"train": str(write_jsonl(tmp_path / "a.jsonl", train))}
    files["validation"] = str(write_jsonl(tmp_path / "b.jsonl", [{"source": "s1", "target": "other"}]))
    run(files, *roles, task="translation")
    write_jsonl(tmp_path / "b.jsonl", [{"source": "S1", "target": "t1 "}])
    assert "a.jsonl, row 2, column source" in refused(files, *roles, task="translation")
    roles = Column("question", "text"), Column("context", "text"), Column("answers", "answers")
    train = [{"question": f"q{i}", "context": "one town", "answers": "town"} for i in range(20)]
    write_jsonl(tmp_path / "a.jsonl", train)
    write_jsonl(tmp_path / "b.jsonl", [{"question": "other", "context": "one town", "answers": "town"}])
    run(files, *roles, task="question-answering")


def test_columns_that_are_empty_in_some_rows_are_compared(tmp_path):
    roles = Column("messages", "messages", required=False), Column("text", "text", required=False)
    rows = [{"text": f"text {i}", "messages": None if i % 2 else [{"role": "user", "content": "hi"}]} for i in range(9)]
    files = {"train": str(write_jsonl(tmp_path / "a.jsonl", rows))}
    files["validation"] = str(write_jsonl(tmp_path / "b.jsonl", rows[3:4]))
    assert "a.jsonl, row 4, column messages" in refused(files, *roles, task="causal-lm")


def test_series_may_overlap(tmp_path):
    made = task(task="time-series", data=write(tmp_path, train=ROWS, validation=ROWS[:5]))
    made.modality = "series"
    splits, _ = run(None, made=made)
    assert len(splits["train"]) == 60


# ---- long rows, a task's own problems


def long_task(files, **options):
    made = task(data=files, **options)
    made.too_long = lambda rows: ([len(text) for text in rows["text"]], 20)
    return made


def test_long_rows_are_cut_skipped_or_refused(tmp_path):
    train = [*ROWS, ("x" * 21, "good"), ("y" * 30, "bad")]
    files = write(tmp_path, train=train, validation=HELD)
    splits, notes = run(None, made=long_task(files))
    assert len(splits["train"]) == 62
    assert notes == ["train.csv: 2 of 62 rows of train are longer than 20 tokens and are cut (row 63 has 30)"]
    splits, notes = run(None, made=long_task(files, long_rows="skip"))
    assert list(splits["train"]["text"]) == [text for text, _ in ROWS]
    assert notes == ["train.csv: 2 of 62 rows of train are longer than 20 tokens and are left out"]
    message = refused(None, made=long_task(files, long_rows="stop"))
    assert "train.csv, row 62: 21 tokens, 20 at most" in message and "row 63: 30 tokens" in message
    splits, _ = run(None, made=long_task(files, long_rows="stop", bad_rows="skip"))
    assert len(splits["train"]) == 60


def test_a_tasks_own_problems_count_with_the_others(tmp_path):
    made = task(data=write(tmp_path, train=ROWS, validation=[*HELD, ("", "good")]), long_rows="skip", bad_rows="skip")
    made.too_long = lambda rows: ([place == 0 for place in range(len(rows))], 0)

    def check(splits):
        yield Problem("train.csv", 4, "text", "odd", "Mend it", index=2, split="train")
        yield Problem("train.csv", 5, "text", "rare", "Look at it", stops=False)
        yield Problem("train.csv", 6, "text", "rare", "Look at it", stops=False)

    made.check = check
    splits, notes = run(None, made=made)
    assert list(splits["train"]["row"]) == [3, *range(5, 62)] and len(splits["validation"]) == 9
    assert "train.csv, row 5, column text: rare. Look at it (and 1 more)" in notes
    made = task(data=write(tmp_path, train=ROWS, validation=HELD), long_rows="skip")
    made.too_long = lambda rows: ([place == 0 for place in range(len(rows))], 0)
    made.check = lambda splits: iter([Problem("train.csv", 2, "text", "odd", "Mend it", index=0, split="train")])
    assert len(run(None, made=made)[0]["train"]) == 59  # a row left out for its length needs no mending
    made.check = lambda splits: iter([Problem("train.csv", None, None, "hopeless", "Pass another", index=None)])
    assert "train.csv: hopeless" in refused(None, made=made)


def test_pictures_that_cannot_be_read(tmp_path):
    draw = random.Random(0)
    for name in ("a.png", "b.png", "c.jpg", "d.jpg", "e.gif", "good.png", "good.jpg"):
        picture(tmp_path / name, draw.randrange(255), 64)
    for name in ("a.png", "c.jpg"):
        raw = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(raw[: len(raw) // 2])
    raw = bytearray((tmp_path / "b.png").read_bytes())
    raw[60] ^= 255
    (tmp_path / "b.png").write_bytes(raw)
    (tmp_path / "e.gif").write_text("no picture")
    names = ["a.png", "b.png", "c.jpg", "d.jpg", "e.gif", "good.png", "good.jpg"]
    write_csv(tmp_path / "d.csv", [(name, "xy"[i % 2]) for i, name in enumerate(names)], head=("image", "label"))
    write_csv(tmp_path / "v.csv", [(tmp_path / "good.png", "x")], head=("image", "label"))
    files = {"train": str(tmp_path / "d.csv"), "validation": str(tmp_path / "v.csv")}
    roles = Column("image", "image"), Column("label", "label")
    message = refused(files, *roles, task="image-classification")
    for row, name in ((2, "a.png"), (3, "b.png"), (4, "c.jpg"), (6, "e.gif")):
        assert f"d.csv, row {row}, column image: {name} cannot be read" in message
    assert "row 7, column image: the same row is in validation" in message
    assert "d.jpg" not in message and "given: 5 problems" in message
    splits, _ = run(files, *roles, task="image-classification", bad_rows="skip")
    assert [row["image"].split("/")[-1] for row in splits["train"]] == ["d.jpg", "good.jpg"]


def test_a_hundred_thousand_rows_are_looked_at_once(tmp_path, monkeypatch):
    """Work per row must not grow with their number: no row is read from its dataset one by one."""
    import datasets

    rows = [(f"text {i}", "ab"[i % 2]) for i in range(3000)]
    asked = []
    real = datasets.Dataset.__getitem__
    monkeypatch.setattr(
        datasets.Dataset, "__getitem__", lambda self, key: asked.append(key) or real(self, key), raising=True
    )
    run(write(tmp_path, train=rows))
    assert len(asked) < 100
