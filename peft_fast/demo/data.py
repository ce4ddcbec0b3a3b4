"""Labelled sentences: the movie reviews of the demo, or the user's hub id, folder, CSV or JSONL file."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from peft_fast.errors import DataError, fail
from peft_fast.recipes import columns, sources, tasks
from peft_fast.recipes.config import Config
from peft_fast.recipes.examples.text import rated
from peft_fast.recipes.files import Table, Unreadable
from peft_fast.recipes.splits import listed
from peft_fast.recipes.tasks import Column, Problem

MOST_CLASSES = 100
FEWEST_ROWS = 10

Row = tuple[str, str]  # text, label name


class _Task(tasks.Task):
    columns = (
        Column("text", "text", ("sentence", "review", "content", "review_body", "title")),
        Column("label", "label", ("labels", "target", "class", "sentiment", "category")),
    )


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
    rows = [(text, "positive" if score > 0 else "negative") for score, text in rated(path) if abs(score) >= 0.5]
    return split("movie-review sentences", rows, [], n_train, n_test)


def movie_texts(path: Path, n_test: int) -> Task:
    """The same sentences, all of them and without their scores, for a language model."""
    rows = [(text, 0) for text, _ in _unique(((text, "") for _, text in rated(path)), set())]
    return Task("movie-review sentences", [], rows[n_test:], rows[:n_test])


def load(
    source: str,
    text_column: str | None = None,
    label_column: str | None = None,
    n_train: int | None = None,
    n_test: int = 1000,
    network: bool = True,
) -> Task:
    """The user's data: a CSV, TSV or JSONL file, a folder of them or of a saved dataset, else a hub id."""
    name, _, subset = (source, "", "") if Path(source).expanduser().exists() else source.partition(":")
    config = Config(task="sequence-classification", model="-", data=name, subset=subset or None, network=network)
    tables = sources.tables(name, _Task(config))
    given = {role: column for role, column in (("text", text_column), ("label", label_column)) if column}
    held = tables.get("test") or tables.get("validation") or []
    return split(source, _rows(tables["train"], given), _rows(held, given), n_train, n_test)


def _rows(tables: list[Table], given: dict[str, str]) -> list[Row]:
    """Text and label of every row. Raises DataError with all rows that lack one."""
    rows: list[Row] = []
    wrong: list[Problem] = []
    for table in tables:
        wrong += table.problems
        if not table.names:
            continue
        try:
            roles = columns.assign(table, _Task.columns, given)
        except Unreadable as error:
            need = " and ".join(f"a column {given.get(column.role, column.role)}" for column in _Task.columns)
            do = "name the columns with --text-column and --label-column"
            fail(DataError, error.problem.place + f": columns {', '.join(table.names)}", need, do, error)
        cells = []
        for column in _Task.columns:
            made, bad = columns.convert(table, column, roles[column.role])
            cells.append(made)
            name = roles[column.role]
            wrong += [Problem(table.file, table.rows[i], name, one.what, one.fix) for i, one in bad.items()]
        rows += [(text.strip(), label) for text, label in zip(*cells, strict=True) if text and label]
    if wrong:
        fail(DataError, listed(wrong), "a text and a label in every row", "mend these rows, or pass other data")
    return rows


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
