"""Labelled sentences: the movie reviews of the demo, or the user's hub id, folder, CSV or JSONL file."""

from __future__ import annotations

import csv
import io
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_fast.errors import DataError, fail

TEXT_COLUMNS = ("text", "sentence", "review", "content", "review_body", "title")
LABEL_COLUMNS = ("label", "labels", "target", "class", "sentiment", "category")
TRAIN_STEMS = ("train", "training")
TEST_STEMS = ("test", "validation", "valid", "dev", "eval")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
MOST_CLASSES = 100
FEWEST_ROWS = 10

Row = tuple[str, str]  # text, label name


@dataclass(frozen=True)
class Task:
    """Texts and class ids to train on and to hold out; ``names[i]`` is class i.

    Without names the texts themselves are what is learned, and the ids mean nothing.
    """

    source: str
    names: list[str]
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]


def movie_reviews(path: Path, n_train: int = 4000, n_test: int = 1000) -> Task:
    """Rated movie-review sentences: the clearly good or bad ones."""
    rows = [(text, "positive" if score > 0 else "negative") for score, text in _rated(path) if abs(score) >= 0.5]
    return split("movie-review sentences", rows, [], n_train, n_test)


def movie_texts(path: Path, n_test: int) -> Task:
    """The same sentences, all of them and without their scores, for a language model."""
    rows = [(text, 0) for text, _ in _unique(((text, "") for _, text in _rated(path)), set())]
    return Task("movie-review sentences", [], rows[n_test:], rows[:n_test])


def _rated(path: Path) -> Iterator[tuple[float, str]]:
    """(mean score in -4 … 4, text) from lines of id, score and text."""
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        fields = line.split("\t", 2)
        try:
            score, text = float(fields[1]), fields[2].strip()
        except (IndexError, ValueError) as error:
            fail(
                DataError,
                f"{path}, row {number}: {line[:60]!r}",
                "id, score and text between tabs",
                f"delete {path}",
                error,
            )
        yield score, text


def load(
    source: str,
    text_column: str | None = None,
    label_column: str | None = None,
    n_train: int | None = None,
    n_test: int = 1000,
    network: bool = True,
) -> Task:
    """The user's data: a CSV, TSV or JSONL file, a folder of them or of a saved dataset, else a hub id."""
    path, columns = Path(source).expanduser(), (text_column, label_column)
    if path.is_file():
        return split(source, list(_file_rows(path, *columns)), [], n_train, n_test)
    if path.is_dir():
        train, test = _folder_rows(path, *columns)
    elif path.suffix in SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 1:
        fail(DataError, f"--data {source}", "a file or folder that exists, or a hub id", "correct the path")
    else:
        train, test = _dataset_rows(_hub(source, network), source, *columns)
    return split(source, train, test, n_train, n_test)


