"""Files to tables: CSV, TSV, JSON, JSON lines, text, ARFF, CoNLL and parquet, and where each of their rows stands.

A row that cannot be read is a Problem and left out, so that all of a file's are known at once. A file that cannot be
read at all raises Unreadable.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from peft_fast.recipes.tasks import Problem

HEADS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"PK": "a zip archive or Excel sheet", b"\x1f\x8b": "gzip"}
SHOWN = 60  # characters of a broken line that a message quotes


class Unreadable(Exception):
    """A whole file, with its Problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def unreadable(file: str, what: str, fix: str, row: int | None = None, cause: BaseException | None = None) -> NoReturn:
    raise Unreadable(Problem(file, row, None, what, fix)) from cause


@dataclasses.dataclass
class Table:
    """Rows of one file or dataset: ``names`` of its columns, ``rows[i]`` the line or number of row i, from 1.

    ``column(name)`` gives a column's values, ``features`` what a dataset knows of it, ``dataset`` itself if it is one.
    """

    file: str
    names: list[str]
    rows: Sequence[int]
    column: Callable[[str], list[Any]]
    base: Path = Path()
    problems: list[Problem] = dataclasses.field(default_factory=list)
    features: dict[str, Any] = dataclasses.field(default_factory=dict)
    dataset: Any = None

    def __len__(self) -> int:
        return len(self.rows)


def of_records(file: str, records: list[dict[str, Any]], rows: Sequence[int], base: Path = Path()) -> Table:
    """A table of dicts; what one of them lacks is None."""
    names = list(dict.fromkeys(name for record in records for name in record))
    return Table(file, names, rows, lambda name: [record.get(name) for record in records], base)


def of_lists(file: str, columns: dict[str, list[Any]], rows: Sequence[int] | None = None, base: Path = Path()) -> Table:
    length = len(next(iter(columns.values()), ()))
    return Table(file, list(columns), range(1, length + 1) if rows is None else rows, columns.__getitem__, base)


def of_dataset(file: str, rows: Any, base: Path = Path()) -> Table:
    """A table of a datasets.Dataset; pictures and recordings stay encoded."""
    import datasets

    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image | datasets.Audio) and feature.decode:
            rows = rows.cast_column(name, type(feature)(decode=False))
    table = rows.with_format("arrow")

    def column(name: str) -> list[Any]:
        return table[:][name].to_pylist()

    return Table(
        file, list(rows.column_names), range(1, len(rows) + 1), column, base, [], dict(rows.features), dataset=rows
    )


def read(path: Path, file: str | None = None) -> Table:
    """The table of a file by its suffix; ``file`` is its name in messages."""
    file = file or path.name
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(sorted(READERS))
        unreadable(file, f"a {path.suffix or 'nameless'} file", f"Pass one of {known}, or a folder of them")
    try:
        if path.stat().st_size == 0:
            unreadable(file, "empty file, 0 bytes", "Pass a file with rows")
        table = reader(path, file)
    except OSError as error:
        reason = error.strerror or str(error)
        unreadable(file, reason, "Check the path and its permissions", cause=error)
    if not len(table) and not table.problems:
        unreadable(file, "no rows", "Pass a file with rows")
    return table


