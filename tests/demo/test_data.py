"""Rows of every accepted kind of file, the split, and what a wrong file is told."""

import csv
import json

import pytest

from peft_fast.demo import data
from peft_fast.errors import DataError
from peft_fast.recipes import fetch

from .conftest import sentences

ROWS = sentences(40)


def write_csv(path, rows, head=("text", "label"), delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([head, *rows])
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows), encoding="utf-8")
    return path


def everything(task):
    return sorted((text, task.names[y]) for text, y in task.train + task.test)


def test_movie_reviews_keep_clear_ratings_once(tmp_path):
    lines = [f"{i}\t{1.5 if i % 2 else -1.5}\tsentence number {i}" for i in range(1, 31)]
    lines += ["31\t0.49\ttoo weak", "32\t-0.5\tjust strong enough", "33\t2.0\tSENTENCE number 1", ""]
    path = tmp_path / "movies.tsv"
    path.write_text("\r\n".join(lines), encoding="utf-8")
    task = data.movie_reviews(path, n_train=100, n_test=10)
    assert task.names == ["negative", "positive"]
    texts = [text for text, _ in task.train + task.test]
    assert len(texts) == len({text.lower() for text in texts}) == 31
    assert "too weak" not in texts and len(task.test) == 6
    labels = dict(task.train + task.test)
    assert labels["just strong enough"] == 0 and labels["sentence number 1"] == 1


def test_movie_reviews_of_the_pinned_file(pinned):
    task = data.movie_reviews(pinned(fetch.MOVIES) / "movie-reviews.tsv")
    assert (len(task.train), len(task.test)) == (4000, 1000)
    assert not {t.lower() for t, _ in task.train} & {t.lower() for t, _ in task.test}
    assert 0.45 < sum(y for _, y in task.test) / 1000 < 0.55


def test_movie_texts_are_all_sentences_once(tmp_path):
    path = tmp_path / "movies.tsv"
    path.write_text("\n".join(f"{i}\t0.1\tSentence {i % 20}" for i in range(40)) + "\n41\t2\tsentence 3\n")
    task = data.movie_texts(path, n_test=5)
    assert task.names == [] and (len(task.train), len(task.test)) == (15, 5)
    assert {text for text, _ in task.train + task.test} == {f"Sentence {i}" for i in range(20)}
    assert data.movie_texts(path, n_test=5) == task


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "bom"])
def test_files(tmp_path, kind):
    if kind == "jsonl":
        path = write_jsonl(tmp_path / "d.jsonl", ROWS)
    else:
        suffix, delimiter = ("tsv", "\t") if kind == "tsv" else ("csv", ",")
        path = write_csv(tmp_path / f"d.{suffix}", ROWS, delimiter=delimiter)
    if kind == "bom":
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    task = data.load(str(path))
    assert everything(task) == sorted(ROWS)
    assert (len(task.train), len(task.test)) == (32, 8)


def test_text_with_newlines_separators_and_quotes(tmp_path):
    odd = 'line one\nline "two", three\u2028four'
    task = data.load(str(write_csv(tmp_path / "d.csv", [*ROWS, (odd, "positive")])))
    assert (odd, "positive") in everything(task)


def test_named_columns_and_numeric_labels_in_order(tmp_path):
    rows = [(f"text {i}", i % 3 * 5, "noise") for i in range(60)]
    path = write_csv(tmp_path / "d.csv", rows, head=("body", "stars", "text"))
    task = data.load(str(path), text_column="body", label_column="stars")
    assert task.names == ["0", "5", "10"]
    assert ("text 1", "5") in everything(task)


def test_folder_with_splits_keeps_shared_sentences_held_out(tmp_path):
    write_csv(tmp_path / "train.csv", ROWS)
    write_jsonl(tmp_path / "test.jsonl", [(ROWS[0][0].upper(), ROWS[0][1]), *sentences(50)[-9:]])
    task = data.load(str(tmp_path))
    held = {text.lower() for text, _ in task.test}
    assert ROWS[0][0] in held and not held & {text.lower() for text, _ in task.train}