def split(source: str, train: list[Row], test: list[Row], n_train: int | None, n_test: int) -> Task:
    """De-duplicate (lower-cased), shuffle and hold out; the same rows at every seed, so that runs compare."""
    seen: set[str] = set()
    test = _unique(test, seen)  # first: a sentence in both splits stays held out
    train = _unique(train, seen)
    if len(train) + len(test) < FEWEST_ROWS:
        fail(
            DataError,
            f"{source}: {len(train) + len(test)} different labelled rows",
            f"{FEWEST_ROWS} or more",
            "pass more data",
        )
    if not test:
        held = min(n_test, max(1, len(train) // 5))
        test, train = train[:held], train[held:]
    train, test = train[:n_train], test[:n_test]
    names = sorted({label for _, label in train}, key=lambda name: (_number(name), name))
    _check_labels(source, names, train, test)
    ids = {name: i for i, name in enumerate(names)}
    return Task(source, names, [(t, ids[label]) for t, label in train], [(t, ids[label]) for t, label in test])


def _unique(rows: Iterable[Row], seen: set[str]) -> list[Row]:
    fresh = [(text, label) for text, label in rows if not (text.lower() in seen or seen.add(text.lower()))]
    random.Random(0).shuffle(fresh)
    return fresh


def _check_labels(source: str, names: list[str], train: list[Row], test: list[Row]) -> None:
    if not 2 <= len(names) <= MOST_CLASSES:
        some = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
        given = f"{source}: {len(names)} different labels in {len(train)} training rows ({some})"
        fail(
            DataError,
            given,
            f"2 to {MOST_CLASSES} classes",
            "name the column of classes with --label-column, or pass more rows",
        )
    unknown = Counter(label for _, label in test if label not in names)
    if unknown:
        label, count = unknown.most_common(1)[0]
        given = f"{source}: label {label!r} in {count} held-out row(s) and in no training row"
        fail(
            DataError,
            given,
            "held-out labels that the training rows have",
            "pass more rows, or remove that class",
        )


def _number(name: str) -> float:
    try:
        return float(name)
    except ValueError:
        return float("inf")


def _folder_rows(folder: Path, text_column: str | None, label_column: str | None) -> tuple[list[Row], list[Row]]:
    """train.* and test.* (or validation.*) files, one single data file, or a dataset saved to disk."""
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        datasets = _datasets(str(folder))
        return _dataset_rows(datasets.load_from_disk(str(folder)), str(folder), text_column, label_column)
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    train = [path for path in files if path.stem.lower() in TRAIN_STEMS] or (files if len(files) == 1 else [])
    test = [path for path in files if path.stem.lower() in TEST_STEMS]
    if not train:
        found = ", ".join(path.name for path in files[:5]) or "no data file"
        fail(
            DataError,
            f"--data {folder}: {found}",
            "train.csv, .tsv or .jsonl (and, if you like, test.*), one single such file, or a saved dataset",
            "rename the file, or pass it itself with --data",
        )
    columns = (text_column, label_column)
    return list(_file_rows(train[0], *columns)), [row for path in test[:1] for row in _file_rows(path, *columns)]


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        fail(
            DataError,
            f"{path}, row {line}: byte 0x{error.object[error.start]:02x}",
            "UTF-8 text",
            "save the file as UTF-8",
            error,
        )
    except OSError as error:
        fail(
            DataError,
            f"{path}: {error.strerror}",
            "a file that can be read",
            "check the path and its permissions",
            error,
        )


def _file_rows(path: Path, text_column: str | None, label_column: str | None) -> Iterator[Row]:
    records = _csv_records(path) if path.suffix in (".csv", ".tsv") else _json_records(path)
    text = label = None
    for where, record in records:
        if text is None:
            text = _column(where, record, text_column, TEXT_COLUMNS, "--text-column")
            label = _column(where, record, label_column, LABEL_COLUMNS, "--label-column")
        yield _text(where, text, record.get(text)), _label(where, label, record.get(label))
    if text is None:
        fail(DataError, f"{path}: no rows", "a row for each labelled text", "pass a file with data")


def _csv_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = io.StringIO(_read_text(path), newline="")
    reader = csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    done = 0  # lines of whole records: an error names the row it began in, not where it was noticed
    try:
        for record in reader:
            where = f"{path}, row {reader.line_num}"
            if None in record:
                names = len(reader.fieldnames)
                given = f"{where}: {names + len(record[None])} cells under {names} column names"
                do = "put quotes around texts that hold the separator"
                fail(DataError, given, "as many cells as column names", do)
            done = reader.line_num
            yield where, record
    except csv.Error as error:
        fail(DataError, f"{path}, row {done + 1}: {error}", "well-formed CSV", "correct that row", error)


def _json_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, row {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            fail(
                DataError,
                f"{where}: {line.strip()[:60]!r} ({error.msg})",
                "one JSON object a line",
                "correct that row",
                error,
            )
        if not isinstance(record, dict):
            fail(
                DataError,
                f"{where}: {line.strip()[:60]!r}",
                'one JSON object a line, {"text": …, "label": …}',
                "correct that row",
            )
        yield where, record


def _column(where: str, record: dict[str, Any], wanted: str | None, usual: tuple[str, ...], option: str) -> str:
    """The wanted column, else the first usual name the record has."""
    names = [name for name in ((wanted,) if wanted else usual) if name in record]
    if not names:
        have = ", ".join(str(name) for name in record if name is not None) or "none"
        fail(
            DataError,
            f"{where}: columns {have}",
            f"column {wanted or ' or '.join(usual)}",
            f"name the column with {option}",
        )
    return names[0]


def _text(where: str, column: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        fail(
            DataError,
            f"{where}, column {column}: {value!r}",
            "a text that is not empty",
            "fill the cell or remove the row",
        )
    return value.strip()


def _label(where: str, column: str, value: Any) -> str:
    if value is None or isinstance(value, (dict, list)) or value != value or not str(value).strip():
        fail(
            DataError,
            f"{where}, column {column}: {value!r}",
            "one class name or number",
            "fill the cell or remove the row",
        )
    return str(value).strip()


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        fail(
            DataError,
            f"--data {source}",
            "the package datasets",
            "pip install datasets, or pass a CSV or JSONL file",
            error,
        )
    return datasets


def _hub(source: str, network: bool) -> Any:
    """A dataset by its hub id, ``owner/name`` or ``owner/name:config``."""
    datasets = _datasets(source)
    name, _, config = source.partition(":")
    try:
        mode = datasets.DownloadConfig(local_files_only=not network, max_retries=1)
        return datasets.load_dataset(name, config or None, download_config=mode)
    except Exception as error:  # the hub's errors have no common base
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        fail(
            DataError,
            f"--data {source}: {reason}",
            "a dataset the hub or its cache has",
            "check the id and the network, or pass a file",
            error,
        )


def _dataset_rows(
    found: Any, source: str, text_column: str | None, label_column: str | None
) -> tuple[list[Row], list[Row]]:
    splits = found if isinstance(found, dict) else {"train": found}
    train = next((splits[name] for name in (*TRAIN_STEMS, *splits) if name in splits), None)
    test = next((splits[name] for name in TEST_STEMS if name in splits and splits[name] is not train), None)

    def rows(part: Any) -> Iterator[Row]:
        text = _column(source, part.features, text_column, TEXT_COLUMNS, "--text-column")
        label = _column(source, part.features, label_column, LABEL_COLUMNS, "--label-column")
        names = getattr(part.features[label], "names", None)
        for number, (x, y) in enumerate(zip(part[text], part[label], strict=True), 1):
            if names and y == -1:  # how the hub marks a hidden label
                fail(
                    DataError,
                    f"{source}, row {number}, column {label}: -1",
                    "a public label",
                    "name another split's data or pass a file",
                )
            where = f"{source}, row {number}"
            yield _text(where, text, x), names[y] if names else _label(where, label, y)

    return list(rows(train)), list(rows(test)) if test is not None else []