class _Text:
    """A file's text and what lines of it are not UTF-8."""

    def __init__(self, path: Path, file: str) -> None:
        raw = path.read_bytes()
        for head, kind in HEADS.items():
            if raw.startswith(head):
                unreadable(file, f"{kind}, no UTF-8 text", "Save it as UTF-8 text")
        self.file = file
        self.broken: dict[int, Problem] = {}
        try:
            self.text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            self._find(raw)
            self.text = raw.decode("utf-8-sig", "replace")
        self.text = self.text.replace("\r\n", "\n").replace("\r", "\n")

    def _find(self, raw: bytes) -> None:
        start = 0
        for number, line in enumerate(re.split(rb"(?<=\n)|(?<=\r)(?!\n)", raw), 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                what = f"byte 0x{line[error.start]:02x} at offset {start + error.start:,} of the file is no UTF-8"
                fix = "Save the file as UTF-8 (it may be Latin-1 or Windows-1252)"
                self.broken[number] = Problem(self.file, number, None, what, fix)
            start += len(line)

    def take(self, first: int, last: int) -> Problem | None:
        """The problem of the lines from first to last."""
        if not self.broken:
            return None
        return next((self.broken[line] for line in range(first, last + 1) if line in self.broken), None)


def _csv(path: Path, file: str) -> Table:
    text = _Text(path, file)
    head = text.text.partition("\n")[0]
    delimiter = "\t" if path.suffix.lower() in (".tsv", ".tab") else _delimiter(head)
    problems: list[Problem] = []
    lines = list(_records(text, delimiter, problems))
    if not lines:
        return Table(file, [], (), lambda name: [], path.parent, problems)
    number, names = lines[0]
    if problems and problems[0].row < number:  # the line of names: the next one is none
        raise Unreadable(problems[0])
    names = [name.strip() for name in names]
    while names and not names[-1] and all(len(cells) < len(names) or not cells[-1] for _, cells in lines[1:]):
        names.pop()  # every line ends with a separator
    twice = [name for name in dict.fromkeys(names) if name and names.count(name) > 1]
    if twice:
        unreadable(file, f"column {twice[0]!r} twice", "Give each column a name of its own", number)
    width, rows, kept = len(names), [], []
    for number, cells in lines[1:]:
        if len(cells) != width and not (len(cells) > width and not any(cells[width:])):
            what = f"{len(cells)} cell{'s' * (len(cells) > 1)} under {width} column names"
            fix = "Put quotes around cells that hold the separator" if len(cells) > width else "Fill the row"
            problems.append(Problem(file, number, None, what, fix))
            continue
        rows.append(number)
        kept.append(cells)
    columns = dict(zip(names, map(list, zip(*kept, strict=False)), strict=False)) if kept else {n: [] for n in names}
    table = of_lists(file, columns, rows, path.parent)
    table.problems = problems
    return table


def _delimiter(head: str) -> str:
    """What separates the names of the first line: a comma unless there is none."""
    return next((mark for mark in ",;\t|" if mark in head), ",")


def _records(text: _Text, delimiter: str, problems: list[Problem]) -> Iterator[tuple[int, list[str]]]:
    """(line it begins in, cells) of each record."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        reader = csv.reader(io.StringIO(text.text, newline=""), delimiter=delimiter, strict=True)
        while True:
            first = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                never = "end of data" in str(error)
                what = "a quote that opens here is never closed" if never else f"malformed: {error}"
                fix = 'Write a quote inside a quoted cell twice ("")'
                problems.append(Problem(text.file, first, None, what, fix))
                continue
            if bad := text.take(first, reader.line_num):
                problems.append(dataclasses.replace(bad, row=first))
            elif cells:
                yield first, cells
    finally:
        csv.field_size_limit(limit)


def _json_lines(path: Path, file: str) -> Table:
    text = _Text(path, file)
    return _lines_of_json(text, path)


def _lines_of_json(text: _Text, path: Path) -> Table:
    records, rows, problems = [], [], []
    for number, line in enumerate(text.text.split("\n"), 1):
        if not line.strip():
            continue
        if bad := text.take(number, number):
            problems.append(bad)
            continue
        try:
            record, reason = json.loads(line), "no JSON object"
        except (ValueError, RecursionError) as error:
            record, reason = None, f"no JSON ({getattr(error, 'msg', 'nested too deep')})"
        if not isinstance(record, dict):
            shown = line.strip()[:SHOWN] + "…" * (len(line.strip()) > SHOWN)
            problems.append(Problem(text.file, number, None, f"{reason}: {shown}", "Write one JSON object a line"))
            continue
        records.append(record)
        rows.append(number)
    table = of_records(text.file, records, rows, path.parent)
    table.problems = problems
    return table


def _json(path: Path, file: str) -> Table:
    """A list of objects, an object of columns, SQuAD's and COCO's own files, or lines of JSON."""
    text = _Text(path, file)
    if text.broken:
        raise Unreadable(next(iter(text.broken.values())))
    try:
        found = json.loads(text.text)
    except (ValueError, RecursionError) as error:
        lines = [line for line in text.text.split("\n", 2) if line.strip()]
        if len(lines) > 1 and lines[0].strip().startswith("{") and lines[0].strip().endswith("}"):
            return _lines_of_json(text, path)
        at = getattr(error, "lineno", None)
        what = f"no JSON ({getattr(error, 'msg', 'nested too deep')})"
        unreadable(file, what, "Write a list of objects, or one object a line", at, error)
    if isinstance(found, dict) and {"images", "annotations", "categories"} <= set(found):
        return of_records(file, *_coco(found, file), path.parent)
    if isinstance(found, dict) and isinstance(found.get("data"), list):
        found = found["data"]
        if found and isinstance(found[0], dict) and "paragraphs" in found[0]:
            found = list(_squad(found))
    if isinstance(found, dict) and found and all(isinstance(column, list) for column in found.values()):
        lengths = {len(column) for column in found.values()}
        if len(lengths) == 1:
            return of_lists(file, found, base=path.parent)
    if not isinstance(found, list):
        unreadable(file, f"JSON of a {type(found).__name__}", "Write a list of objects, or one object a line")
    problems = [
        Problem(file, number, None, f"no JSON object: {json.dumps(record)[:SHOWN]}", "Write an object {column: value}")
        for number, record in enumerate(found, 1)
        if not isinstance(record, dict)
    ]
    kept = [(number, record) for number, record in enumerate(found, 1) if isinstance(record, dict)]
    table = of_records(file, [record for _, record in kept], [number for number, _ in kept], path.parent)
    table.problems = problems
    return table


def _squad(articles: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """SQuAD's own nesting: articles of paragraphs of questions."""
    for article in articles:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = question.get("answers") or []
                yield {
                    "id": str(question.get("id", "")),
                    "title": article.get("title", ""),
                    "context": paragraph["context"],
                    "question": question["question"],
                    "answers": {key: [answer[key] for answer in answers] for key in ("text", "answer_start")},
                }


def _coco(found: dict[str, Any], file: str) -> tuple[list[dict[str, Any]], range]:
    """A row for each image: {image, boxes: {bbox: [[x, y, w, h]], category: [name]}}."""
    names = {entry["id"]: entry["name"] for entry in found["categories"]}
    rows = {
        entry["id"]: {"image": entry["file_name"], "boxes": {"bbox": [], "category": []}} for entry in found["images"]
    }
    for place, entry in enumerate(found["annotations"], 1):
        for key, known in (("image_id", rows), ("category_id", names)):
            if entry.get(key) not in known:
                unreadable(file, f"annotation {place}: {key} {entry.get(key)!r} is not listed", "Correct or remove it")
        boxes = rows[entry["image_id"]]["boxes"]
        boxes["bbox"].append(entry["bbox"])
        boxes["category"].append(names[entry["category_id"]])
    return list(rows.values()), range(1, len(rows) + 1)


def _txt(path: Path, file: str) -> Table:
    text = _Text(path, file)
    lines = [(number, line) for number, line in enumerate(text.text.split("\n"), 1) if line.strip()]
    good = [(number, line) for number, line in lines if number not in text.broken]
    table = of_lists(file, {"text": [line for _, line in good]}, [number for number, _ in good], path.parent)
    table.problems = list(text.broken.values())
    return table


def _conll(path: Path, file: str) -> Table:
    """A token and its tag a line (first and last word of it), an empty line between sentences."""
    text, records, rows, problems = _Text(path, file), [], [], []
    tokens, tags, first, bad = [], [], 1, None
    for number, line in enumerate([*text.text.split("\n"), ""], 1):
        fields = line.split()
        if not fields or fields[0] == "-DOCSTART-":
            if bad:
                problems.append(bad)
            elif tokens:
                records.append({"tokens": tokens, "tags": tags})
                rows.append(first)
            tokens, tags, first, bad = [], [], number + 1, None
            continue
        bad = bad or text.take(number, number)
        if len(fields) == 1:
            bad = bad or Problem(file, number, None, f"one word, {line.strip()!r}", "Write a token and its tag a line")
        tokens.append(fields[0])
        tags.append(fields[-1])
    table = of_records(file, records, rows, path.parent)
    table.problems = problems
    return table


def arff(path: Path) -> Iterator[tuple[int, dict[str, str | None]]]:
    """(line, {attribute: value}) of Weka's format; `?` is None."""
    table = _arff(path, path.name)
    columns = [table.column(name) for name in table.names]
    for number, *cells in zip(table.rows, *columns, strict=True):
        yield number, dict(zip(table.names, cells, strict=True))


def _arff(path: Path, file: str) -> Table:
    text, names, cells, rows, problems, data = _Text(path, file), [], [], [], [], False
    for number, line in enumerate(text.text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("%"):
            continue
        if not data:
            if found := re.match(r"@attribute\s+('[^']*'|\"[^\"]*\"|\S+)", line, re.IGNORECASE):
                if bad := text.take(number, number):
                    raise Unreadable(bad)
                names.append(found[1].strip("'\""))
            data = line.lower().startswith("@data")
            continue
        if bad := text.take(number, number):
            problems.append(bad)
            continue
        if line.startswith("{"):
            unreadable(file, "sparse ARFF", "Save it with all values, or as CSV", number)
        quote = "'" if line.count("'") >= line.count('"') else '"'
        row = next(csv.reader([line], quotechar=quote, skipinitialspace=True, escapechar="\\"))
        if len(row) != len(names):
            what = f"{len(row)} values of {len(names)} attributes"
            problems.append(Problem(file, number, None, what, "Put quotes around values that hold a comma"))
            continue
        cells.append([None if value.strip() == "?" else value.strip() for value in row])
        rows.append(number)
    columns = {name: [row[i] for row in cells] for i, name in enumerate(names)}
    table = of_lists(file, columns, rows, path.parent)
    table.problems = problems
    return table


def _parquet(path: Path, file: str) -> Table:
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        return of_dataset(file, datasets.Dataset(pyarrow.parquet.read_table(path)), path.parent)
    except pyarrow.ArrowInvalid as error:
        unreadable(file, f"no parquet ({str(error).splitlines()[0][:120]})", "Write the file again", cause=error)


READERS: dict[str, Callable[[Path, str], Table]] = {
    ".csv": _csv,
    ".tsv": _csv,
    ".tab": _csv,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".txt": _txt,
    ".conll": _conll,
    ".bio": _conll,
    ".iob": _conll,
    ".arff": _arff,
    ".parquet": _parquet,
}
