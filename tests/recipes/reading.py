"""Rows as files of every kind, and a task that reads them: for the tests of data and checks."""

import csv
import json

import pytest

from peft_fast.errors import DataError
from peft_fast.recipes import config, data, tasks
from peft_fast.recipes.tasks import Column

TEXT, LABEL = Column("text", "text", ("sentence", "review")), Column("label", "label", ("target", "class"))
PAIR = Column("text_pair", "text", ("hypothesis",), required=False)
ROWS = [(f"sentence number {i}", "good" if i % 3 else "bad") for i in range(60)]


def task(*columns, **options):
    given = {"task": "sequence-classification", "model": "-", "data": "-"} | options
    made = tasks.Task(config.read(given))
    made.columns = columns or (TEXT, PAIR, LABEL)
    return made


def read(source, *columns, **options):
    made = task(*columns, data=source if isinstance(source, dict) else str(source), **options)
    return data.read(made.config, made)


def write_csv(path, rows=ROWS, head=("text", "label"), **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **how).writerows([head, *rows])
    return path


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def pairs(splits):
    return sorted((row["text"], row["label"]) for rows in splits.values() for row in rows)


def problems(splits):
    return [str(problem) for problem in splits.problems]


def refused(source, *columns, **options):
    with pytest.raises(DataError) as raised:
        read(source, *columns, **options)
    message = str(raised.value)
    assert message.startswith("given: ") and "\nneeded: " in message and "\ndo: " in message
    return message


def picture(path, shade, size=8):
    Image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Image.new("RGB", (size, size), (shade, shade, shade))
    if size > 8:  # so much that half of the file is more than its head
        made = Image.effect_noise((size, size), 50).convert("RGB")
    made.save(path)
    return path