def test_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    labels = datasets.ClassLabel(names=["bad", "fine"])
    columns = {"sentence": [t for t, _ in ROWS], "label": [i % 2 for i in range(len(ROWS))]}
    features = datasets.Features({"sentence": datasets.Value("string"), "label": labels})
    rows = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": rows, "validation": rows.select(range(5))}).save_to_disk(tmp_path / "d")
    task = data.load(str(tmp_path / "d"))
    assert (task.names, len(task.train), len(task.test)) == (["bad", "fine"], len(ROWS) - 5, 5)


def test_limits_and_the_same_split_every_time(tmp_path):
    path = str(write_csv(tmp_path / "d.csv", ROWS))
    a, b = data.load(path, n_train=10, n_test=4), data.load(path, n_train=10, n_test=4)
    assert a == b and (len(a.train), len(a.test)) == (10, 4)


GOOD = "text,label\n" + "\n".join(f"{t},{y}" for t, y in ROWS) + "\n"
BAD = {
    "missing.csv": (None, "missing.csv: no such file or folder", "Correct the path"),
    "empty.csv": ("", "empty.csv: empty file", "file with rows"),
    "head.csv": ("text,label\n", "head.csv: no rows", "row"),
    "columns.csv": ("a,b\n1,2\n", "columns.csv: columns a, b", "--text-column"),
    "cell.csv": (GOOD + ",negative\n", "cell.csv, row 42, column text: empty", "cell"),
    "label.csv": (GOOD + "fine\n", "label.csv, row 42: 1 cell under 2", "Fill the row"),
    "wide.csv": (GOOD + "a,b,c,d\n", "wide.csv, row 42: 4 cells under 2", "quotes"),
    "quote.csv": (GOOD + '"open,negative\n', "quote.csv, row 42: a quote that opens here is never closed", "twice"),
    "latin.csv": (GOOD.encode() + b"caf\xe9,negative\n", "latin.csv, row 42: byte 0xe9", "UTF-8"),
    "few.csv": ("text,label\na,x\nb,y\n", "few.csv: 2 different", "10 or more"),
    "one.csv": ("text,label\n" + "\n".join(f"t{i},x" for i in range(30)), "1 different labels", "2 to 100"),
    "real.csv": (
        "text,label\n" + "\n".join(f"t{i},{i / 7}" for i in range(300)),
        "different labels",
        "--label-column",
    ),
    "broken.jsonl": ('{"text": "a", "label": 1}\n{"text": \n', "broken.jsonl, row 2", "JSON object"),
    "list.jsonl": ('["a", 1]\n', "list.jsonl, row 1", "JSON object"),
    "number.jsonl": (
        '{"text": 3, "label": 1}\n',
        "number.jsonl, row 1, column text: a number instead of a text: 3",
        "quotes",
    ),
    "null.jsonl": ('{"text": "a", "label": null}\n', "null.jsonl, row 1, column label: empty", "cell"),
    "nan.jsonl": ('{"text": "a", "label": NaN}\n', "nan.jsonl, row 1, column label: empty", "cell"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_told_where_and_what(tmp_path, name):
    content, given, hint = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as raised:
        data.load(str(tmp_path / name))
    message = str(raised.value)
    assert given in message and hint in message
    assert [line.partition(":")[0] for line in message.splitlines()] == ["given", "needed", "do"]


def test_folder_without_data_and_unknown_hub_id(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match="no data file"):
        data.load(str(tmp_path))
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="data somebody/nothing"):
        data.load("somebody/nothing", network=False)


def test_held_out_label_that_was_never_trained(tmp_path):
    write_csv(tmp_path / "train.csv", ROWS)
    write_csv(tmp_path / "test.csv", [("another one", "mixed")])
    with pytest.raises(DataError, match="'mixed'"):
        data.load(str(tmp_path))
