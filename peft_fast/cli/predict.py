"""`peft-fast predict RUN "text…"`: a finished run's answers, to a text, to standard input, or to a file of rows."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from peft_fast.cli.eval import column_flags, column_options, machine_flags, machine_options
from peft_fast.cli.parser import Parser
from peft_fast.errors import DataError, SettingsError, fail

EXAMPLES = """\
examples:
  peft-fast predict runs/last "a film that never finds its feet"
  peft-fast predict runs/last --input reviews.csv --output answers.csv
  cat questions.jsonl | peft-fast predict runs/last - > answers.jsonl
"""
FORMATS = (".csv", ".tsv", ".jsonl", ".json")
PREFIX = "predicted_"


def app(args: list[str], prog_name: str = "peft-fast predict") -> int:
    """Prints or writes an answer a row; exit status 0."""
    parser = Parser(
        prog=prog_name,
        description="Answers of a finished run. A text, or the path of an image or recording; a task that reads "
        'several columns takes JSON: \'{"question": "…", "context": "…"}\'.',
        epilog=EXAMPLES.replace("peft-fast", prog_name.rpartition(" ")[0]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder that `train` wrote")
    add("rows", nargs="*", metavar="TEXT", help="texts, paths or JSON objects; -: one a line from standard input")
    add("--input", type=Path, metavar="FILE", help="CSV, TSV, JSON lines, JSON, text, parquet: its columns are kept")
    add("--output", type=Path, metavar="FILE", help="CSV, TSV, JSON lines or JSON by its name (default: print)")
    add("--json", action="store_true", help="print whole answers as JSON lines")
    column_flags(parser)
    machine_flags(parser)
    given = parser.parse_args(args)
    _fits(given)
    options = machine_options(given) | column_options(given)
    from peft_fast.recipes import use

    run = use.load(given.run, **options)
    if given.input:
        table = list(of_file(run, given.input))
        _write(table, given.output)
        if given.output:
            print(f"{len(table):,} rows: {given.output}")
        return 0
    _no_tables(given.rows, run)
    asked = [_row(text) for text in _texts(given.rows)]
    answers = of_rows(run, asked)
    if given.output:
        names = list(dict.fromkeys(name for answer in answers for name in answer or ()))
        pairs = zip(asked, answers, strict=True)
        _write([_whole(row, run) | _named(answer or dict.fromkeys(names)) for row, answer in pairs], given.output)
        return 0
    for answer in answers:
        whole = given.json or given.rows == ["-"]
        print(json.dumps(answer, ensure_ascii=False) if whole else "no answer" if answer is None else short(answer))
    return 0


def _fits(given: argparse.Namespace) -> None:
    """Options that belong together, before a model is loaded."""
    if bool(given.input) == bool(given.rows):
        what = "both TEXT and --input" if given.input else "nothing to answer"
        fail(SettingsError, what, "one of the two", 'pass a "text", - for standard input, or --input FILE')
    if given.output and given.output.suffix.lower() not in FORMATS:
        fail(SettingsError, f"--output {given.output}", f"a name that ends in {', '.join(FORMATS)}", "rename it")
    if given.output and given.input and given.output.resolve() == given.input.resolve():
        fail(SettingsError, f"--output {given.output}, which is the input", "a file of its own", "pass another")


def _no_tables(words: list[str], run: Any) -> None:
    """Refuses the name of a file of rows, which a model of texts would answer as if it were one."""
    from peft_fast.recipes import files

    for word in words:
        path = Path(word).expanduser()
        if path.suffix.lower() in files.READERS and len(word) < 1000 and path.is_file():
            need = f"{run.task.columns[0].role}: {word} is a file of rows"
            fail(SettingsError, f"TEXT {word}", need, f"did you mean --input {word}?")


def _texts(words: list[str]) -> list[str]:
    if words != ["-"]:
        return words
    lines = [line.rstrip("\r\n") for line in sys.stdin]
    found = [line for line in lines if line.strip()]
    if not found:
        fail(DataError, "standard input without a line", "one text or JSON object a line", "pipe some in")
    return found


def _row(text: str) -> Any:
    """A text as it is; a JSON object as the columns of a row."""
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except ValueError:
            return text
        return found if isinstance(found, dict) else text
    return text


def _whole(row: Any, run: Any) -> dict[str, Any]:
    return row if isinstance(row, dict) else {run.task.columns[0].role: row}


def short(answer: dict[str, Any]) -> str:
    """What a reader wants first: the label with its share, the text, the number."""
    from peft_fast.pages import words

    plain = {name: value for name, value in answer.items() if isinstance(value, str | int | float | bool)}
    if set(plain) == {"label", "score"}:
        return f"{plain['label']}\t{100 * plain['score']:.1f} %"
    if len(answer) == 1:
        value = next(iter(answer.values()))
        return (
            value if isinstance(value, str) else words.plain(value) if isinstance(value, float) else json.dumps(value)
        )
    return json.dumps(answer, ensure_ascii=False)


# ---- files


def of_rows(run: Any, asked: list[Any]) -> list[dict[str, Any] | None]:
    """The answer to each; None to a row that is left out."""
    from peft_fast.recipes import use

    rows, found = use.answered(run, asked)
    if run.task.modality == "series":  # what comes after the rows, not about them
        return found
    answers = dict(zip(rows["row"], found, strict=True))
    return [answers.get(number) for number in range(1, len(asked) + 1)]


def of_file(run: Any, path: Path) -> Iterator[dict[str, Any]]:
    """Every row of a file with all its columns and, after them, the answer; a row without an answer has None."""
    from peft_fast.recipes import files, use

    path = path.expanduser()
    try:
        table = files.read(path)
    except files.Unreadable as error:
        fail(DataError, str(error), "a file of rows", "correct it, or pass another --input", error)
    rows, found = use.answered(run, str(path))
    if run.task.modality == "series":  # what comes after the rows, not about them
        yield from _ahead(found)
        return
    answers = dict(zip(rows["row"], found, strict=True))
    names = list(dict.fromkeys(name for answer in answers.values() for name in answer))
    cells = [table.column(name) for name in table.names]
    for place, number in enumerate(table.rows):
        answer = answers.get(number) or dict.fromkeys(names)
        yield {name: values[place] for name, values in zip(table.names, cells, strict=True)} | _named(answer)


def _ahead(answers: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each forecast time, with a column a value."""
    for answer in answers:
        known = {"series": answer["series"]} if "series" in answer else {}
        for step in answer["forecast"]:
            values = step["value"] if isinstance(step["value"], dict) else {"value": step["value"]}
            yield {**known, "time": step["time"], **values}


def _named(answer: dict[str, Any]) -> dict[str, Any]:
    return {f"{PREFIX}{name}": value for name, value in answer.items()}


def _write(rows: list[dict[str, Any]], path: Path | None) -> None:
    """To standard output as JSON lines, or a whole file or none."""
    if path is None:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False, default=str))
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
                _format(rows, file, path.suffix.lower())
            os.chmod(part, 0o644)
            os.replace(part, path)
        finally:
            Path(part).unlink(missing_ok=True)
    except OSError as error:
        fail(SettingsError, f"--output {path}: {error.strerror}", "a file that can be written", "pass another", error)


def _format(rows: list[dict[str, Any]], file: IO[str], suffix: str) -> None:
    if suffix == ".json":
        json.dump(rows, file, ensure_ascii=False, indent=1, default=str)
        file.write("\n")
    elif suffix == ".jsonl":
        file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    else:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",", lineterminator="\n")
        writer.writerow(names)
        writer.writerows([_cell(row.get(name)) for name in names] for row in rows)


def _cell(value: Any) -> Any:
    """A cell holds a text or a number; what has parts is JSON."""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list) else value
